"""The encode kernel writes exactly the bytes of the codec in plain torch, and nothing else."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant.codec.center import KeyStatistics, KeyTransform
from turboquant.codec.layout import PAGE_TOKENS, PageLayout
from turboquant.codec.page import PageCodec
from turboquant.codec.rotary import Pairing, Rotary
from turboquant.cuda.encode import EncodeStruct, encode_pages
from turboquant.errors import ShapeError

BITS = [1, 2, 3, 4]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotary(dim: int, pairing: Pairing = "half") -> Rotary:
    return Rotary(10000.0 ** (-torch.arange(dim // 2).double() / (dim // 2)), pairing)


def transform_of(kind: str, heads: int, dim: int, balance: bool) -> KeyTransform:
    """``kind``: none, constant, half, interleaved, or the latter two with -N for N rotated channels."""
    if kind == "none":
        return KeyTransform(None, None)
    statistics = KeyStatistics(2 * randn(heads, dim, seed=8), randn(heads, dim, seed=9).mul(0.3).exp() if balance else None)
    pairing, _, width = kind.partition("-")
    turned = None if pairing == "constant" else rotary(int(width or dim), "half" if pairing == "half" else "interleaved")
    return KeyTransform(statistics, turned)


def tokens(rows: int, heads: int, count: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values of many sizes, some of them zero."""
    size = 10.0 ** (8 * torch.rand(2, rows, heads, count, 1, generator=torch.Generator().manual_seed(5)) - 4)
    size[0, :, :, 3::29] = 0
    size[1, :, :, 5::31] = 0
    key, value = (randn(rows, heads, count, dim, seed=s + 1) * size[s] for s in (0, 1))
    return key.to(dtype), value.to(dtype)


def reference(
    codec: PageCodec, transform: KeyTransform, key: Tensor, value: Tensor, first: int = 0, starts: Tensor | None = None
) -> Tensor:
    """Pages (rows, heads, n, bytes) of whole pages from index ``first`` on, by the codec on the CPU."""
    positions = torch.arange(first, first + key.shape[2])[None]
    positions = positions if starts is None else positions - starts[:, None]
    return codec.encode(transform.forward(key.cpu(), positions), value.cpu())


