"""Decode attention on packed pages against float64 attention over the dequantized tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from turboquant import Rotary
from turboquant.codec.center import KeyStatistics, KeyTransform
from turboquant.codec.layout import PAGE_TOKENS, PageLayout
from turboquant.codec.page import PageCodec
from turboquant.cuda import decode
from turboquant.cuda.pages import PackedPages
from turboquant.errors import ShapeError


@dataclass
class Case:
    """One decode step: every row has packed pages, exact sinks and an exact window that ends with the new tokens."""

    dim: int = 64
    key_bits: int = 3
    value_bits: int = 3
    qjl: bool = False
    packed: tuple[int, ...] = (192, 192)
    window: int = 70
    sinks: int = 4
    heads: int = 2
    group: int = 4
    tokens: int = 1
    dtype: torch.dtype = torch.float16
    center: str = "half"  # or interleaved, partial, constant, none
    balance: bool = True
    rotation: str = "hadamard"
    softcap: float | None = None
    sliding: int | None = None
    starts: tuple[int, ...] | None = None
    sink_logits: bool = False
    offset: float = 2.0  # standard deviation of the keys' mean, in units of their own
    seed: int = 0


def transform_of(case: Case, g: torch.Generator) -> KeyTransform:
    if case.center == "none":
        return KeyTransform(None, None)
    mean = torch.randn(case.heads, case.dim, generator=g) * case.offset
    balance = (torch.randn(case.heads, case.dim, generator=g) * 0.3).exp() if case.balance else None
    rotary = None
    if case.center != "constant":
        pairs = case.dim // (4 if case.center == "partial" else 2)
        freq = 1e4 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        rotary = Rotary(freq, "interleaved" if case.center == "interleaved" else "half")
    return KeyTransform(KeyStatistics(mean, balance), rotary)


def run(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, expected out, expected lse)."""
    g = torch.Generator().manual_seed(case.seed)
    d, rows = case.dim, len(case.packed)
    codec = PageCodec(PageLayout(d, case.key_bits, case.value_bits, case.qjl), case.rotation, seed=1)
    transform = transform_of(case, g)
    pages = [-(-n // PAGE_TOKENS) for n in case.packed]
    most = max(pages)
    starts = torch.tensor(case.starts or (0,) * rows, dtype=torch.int32)
    blocks = sum(pages) + 3
    table = torch.full((rows, most + 2), 10**6, dtype=torch.int32)  # what is not held may be anything
    order = torch.randperm(blocks, generator=g).int()
    pool = torch.randint(0, 256, (blocks, case.heads, codec.layout.page_bytes), generator=g, dtype=torch.uint8)
    seq = max(case.packed) + case.window
    keys = torch.zeros(rows, case.heads, seq, d, dtype=torch.float64)
    values = torch.zeros_like(keys)
    seen = torch.zeros(rows, seq, dtype=torch.bool)
    window = torch.randn(2, rows, case.window + 5, case.heads, d, generator=g).to(case.dtype).transpose(2, 3)
    sinks = torch.randn(2, rows, case.heads, max(case.sinks, 1), d, generator=g).to(case.dtype)
    seq_lens = torch.tensor([n + case.window for n in case.packed], dtype=torch.int32)
    used = 0
    for r, n in enumerate(case.packed):
        if pages[r]:
            position = torch.arange(pages[r] * PAGE_TOKENS)[None] - int(starts[r])
            raw = torch.randn(1, case.heads, pages[r] * PAGE_TOKENS, d, generator=g)
            raw = raw * torch.rand(1, case.heads, raw.shape[2], 1, generator=g).add(0.5)
            offset = transform.offset(position)
            packed = codec.encode(
                transform.forward(raw if offset is None else raw + offset, position), torch.randn(raw.shape, generator=g)
            )
            mine = order[used : used + pages[r]]
            used += pages[r]
            table[r, : pages[r]] = mine
            pool[mine.long()] = packed[0].transpose(0, 1)
            k, v = codec.dequantize(packed)
            keys[r, :, :n], values[r, :, :n] = transform.inverse(k, position)[0, :, :n], v[0, :, :n]
        held = max(0, min(case.sinks, n - int(starts[r])))
        for part, source in ((keys, sinks[0]), (values, sinks[1])):
            part[r, :, int(starts[r]) : int(starts[r]) + held] = source[r, :, :held]
        keys[r, :, n : n + case.window] = window[0, r, :, : case.window]
        values[r, :, n : n + case.window] = window[1, r, :, : case.window]
        seen[r, int(starts[r]) : n + case.window] = True
    hq = case.heads * case.group
    wide = torch.randn(rows, case.tokens, hq + 1, d, generator=g).to(case.dtype)
    query = wide[:, :, 1:].transpose(1, 2)
    logits = torch.randn(hq, generator=g) if case.sink_logits else None
    scaling = d**-0.5
    scores = (
        torch.einsum("bhgtd,bhsd->bhgts", query.double().view(rows, case.heads, case.group, case.tokens, d), keys) * scaling
    )
    if case.softcap:
        scores = (scores / case.softcap).tanh() * case.softcap
    index = torch.arange(seq)
    at = seq_lens[:, None].long() - case.tokens + torch.arange(case.tokens)
    ok = seen[:, None] & (index <= at[..., None])
    if case.sliding:
        ok &= index > at[..., None] - case.sliding
    scores = scores.masked_fill(~ok[:, None, None], float("-inf")).flatten(1, 2)
    everything = (
        scores
        if logits is None
        else torch.cat((scores, logits.double()[None, :, None, None].expand(rows, -1, case.tokens, 1)), -1)
    )
    lse = everything.logsumexp(-1)
    p = (scores - lse[..., None]).exp().nan_to_num(0.0)
    expected = torch.einsum("bhgts,bhsd->bhgtd", p.view(rows, case.heads, case.group, case.tokens, seq), values).flatten(1, 2)

    angles = None
    if transform.rotary is not None:
        angles = transform.rotary.page_angles(device, starts if case.starts else None).get(most + 2)
    packed_pages = PackedPages(
        codec, transform, case.heads, table.to(device), torch.tensor(case.packed, dtype=torch.int32, device=device),
        pool=(pool := pool.to(device)), block_stride=pool.stride(0), head_stride=pool.stride(1),
        starts=starts.to(device) if case.starts else None, angles=angles,
    )  # fmt: skip
    exact = None
    if case.window:
        w = window.to(device)
        held_sinks = (sinks[0].to(device), sinks[1].to(device)) if case.sinks else None
        exact = decode.ExactTokens(w[0], w[1], None, held_sinks)
    work = decode.plan(packed_pages, case.packed, case.group, case.tokens, case.window + case.sinks if case.window else 0)
    out = torch.full((rows, hq, case.tokens, d), float("nan"), dtype=case.dtype, device=device)
    got_lse = torch.full((rows, hq, case.tokens), float("nan"), device=device)
    for _ in range(2):  # the second run finds the counters as the first left them
        out.fill_(float("nan"))
        decode.run(
            query.to(device), packed_pages, exact, seq_lens.to(device), work, out, got_lse, scaling, case.softcap,
            case.sliding, None if logits is None else logits.to(device),
        )  # fmt: skip
    return out.cpu().double(), got_lse.cpu().double(), expected, lse


def check(case: Case, device: torch.device, bound: float = 2e-3) -> None:
    out, lse, expected, expected_lse = run(case, device)
    assert not out.isnan().any()
    none = expected_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), none)
    assert bool((out[none] == 0).all())
    error = (out - expected).norm() / expected.norm().clamp_min(1e-30)
    # Rounding the result to bf16 alone is an error of 1.7e-3.
    assert error <= (3e-3 if case.dtype == torch.bfloat16 else bound), f"relative error {error:.2e}"
    assert ((lse - expected_lse)[~none] / expected_lse[~none].abs().clamp_min(1)).abs().max() < 2e-3


