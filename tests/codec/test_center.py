"""Rotary embeddings, centring and balance of keys, and files of statistics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from turboquant.codec.center import KeyStatistics, KeyTransform, QuerySquares, Statistics, measure, unrotate
from turboquant.codec.rotary import Pairing, Rotary
from turboquant.config import MAX_STATISTICS_TOKENS
from turboquant.errors import CacheFileError, TurboQuantError

PAIRINGS: list[Pairing] = ["half", "interleaved"]
HEADS, DIM = 2, 64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotary(pairs: int = DIM // 2, pairing: Pairing = "half") -> Rotary:
    return Rotary(10000.0 ** (-torch.arange(pairs).double() / pairs), pairing)


def complex_rotation(x: Tensor, positions: Tensor, r: Rotary) -> Tensor:
    """``x`` (batch, heads, tokens, dim) turned by its positions (batch, tokens): complex numbers, float64."""
    n = r.rotary_dim
    pairs = [(i, i + n // 2) if r.pairing == "half" else (2 * i, 2 * i + 1) for i in range(n // 2)]
    out = x.double().clone()
    for i, (a, b) in enumerate(pairs):
        angle = positions.double()[:, None] * r.inv_freq[i]
        z = torch.complex(x[..., a].double(), x[..., b].double()) * torch.exp(1j * angle)
        out[..., a], out[..., b] = z.real, z.imag
    return out


CASES = [
    pytest.param(r, id=name)
    for name, r in {
        "none": None,
        "half": rotary(),
        "interleaved": rotary(pairing="interleaved"),
        "partial-half": rotary(12),
        "partial-interleaved": rotary(12, "interleaved"),
    }.items()
]


# -- rotary ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", CASES[1:])
def test_rotation_is_a_complex_product(r: Rotary) -> None:
    x, positions = randn(2, HEADS, 9, DIM), torch.tensor([[0, 1, 2, 3, 50, 1000, 5000, 30000, 131071], list(range(-3, 6))])
    cos, sin = r.cos_sin(positions)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == (2, 9, r.rotary_dim // 2)
    turned = r.apply(x, cos[:, None], sin[:, None])
    torch.testing.assert_close(turned, complex_rotation(x, positions, r).float(), atol=2e-6, rtol=0)
    torch.testing.assert_close(r.apply(turned, cos[:, None], -sin[:, None]), x, atol=2e-6, rtol=0)
    torch.testing.assert_close(unrotate(turned, positions, r), x, atol=2e-6, rtol=0)
    assert torch.equal(turned[..., r.rotary_dim :], x[..., r.rotary_dim :])


@pytest.mark.parametrize("r", CASES[1:])
def test_position_zero_changes_nothing(r: Rotary) -> None:
    x = randn(1, HEADS, 1, DIM)
    cos, sin = r.cos_sin(torch.zeros(1, 1, dtype=torch.long))
    assert torch.equal(r.apply(x, cos[:, None], sin[:, None]), x)


@given(p=st.integers(0, 2**17), q=st.integers(0, 2**17))
def test_scores_depend_on_the_distance_only(p: int, q: int) -> None:
    r, x, y = rotary(), randn(1, 1, 1, DIM), randn(1, 1, 1, DIM, seed=1)

    def turn(v: Tensor, position: int) -> Tensor:
        cos, sin = r.cos_sin(torch.tensor([[position]]))
        return r.apply(v, cos[:, None], sin[:, None])

    assert float((turn(x, p) * turn(y, q)).sum()) == pytest.approx(float((turn(x, p - q) * y).sum()), abs=2e-5)


@pytest.mark.parametrize("starts", [None, [0, 7, 200]], ids=["shared", "padded"])
def test_angles_of_page_starts(starts: list[int] | None) -> None:
    r, device = rotary(), torch.device("cpu")
    angles = r.page_angles(device, None if starts is None else torch.tensor(starts))
    for pages in (1, 70, 300):  # grows
        table = angles.get(pages)
        assert table.dtype == torch.float32
        assert table.is_contiguous()
        assert table.shape[0] == len(starts or [0])
        assert table.shape[1] >= pages
        first = 64 * torch.arange(table.shape[1])[None] - torch.tensor(starts or [0])[:, None]
        assert torch.equal(table, torch.stack(r.cos_sin(first), dim=-1))
    assert angles.get(300) is angles.get(5)
    assert (r.page_angles(device) is angles) is (starts is None)
    if starts is None:
        cos, sin = r.page_table(device, 3)
        assert torch.equal(torch.stack((cos, sin), dim=-1), angles.get(3)[0, :3])


# -- transform ------------------------------------------------------------------------------------------------------------


def positions_with_padding(*starts: int, tokens: int) -> Tensor:
    return torch.arange(tokens)[None] - torch.tensor(starts)[:, None]


@pytest.mark.parametrize("balanced", [False, True], ids=["centred", "balanced"])
@pytest.mark.parametrize("r", CASES)
def test_transform_can_be_undone(r: Rotary | None, balanced: bool) -> None:
    statistics = KeyStatistics(5 * randn(HEADS, DIM), randn(HEADS, DIM, seed=1).exp() if balanced else None)
    transform = KeyTransform(statistics, r)
    keys, positions = randn(3, HEADS, 70, DIM, seed=2), positions_with_padding(0, 3, 80, tokens=70)
    coded = transform.forward(keys, positions)
    torch.testing.assert_close(transform.inverse(coded, positions), keys, atol=1e-5, rtol=1e-5)
    offset = statistics.mean.double()[None, :, None].expand(3, -1, 70, -1)
    offset = offset if r is None else complex_rotation(offset, positions, r)
    centred = keys.double() - offset
    expected = centred if statistics.balance is None else centred * statistics.balance[:, None]
    torch.testing.assert_close(coded, expected.float(), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("r", CASES)
def test_offset_is_taken_in_two_steps(r: Rotary | None) -> None:
    # R_p (R_j mu) with p the first position of each page: the statement that kernels follow to the bit.
    transform = KeyTransform(KeyStatistics(randn(HEADS, DIM)), r)
    positions = positions_with_padding(0, 70, tokens=192) + 640
    table = transform.table(positions.device)
    assert table is not None
    assert table is transform.table(positions.device)
    found = transform.offset(positions)
    assert found is not None
    assert found.shape == (2, HEADS, 192, DIM)
    for page in range(3):
        for row in range(2):
            want = table
            if r is not None:
                cos, sin = r.cos_sin(positions[row, 64 * page])
                want = r.apply(table, cos, sin)
            assert torch.equal(found[row, :, 64 * page : 64 * page + 64], want)
    if r is not None:
        angles = r.page_angles(positions.device, torch.tensor([0, 70])).get(13)[:, 10:13]
        assert torch.equal(found, transform.page_offset(angles[..., 0], angles[..., 1]))
    mean = transform.statistics.mean if transform.statistics is not None else randn(0)
    spread = mean[None, :, None].expand(2, -1, 192, -1)
    direct = spread.double() if r is None else complex_rotation(spread, positions, r)
    torch.testing.assert_close(found, direct.float(), atol=2e-6, rtol=0)


def test_bytes_of_a_transform() -> None:
    transform = KeyTransform(KeyStatistics(randn(HEADS, DIM), randn(HEADS, DIM)), rotary())
    vector = 4 * HEADS * DIM
    assert transform.nbytes == 2 * vector
    transform.forward(randn(1, HEADS, 64, DIM), torch.arange(64)[None])
    assert transform.nbytes == (2 + 64) * vector
    assert KeyTransform(None, None).nbytes == 0


def test_without_statistics_nothing_changes() -> None:
    transform = KeyTransform(None, rotary())
    assert transform.table(torch.device("cpu")) is None
    assert transform.page_offset(torch.ones(1, 1, DIM // 2), torch.zeros(1, 1, DIM // 2)) is None
    keys, positions = randn(1, HEADS, 7, DIM), torch.arange(7)[None]
    assert transform.offset(positions) is None
    assert torch.equal(transform.forward(keys, positions), keys)
    assert torch.equal(transform.inverse(keys, positions), keys)
    grouped = randn(1, HEADS, 3, 7, DIM)
    assert torch.equal(transform.scale_query(grouped), grouped)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_transform_works_in_float32(dtype: torch.dtype) -> None:
    transform = KeyTransform(KeyStatistics(randn(HEADS, DIM)), rotary())
    keys, positions = randn(1, HEADS, 9, DIM).to(dtype), torch.arange(9)[None]
    coded = transform.forward(keys, positions)
    assert coded.dtype == torch.float32
    assert torch.equal(coded, transform.forward(keys.float(), positions))


@pytest.mark.parametrize("group", [1, 4])
def test_scaled_queries_meet_balanced_keys(group: int) -> None:
    transform = KeyTransform(KeyStatistics(torch.zeros(HEADS, DIM), randn(HEADS, DIM).exp()), None)
    keys, query = randn(2, HEADS, 9, DIM, seed=1), randn(2, HEADS, group, 5, DIM, seed=2)
    coded = transform.forward(keys, torch.arange(9)[None])
    scores = transform.scale_query(query) @ coded[:, :, None].transpose(-1, -2)
    torch.testing.assert_close(scores, query @ keys[:, :, None].transpose(-1, -2), atol=1e-4, rtol=1e-4)


# -- measuring ------------------------------------------------------------------------------------------------------------


def planted(r: Rotary | None, positions: Tensor, mean: Tensor, noise: Tensor) -> Tensor:
    plain = (mean[None, :, None] + noise).double()
    return (plain if r is None else complex_rotation(plain, positions, r)).float()


@pytest.mark.parametrize("r", CASES)
def test_planted_mean_is_found(r: Rotary | None) -> None:
    mean, noise = 4 * randn(HEADS, DIM), randn(2, HEADS, 300, DIM, seed=1)
    positions = torch.arange(300)[None].expand(2, -1)
    keys = planted(r, positions, mean, noise)
    found = measure(keys, positions, r, None, 0.25)
    assert found.balance is None
    assert found.mean.shape == (HEADS, DIM)
    torch.testing.assert_close(found.mean, mean + noise.mean((0, 2)), atol=1e-4, rtol=0)
    assert (found.mean - mean).abs().max() < 5 / math.sqrt(600)
    residual = unrotate(KeyTransform(found, r).forward(keys, positions), positions, r)
    assert residual.mean((0, 2)).abs().max() < 1e-4


def test_mean_of_keys_as_they_are_misses_a_rotated_mean() -> None:
    # Why the embedding is undone first: at high frequencies a constant mean averages out.
    positions, mean = torch.arange(256)[None], torch.full((HEADS, DIM), 3.0)
    keys = planted(rotary(), positions, mean, 0.1 * randn(1, HEADS, 256, DIM))
    energy = {
        name: float(KeyTransform(measure(keys, positions, r, None, 0), r).forward(keys, positions).square().mean())
        for name, r in (("rope", rotary()), ("constant", None))
    }
    assert energy["rope"] < 0.02
    assert energy["constant"] > 2


@pytest.mark.parametrize("r", [None, rotary()], ids=["constant", "rotary"])
def test_padding_is_left_out(r: Rotary | None) -> None:
    square = randn(HEADS, DIM).exp()
    positions = positions_with_padding(0, 100, 190, tokens=200)
    keys = planted(r, positions, randn(HEADS, DIM), randn(3, HEADS, 200, DIM, seed=1))
    garbage = torch.where((positions < 0)[:, None, :, None], torch.full_like(keys, 1e4), keys)
    clean, dirty = measure(keys, positions, r, square, 0.25), measure(garbage, positions, r, square, 0.25)
    assert torch.equal(clean.mean, dirty.mean)
    assert clean.balance is not None
    assert dirty.balance is not None
    assert torch.equal(clean.balance, dirty.balance)
    # The mean is over tokens, not over rows: 200 + 100 + 10 of them.
    plain = unrotate(keys, positions, r)
    valid = torch.cat([plain[i, :, s:] for i, s in enumerate((0, 100, 190))], dim=1)
    torch.testing.assert_close(clean.mean, valid.mean(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("r", [None, rotary()], ids=["constant", "rotary"])
def test_balance_is_a_power_of_the_ratio(r: Rotary | None, exponent: float) -> None:
    positions = torch.arange(400)[None]
    keys = planted(r, positions, randn(HEADS, DIM), randn(1, HEADS, 400, DIM, seed=1) * randn(HEADS, 1, DIM, seed=2).exp())
    keys[:, :, :4] *= 50  # sinks do not count
    square = randn(HEADS, DIM, seed=3).exp()
    found = measure(keys, positions, r, square, exponent)
    assert found.balance is not None
    torch.testing.assert_close(found.balance.log().mean(-1), torch.zeros(HEADS), atol=1e-5, rtol=0)
    centred = KeyTransform(KeyStatistics(found.mean), r).forward(keys, positions)[:, :, 4:]
    ratio = (square.sqrt() / centred.square().mean((0, 2)).sqrt()) ** exponent
    expected = ratio / ratio.log().mean(-1, keepdim=True).exp()
    torch.testing.assert_close(found.balance, expected, atol=0, rtol=1e-4)


@pytest.mark.parametrize(("exponent", "with_queries"), [(0.0, True), (0.25, False)], ids=["off", "no-queries"])
def test_no_balance(exponent: float, with_queries: bool) -> None:
    keys, square = randn(1, HEADS, 50, DIM), torch.ones(HEADS, DIM) if with_queries else None
    assert measure(keys, torch.arange(50)[None], None, square, exponent).balance is None


def test_silent_channels_stay_finite() -> None:
    keys, square = randn(1, HEADS, 50, DIM), torch.ones(HEADS, DIM)
    keys[..., 3], square[0, 7] = 0, 0
    found = measure(keys, torch.arange(50)[None], None, square, 1.0)
    assert found.balance is not None
    assert found.balance.isfinite().all()
    assert (found.balance > 0).all()
    one = measure(keys[:, :, :1], torch.zeros(1, 1, dtype=torch.long), None, square, 0.25)
    assert one.balance is not None
    assert one.balance.isfinite().all()


@pytest.mark.parametrize("group", [1, 3])
def test_query_squares(group: int) -> None:
    squares, positions = QuerySquares(), positions_with_padding(0, 10, tokens=60)
    assert squares.mean() is None
    query = randn(2, HEADS * group, 60, DIM)
    for start in range(0, 60, 25):
        part = slice(start, start + 25)
        squares.add(query[:, :, part], HEADS, positions[:, part])
    grouped = query.view(2, HEADS, group, 60, DIM).square()
    used = torch.cat([grouped[0, :, :, 4:], grouped[1, :, :, 14:]], dim=2)  # neither padding nor sinks
    found = squares.mean()
    assert found is not None
    torch.testing.assert_close(found, used.mean((1, 2)), atol=1e-5, rtol=1e-5)


def test_late_queries_do_not_count() -> None:
    squares, n = QuerySquares(), MAX_STATISTICS_TOKENS
    squares.add(randn(1, HEADS, 10, DIM), HEADS, torch.arange(n, n + 10)[None])
    squares.add(randn(1, HEADS, 3, DIM), HEADS, torch.arange(3)[None])
    assert squares.mean() is None


# -- files ----------------------------------------------------------------------------------------------------------------


def example(balance: bool = True) -> Statistics:
    layers = {
        i: KeyStatistics(randn(HEADS, DIM, seed=i), randn(HEADS, DIM, seed=9).exp() if balance and i else None)
        for i in (0, 2, 11)
    }
    return Statistics(layers, "rope_mean", "model-a")


def test_save_and_load(tmp_path: Path) -> None:
    statistics, path = example(), tmp_path / "s.safetensors"
    statistics.save(path)
    loaded = Statistics.load(str(path))
    assert (loaded.key_center, loaded.model, loaded.digest()) == ("rope_mean", "model-a", statistics.digest())
    assert loaded.layers.keys() == statistics.layers.keys()
    assert loaded.tensors().keys() == statistics.tensors().keys() == {"0.mean", "2.mean", "2.balance", "11.mean", "11.balance"}
    for name, t in statistics.tensors().items():
        assert torch.equal(loaded.tensors()[name], t)
    assert loaded.layers[0].balance is None
    assert loaded.layers[2].nbytes == 2 * HEADS * DIM * 4


def test_empty_statistics_can_be_saved(tmp_path: Path) -> None:
    Statistics().save(tmp_path / "s")
    assert Statistics.load(tmp_path / "s").layers == {}


def test_digest_tells_every_difference() -> None:
    digests = {example().digest(), example(balance=False).digest(), Statistics(example().layers, "mean").digest()}
    other = example()
    other.layers[2].mean[0, 0] += 1e-3
    missing = example()
    del missing.layers[11]
    digests |= {other.digest(), missing.digest(), Statistics().digest()}
    assert len(digests) == 6
    assert example().digest() == Statistics(dict(reversed(example().layers.items())), "rope_mean", "another").digest()


@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, where: float, flip: int) -> None:
    path = tmp_path_factory.mktemp("s") / "s.safetensors"
    statistics = Statistics({0: KeyStatistics(randn(1, 32), randn(1, 32).exp())})
    statistics.save(path)
    raw = bytearray(path.read_bytes())
    raw[int(where * len(raw))] ^= flip
    path.write_bytes(raw)
    try:  # white space of the header may change
        loaded = Statistics.load(path)
    except CacheFileError as e:
        assert str(path) in str(e)  # noqa: PT017
    else:
        assert loaded.digest() == statistics.digest()


@given(where=st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_noticed(tmp_path_factory: pytest.TempPathFactory, where: float) -> None:
    path = tmp_path_factory.mktemp("s") / "s.safetensors"
    example().save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(where * len(raw))])
    with pytest.raises(CacheFileError, match="not a statistics file"):
        Statistics.load(path)


def test_changed_values_with_an_intact_header_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    example().save(path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CacheFileError, match="damaged or of another version"):
        Statistics.load(path)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(CacheFileError, match="there is no statistics file"):
        Statistics.load(tmp_path / "none")
    with pytest.raises(TurboQuantError, match="there is no statistics file"):
        Statistics.load(tmp_path)
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    save_file({"0.mean": torch.zeros(2, 3)}, str(tmp_path / "tensors"))
    save_file({"w": torch.zeros(2, 3)}, str(tmp_path / "meta"), metadata={"turboquant": '["a list"]'})
    save_file(
        {"w.mean": torch.zeros(2)}, str(tmp_path / "name"), metadata={"turboquant": '{"key_center": "mean", "model": ""}'}
    )
    save_file({"0.mean": torch.zeros(2)}, str(tmp_path / "old"), metadata={"turboquant": '{"key_center": "mean", "model": ""}'})
    for name in ("text", "empty", "tensors", "meta", "name", "old"):
        with pytest.raises(CacheFileError, match=name):
            Statistics.load(tmp_path / name)
