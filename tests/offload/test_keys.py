"""Names of stored objects: equal exactly where their content may be shared."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from turboquant.errors import ConfigError
from turboquant.offload.keys import CHUNK_TOKENS, chunk_keys, namespace

ROOT = bytes(32)
TOKEN = st.integers(0, 2**32 - 1)
RESERVED = {"layout", "codebook", "chunk"}
FIELDS = st.dictionaries(st.text(min_size=1, max_size=4).filter(lambda n: n not in RESERVED), st.text(max_size=6), max_size=4)


def tokens(seed: int, count: int) -> list[int]:
    return [(seed * 7919 + i * 104729) % 2**32 for i in range(count)]


@given(st.integers(0, 1100), st.integers(0, 1100), st.integers(0, 1100))
def test_common_prefix_means_common_keys_and_nothing_else(shared: int, a: int, b: int) -> None:
    base = tokens(1, shared)
    one, two = base + tokens(2, a), base + tokens(3, b)
    common = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), min(len(one), len(two)))
    keys, others = chunk_keys(ROOT, one), chunk_keys(ROOT, two)
    assert len(keys) == len(one) // CHUNK_TOKENS
    equal = common // CHUNK_TOKENS
    assert keys[:equal] == others[:equal]
    assert not set(keys[equal:]) & set(others[equal:])
    assert len(set(keys)) == len(keys)


@given(st.integers(0, 767), TOKEN)
def test_every_token_counts(at: int, token: int) -> None:
    one = tokens(4, 768)
    assume(one[at] != token)
    two = [*one[:at], token, *one[at + 1 :]]
    same = at // CHUNK_TOKENS
    keys, others = chunk_keys(ROOT, one), chunk_keys(ROOT, two)
    assert [a == b for a, b in zip(keys, others, strict=True)] == [i < same for i in range(3)]


def test_the_order_of_chunks_counts() -> None:
    a, b = tokens(5, CHUNK_TOKENS), tokens(6, CHUNK_TOKENS)
    assert not set(chunk_keys(ROOT, a + b)) & set(chunk_keys(ROOT, b + a))
    assert len(set(chunk_keys(ROOT, a * 4))) == 4


def test_roots_separate() -> None:
    ids = tokens(7, 512)
    assert not set(chunk_keys(ROOT, ids)) & set(chunk_keys(namespace(salt="x"), ids))


@pytest.mark.parametrize(("count", "keys"), [(0, 0), (1, 0), (255, 0), (256, 1), (257, 1), (511, 1), (512, 2)])
def test_only_full_chunks_have_keys(count: int, keys: int) -> None:
    assert len(chunk_keys(ROOT, tokens(8, count))) == keys


def test_the_whole_range_of_32_bits() -> None:
    ids = [0, 2**31 - 1, 2**31, 2**32 - 1] * 64
    assert chunk_keys(ROOT, ids) == chunk_keys(ROOT, tuple(ids))
    assert chunk_keys(ROOT, ids) != chunk_keys(ROOT, [0] * 256)


@pytest.mark.parametrize("bad", [-1, 2**32, 2**32 + 5, 2**63, 2**70, -(2**70)])
@pytest.mark.parametrize("at", [0, 255, 256, 299])
def test_ids_beyond_32_bits_are_refused_and_never_wrapped(bad: int, at: int) -> None:
    ids = [5] * 300
    ids[at] = bad
    with pytest.raises(ConfigError, match="token ids"):
        chunk_keys(ROOT, ids)


def test_keys_do_not_depend_on_the_machine() -> None:
    # Stored files are found by these values: they change only together with the format.
    assert chunk_keys(bytes(32), range(256))[0].hex() == "73031412ac4280ddbe12f3658a90e2cf8e9afe365d78e8fd4da4677465347e44"


@given(FIELDS, FIELDS)
def test_namespaces_are_equal_only_for_equal_fields(a: dict[str, str], b: dict[str, str]) -> None:
    assert (namespace(**a) == namespace(**b)) == (a == b)


@given(st.text(max_size=8), st.integers(0, 8), st.integers(0, 8))
def test_a_border_between_fields_cannot_move(text: str, i: int, j: int) -> None:
    one = namespace(model=text[:i], salt=text[i:])
    two = namespace(model=text[:j], salt=text[j:])
    assert (one == two) == (text[:i] == text[:j])


def test_fields_count_by_name() -> None:
    assert namespace(a="x", b="y") == namespace(b="y", a="x")
    assert namespace(a="x", b="y") != namespace(a="y", b="x")
    assert namespace(a="x") != namespace(b="x")
    assert namespace(a="") != namespace()


@given(st.text(max_size=10), st.text(max_size=10))
def test_salts_separate(a: str, b: str) -> None:
    assert (namespace(model="m", salt=a) == namespace(model="m", salt=b)) == (a == b)


def test_a_salt_may_be_any_string() -> None:
    # A name from the file system or the environment may hold lone surrogates.
    assert namespace(salt="\udcff") != namespace(salt="\udcfe")
    assert len(namespace(salt="\udcff")) == 32