@pytest.mark.parametrize("value_bits", [1, 2, 3, 4])
@pytest.mark.parametrize("key_bits", [1, 2, 3, 4])
def test_bits(key_bits: int, value_bits: int, kernel_device: torch.device) -> None:
    check(Case(key_bits=key_bits, value_bits=value_bits), kernel_device)


@pytest.mark.parametrize("dim", [32, 96, 128, 160, 256])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(2, 1), (1, 2), (2, 2)])
def test_codes_without_look_up(key_bits: int, value_bits: int, dim: int, kernel_device: torch.device) -> None:
    # Which lane has which bits of a word depends on the dims: segments of 128, 64 and 32.
    check(Case(dim=dim, key_bits=key_bits, value_bits=value_bits, packed=(130, 64), window=20), kernel_device)


CHANGES: list[dict[str, object]] = [
    {"dim": 32},
    {"dim": 96},
    {"dim": 96, "rotation": "orthogonal"},
    {"dim": 128, "group": 7},
    {"dim": 128, "key_bits": 4, "value_bits": 4, "tokens": 2},
    {"dim": 128, "center": "none"},
    {"dim": 160},
    {"dim": 224},
    {"dim": 256},
    {"center": "none"},
    {"center": "constant"},
    {"center": "interleaved"},
    {"center": "partial"},
    {"balance": False},
    {"qjl": True, "key_bits": 2},
    {"qjl": True, "key_bits": 3, "dim": 128},
    {"softcap": 20.0},
    {"sliding": 100},
    {"sliding": 20},
    {"starts": (0, 70)},
    {"starts": (130, 3), "sinks": 2},
    {"starts": (190, 262), "window": 70},
    {"sink_logits": True},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float32},
    {"group": 1},
    {"group": 7},
    {"group": 8},
    {"group": 16},
    {"group": 3, "tokens": 5},
    {"group": 4, "tokens": 16, "window": 40},
    {"tokens": 4, "sliding": 90, "starts": (10, 0)},
    {"packed": (0, 0)},
    {"packed": (1, 0, 63, 64, 65)},
    {"packed": (700, 20, 333), "window": 3},
    {"packed": (64,), "window": 200, "heads": 1, "group": 2},
    {"packed": (4097, 5), "heads": 1, "window": 9},
    {"window": 0, "sinks": 0},
    {"window": 0, "sinks": 0, "packed": (0, 130)},
    {"sinks": 0},
    {"window": 1},
    {"offset": 10.0},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()))
def test_shapes_and_features(change: dict[str, object], kernel_device: torch.device) -> None:
    check(dataclasses.replace(Case(), **change), kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("packed", [(0, 1, 63, 64, 65, 4097), (131072, 777)], ids=str)
def test_long_contexts(dim: int, packed: tuple[int, ...]) -> None:
    check(Case(dim=dim, packed=packed, window=150, dtype=torch.bfloat16, seed=7), torch.device("cuda"))


def test_blocks_with_many_entries(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few blocks go through many items each, and cut some of them."""
    for blocks in (1, 2, 5):
        monkeypatch.setattr(decode.jit, "multiprocessors", lambda device, n=blocks: n)
        check(Case(packed=(700, 20, 333), heads=3), kernel_device)


def test_wrong_input_is_refused(kernel_device: torch.device) -> None:
    with pytest.raises(ShapeError, match="17 new tokens"):
        run(Case(tokens=17, window=40), kernel_device)
    with pytest.raises(ShapeError, match="head_dim 80"):
        run(Case(dim=80), kernel_device)