def check_pages(
    device: torch.device,
    layout: PageLayout,
    kind: str = "half",
    balance: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 1,
    heads: int = 2,
    pages: int = 1,
    first: int = 0,
    starts: Tensor | None = None,
    rotation: str = "hadamard",
) -> None:
    codec = PageCodec(layout, rotation, seed=3)  # type: ignore[arg-type]
    transform = transform_of(kind, heads, layout.head_dim, balance)
    key, value = tokens(rows, heads, pages * PAGE_TOKENS, layout.head_dim, dtype)
    expected = reference(codec, transform, key, value, first, starts)
    pool = torch.full((pages, rows, heads, layout.page_bytes), 0xA5, dtype=torch.uint8, device=device)
    angles = None
    if starts is not None and transform.rotary is not None:
        angles = transform.rotary.page_angles(device, starts).get(first // PAGE_TOKENS + pages)
    encode_pages(key.to(device), value.to(device), pool, codec=codec, transform=transform, first_index=first, angles=angles)
    assert torch.equal(pool.cpu().permute(1, 2, 0, 3), expected)


@pytest.mark.parametrize("value_bits", BITS)
@pytest.mark.parametrize("key_bits", BITS)
def test_bits(kernel_device: torch.device, key_bits: int, value_bits: int) -> None:
    check_pages(kernel_device, PageLayout(128, key_bits, value_bits))


@pytest.mark.parametrize("bits", [(1, 2), (2, 4), (3, 1)])
@pytest.mark.parametrize("dim", [64, 128])
def test_qjl(kernel_device: torch.device, dim: int, bits: tuple[int, int]) -> None:
    check_pages(kernel_device, PageLayout(dim, *bits, qjl=True))


@pytest.mark.parametrize("dim", [32, 64, 256, 512])
def test_head_dims(kernel_device: torch.device, dim: int) -> None:
    check_pages(kernel_device, PageLayout(dim, 3, 4), heads=1 if dim > 256 else 3, rows=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("balance", [True, False], ids=["balanced", "plain"])
@pytest.mark.parametrize("kind", ["none", "constant", "half", "interleaved", "half-32", "half-24", "interleaved-16"])
def test_centring(kernel_device: torch.device, kind: str, balance: bool, dtype: torch.dtype) -> None:
    check_pages(kernel_device, PageLayout(64, 3, 2), kind, balance, dtype, first=128)


@pytest.mark.parametrize("kind", ["half", "half-96", "half-64", "half-32", "interleaved-64"])
@pytest.mark.parametrize("heads", [1, 9], ids=["small", "large"])
def test_centring_at_128(kernel_device: torch.device, kind: str, heads: int) -> None:
    check_pages(kernel_device, PageLayout(128, 2, 2), kind, heads=heads, pages=2)


def test_padded_rows(kernel_device: torch.device) -> None:
    check_pages(kernel_device, PageLayout(64, 4, 3), rows=3, pages=2, first=64, starts=torch.tensor([0, 77, 5]))


@pytest.mark.parametrize(
    ("dim", "rotation", "qjl", "kind"),
    [
        pytest.param(96, "hadamard", False, "half", id="odd-factor"),
        pytest.param(64, "orthogonal", False, "half", id="haar"),
        pytest.param(64, "hadamard", False, "half-28", id="rotary-no-multiple-of-8"),
        pytest.param(160, "hadamard", False, "interleaved", id="five-units"),
        pytest.param(192, "hadamard", False, "none", id="six-units"),
        pytest.param(80, "hadamard", False, "half", id="paired-tokens"),
        pytest.param(100, "hadamard", True, "half", id="transposed-tokens"),
        pytest.param(96, "hadamard", True, "constant", id="qjl-odd-factor"),
    ],
)
def test_what_torch_prepares_or_writes(kernel_device: torch.device, dim: int, rotation: str, qjl: bool, kind: str) -> None:
    # torch's products of matrices depend on their shapes in the last bit, so a code in thousands may differ.
    layout = PageLayout(dim, 3, 2, qjl)
    codec, transform = PageCodec(layout, rotation, seed=3), transform_of(kind, 2, dim, True)  # type: ignore[arg-type]
    key, value = tokens(2, 2, PAGE_TOKENS, dim, torch.bfloat16)
    expected = reference(codec, transform, key, value)
    pool = torch.zeros(1, 2, 2, layout.page_bytes, dtype=torch.uint8, device=kernel_device)
    encode_pages(key.to(kernel_device), value.to(kernel_device), pool, codec=codec, transform=transform)
    assert (pool.cpu().permute(1, 2, 0, 3) != expected).float().mean() < 2e-3


def test_shared_scales(kernel_device: torch.device) -> None:
    layout = PageLayout(64, 3, 3)
    codec = PageCodec(layout, per_head_scale=False)
    key, value = tokens(2, 3, PAGE_TOKENS, 64)
    pool = torch.zeros(1, 2, 3, layout.page_bytes, dtype=torch.uint8, device=kernel_device)
    encode_pages(key.to(kernel_device), value.to(kernel_device), pool, codec=codec)
    expected = codec.encode(key, value)
    assert (pool.cpu().permute(1, 2, 0, 3) != expected).float().mean() < 1e-3


# -- slot mappings --------------------------------------------------------------------------------------------------------


def scatter(device: torch.device, layout: PageLayout, where: list[tuple[int, int]], heads: int, kind: str = "half") -> None:
    """Tokens (block, index) of several sequences into a pool of 5 blocks; block -1 is skipped."""
    codec, transform = PageCodec(layout, seed=1), transform_of(kind, heads, layout.head_dim, True)
    count = len(where)
    pages = 1 + max(index for _, index in where) // PAGE_TOKENS
    key, value = (x[0] for x in tokens(1, heads, count, layout.head_dim, torch.bfloat16))
    before = torch.randint(0, 256, (5, heads, layout.page_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    expected = before.clone()
    for n, (block, index) in enumerate(where):
        if block < 0:
            continue
        # The token in a page of its own, whose other tokens are then put in place one by one through the codec's layout.
        whole = [torch.zeros(1, heads, PAGE_TOKENS, layout.head_dim) for _ in range(2)]
        for x, new in zip(whole, (key, value), strict=True):
            x[0, :, index % PAGE_TOKENS] = new[:, n].float()
        page = reference(codec, transform, *whole, first=index // PAGE_TOKENS * PAGE_TOKENS)[0, :, 0]
        expected[block] = merge(layout, expected[block], page, index % PAGE_TOKENS)
    pool = before.clone().to(device)
    slots = torch.tensor([b * PAGE_TOKENS + i % PAGE_TOKENS if b >= 0 else -1 for b, i in where])
    index = torch.tensor([i for _, i in where], dtype=torch.int32)
    angles = None if transform.rotary is None else transform.rotary.page_angles(device).get(pages)
    # Views as a serving engine has them: (tokens, heads, dim), keys and values in one buffer.
    both = torch.stack((key, value), dim=2).permute(1, 0, 2, 3).contiguous().to(device)
    views = (both[:, :, i].transpose(0, 1)[None] for i in range(2))
    encode_pages(*views, pool, slots.to(device), codec=codec, transform=transform, token_index=index.to(device), angles=angles)
    assert torch.equal(pool.cpu(), expected)


def merge(layout: PageLayout, page: Tensor, other: Tensor, slot: int) -> Tensor:
    """``page`` (heads, bytes) with the token in ``slot`` from ``other``."""
    out = page.clone()
    parts = [(layout.key_offset, layout.key_bits), (layout.value_offset, layout.value_bits)]
    scales = [layout.key_scale_offset, layout.value_scale_offset]
    if layout.qjl:
        parts.append((layout.qjl_offset, 1))
        scales.append(layout.qjl_norm_offset)
    for at, bits in parts:
        part = slice(at, at + layout.codes_bytes(bits))
        codes = layout.unpack(page[:, part], bits)
        codes[:, slot] = layout.unpack(other[:, part], bits)[:, slot]
        out[:, part] = layout.pack(codes, bits)
    for at in scales:
        out[:, at + 2 * slot : at + 2 * slot + 2] = other[:, at + 2 * slot : at + 2 * slot + 2]
    return out


@pytest.mark.parametrize(
    "layout", [PageLayout(128, 3, 3), PageLayout(64, 4, 4), PageLayout(64, 2, 1, True), PageLayout(80, 3, 4)]
)
def test_single_tokens_leave_their_neighbours_alone(kernel_device: torch.device, layout: PageLayout) -> None:
    scatter(kernel_device, layout, [(3, 70), (-1, 9999), (0, 0), (4, 191), (3, 69), (1, 20 * 64 + 63)], heads=2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=max(5, settings().max_examples // 10))
@given(data=st.data(), heads=st.integers(1, 4), kind=st.sampled_from(["none", "constant", "half", "interleaved"]))
def test_any_slots(kernel_device: torch.device, data: st.DataObject, heads: int, kind: str) -> None:
    slots = data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 63)), min_size=1, max_size=70, unique=True))
    where = [(b, 64 * data.draw(st.integers(0, 30)) + s) for b, s in slots]
    skipped = data.draw(st.sets(st.integers(0, len(where) - 1)))
    scatter(
        kernel_device,
        PageLayout(64, 3, 3),
        [(-1, i) if n in skipped else (b, i) for n, (b, i) in enumerate(where)],
        heads,
        kind,
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=max(5, settings().max_examples // 10))
@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 5),
    pages=st.integers(1, 3),
    first=st.integers(0, 300),
    kind=st.sampled_from(["none", "half", "interleaved"]),
)
def test_any_shape(kernel_device: torch.device, rows: int, heads: int, pages: int, first: int, kind: str) -> None:
    check_pages(kernel_device, PageLayout(64, 2, 3), kind, rows=rows, heads=heads, pages=pages, first=first * PAGE_TOKENS)


def test_first_index_and_part_of_a_page(kernel_device: torch.device) -> None:
    # A page that is filled in two steps, the second page of its sequence.
    layout = PageLayout(64, 3, 3)
    codec, transform = PageCodec(layout), transform_of("half", 2, 64, True)
    key, value = tokens(2, 2, PAGE_TOKENS, 64, torch.float16)
    expected = reference(codec, transform, key, value, first=64).transpose(1, 2)[:, 0]
    pool = torch.zeros(1, 2, 2, layout.page_bytes, dtype=torch.uint8, device=kernel_device)
    slots = torch.arange(PAGE_TOKENS, device=kernel_device)
    for part in (slice(0, 20), slice(20, 64)):
        for row in (slice(0, 1), slice(1, 2)):
            encode_pages(
                key.to(kernel_device)[row, :, part],
                value.to(kernel_device)[row, :, part],
                pool[:, row.start],
                slots[part],
                codec=codec,
                transform=transform,
                first_index=64 + part.start,
            )
    assert torch.equal(pool[0].cpu(), expected)


# -- arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["transposed", "sliced", "unaligned", "expanded"])
def test_strides(kernel_device: torch.device, layout: str) -> None:
    pages = PageLayout(64, 3, 3)
    codec = PageCodec(pages)
    key, value = tokens(2, 2, PAGE_TOKENS, 64, torch.bfloat16)
    if layout == "expanded":
        key, value = (x[:, :1].expand(-1, 2, -1, -1) for x in (key, value))
    expected = codec.encode(key, value)
    k, v = key.to(kernel_device), value.to(kernel_device)
    if layout == "transposed":
        k, v = (x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3) for x in (k, v))
    elif layout == "sliced":
        k, v = (torch.cat((x, x), dim=-1)[..., 64:] for x in (k, v))
    elif layout == "unaligned":
        k, v = (torch.cat((x, x), dim=-1)[..., 1:65] for x in (k.roll(1, -1), v.roll(1, -1)))
    pool = torch.zeros(1, 2, 2, pages.page_bytes, dtype=torch.uint8, device=kernel_device)
    encode_pages(k, v, pool, codec=codec)
    assert torch.equal(pool.cpu().permute(1, 2, 0, 3), expected)


def test_nothing_to_do(kernel_device: torch.device) -> None:
    layout = PageLayout(64, 3, 3)
    empty = torch.zeros(1, 2, 0, 64, device=kernel_device)
    pool = torch.full((1, 1, 2, layout.page_bytes), 7, dtype=torch.uint8, device=kernel_device)
    encode_pages(empty, empty, pool, codec=PageCodec(layout))
    assert bool((pool == 7).all())


def test_refusals(kernel_device: torch.device) -> None:
    layout = PageLayout(64, 3, 3)
    codec, x = PageCodec(layout), torch.zeros(1, 2, 64, 64, device=kernel_device)
    pool = torch.zeros(1, 1, 2, layout.page_bytes, dtype=torch.uint8, device=kernel_device)
    slots = torch.arange(64, device=kernel_device)
    for match, key, value, where, how in [
        ("must be alike", x, x[:, :1], pool, {}),
        ("must be alike", x, x.half(), pool, {}),
        ("must be alike", x[..., :32], x[..., :32], pool, {}),
        ("float16, bfloat16 or float32", x.double(), x.double(), pool, {}),
        ("a pool is uint8", x, x, pool[..., 1:], {}),
        ("without slot_mapping", x, x, pool[0], {}),
        ("with slot_mapping", x, x, pool, {"slot_mapping": slots}),
        ("slot_mapping is torch.int64", x, x, pool[0], {"slot_mapping": slots.int()}),
        ("slot_mapping is torch.int64", x, x, pool[0], {"slot_mapping": slots[:5]}),
        ("needs angles", x, x, pool[0], {"slot_mapping": slots, "token_index": slots.int()}),
        ("angles are", x, x, pool, {"angles": torch.zeros(3, 1, 32, 2, device=kernel_device)}),
        ("angles are", x, x, pool, {"angles": torch.zeros(1, 1, 31, 2, device=kernel_device)}),
        ("do not reach token 127", x, x, pool, {"angles": torch.zeros(1, 1, 32, 2, device=kernel_device), "first_index": 64}),
    ]:
        with pytest.raises(ShapeError, match=match):
            encode_pages(key, value, where, codec=codec, transform=transform_of("half", 2, 64, False), **how)


def test_plans_do_not_keep_transforms_alive(kernel_device: torch.device) -> None:
    layout = PageLayout(64, 3, 3)
    transform = transform_of("half", 1, 64, True)
    x = torch.zeros(1, 1, 64, 64, device=kernel_device)
    pool = torch.zeros(1, 1, 1, layout.page_bytes, dtype=torch.uint8, device=kernel_device)
    encode_pages(x, x, pool, codec=PageCodec(layout), transform=transform)
    gone = weakref.ref(transform)
    del transform
    gc.collect()
    assert gone() is None


def test_params_are_copied_between_calls(kernel_device: torch.device) -> None:
    # Two calls with one plan: nothing of the first (slots, angles) is left in the second.
    layout = PageLayout(64, 3, 3)
    codec, transform = PageCodec(layout), transform_of("half", 2, 64, True)
    key, value = tokens(1, 2, PAGE_TOKENS, 64, torch.bfloat16)
    pool = torch.zeros(2, 2, layout.page_bytes, dtype=torch.uint8, device=kernel_device)
    k, v = key.to(kernel_device), value.to(kernel_device)
    encode_pages(k, v, pool, torch.arange(64, 128, device=kernel_device), codec=codec, transform=transform, first_index=640)
    encode_pages(k, v, pool[:1, None], codec=codec, transform=transform)
    expected = [reference(codec, transform, key, value, first)[0, :, 0] for first in (0, 640)]
    assert torch.equal(pool.cpu(), torch.stack(expected))
    assert EncodeStruct().slots is None
