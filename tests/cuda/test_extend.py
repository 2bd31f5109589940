"""The extend kernel against float64 attention over the dequantized pages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from turboquant.codec.layout import PAGE_TOKENS
from turboquant.cuda.extend import extend, why_not
from turboquant.errors import ShapeError

from .packed import Case, Packed, make


@dataclass(frozen=True)
class Ask:
    """One call."""

    tokens: int = 17
    group: int = 1
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = torch.float32
    softcap: float | None = None
    first_query: int | tuple[int, ...] = 0
    sliding_window: int | None = None
    hidden_sinks: int = 0
    splits: int | None = None
    shape: tuple[int, int] | None = None


def expected(case: Case, packed: Packed, query: Tensor, ask: Ask, scaling: float) -> tuple[Tensor, Tensor]:
    q, key, value = query.double().cpu(), *(x.repeat_interleave(ask.group, 1) for x in (packed.key, packed.value))
    score = q @ key.transpose(-1, -2) * scaling
    if ask.softcap is not None:
        score = ask.softcap * (score / ask.softcap).tanh()
    index = case.first_page * PAGE_TOKENS + torch.arange(key.shape[2])
    low = torch.tensor(case.starts or [0] * case.rows)[:, None].expand(-1, ask.tokens) + ask.hidden_sinks
    if ask.sliding_window is not None:
        here = torch.as_tensor(ask.first_query).expand(case.rows)[:, None] + torch.arange(ask.tokens)
        low = torch.maximum(low, here - ask.sliding_window + 1)
    seen = (index >= low[..., None]) & (index < case.lens[:, None, None])
    score = score.masked_fill(~seen[:, None], float("-inf"))
    lse = score.logsumexp(-1)
    p = (score - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return p @ value.nan_to_num(), lse


def check(case: Case, ask: Ask, device: torch.device, monkeypatch: pytest.MonkeyPatch, tolerance: float = 2e-3) -> None:
    packed = make(case, device)
    g = torch.Generator().manual_seed(1)
    # Queries of a model: (batch, tokens, heads, head_dim), seen with two axes exchanged.
    query = torch.randn(case.rows, ask.tokens, case.heads * ask.group, case.dim, generator=g)
    query = query.to(device, ask.dtype).transpose(1, 2)
    scaling = case.dim**-0.5 / 2
    first: Any = ask.first_query
    if isinstance(first, tuple):
        first = torch.tensor(first, dtype=torch.int32, device=device)

    def poisoned(like: Tensor, size: Any, **kwargs: Any) -> Tensor:
        return torch.full(size, float("nan"), device=like.device, dtype=kwargs.get("dtype", like.dtype))

    with monkeypatch.context() as m:
        m.setattr(torch.Tensor, "new_empty", poisoned)
        out, lse = extend(
            query,
            packed.pages,
            scaling=scaling,
            softcap=ask.softcap,
            first_query=first,
            sliding_window=ask.sliding_window,
            hidden_sinks=ask.hidden_sinks,
            out_dtype=ask.out_dtype,
            splits=ask.splits,
            shape=ask.shape,
        )
    want, want_lse = expected(case, packed, query, ask, scaling)
    assert out.shape == query.shape and out.dtype == (ask.out_dtype or ask.dtype)
    assert lse.shape == query.shape[:3] and lse.dtype == torch.float32
    seen = want_lse > float("-inf")
    assert torch.equal(lse.cpu() > float("-inf"), seen) and not bool(out.cpu()[~seen].any())
    error = (out.double().cpu() - want).norm() / want.norm().clamp_min(1e-30)
    assert error <= tolerance
    if seen.any():
        assert (lse.double().cpu() - want_lse)[seen].abs().max() <= 5e-3


CASES = [
    (Case(center=0, balance=False), Ask(130, 4)),
    (Case(center=1), Ask(64, 4)),
    (Case(center=1, pairing="interleaved", rotary_dim=32, starts=(5, 70)), Ask(17, 7, shape=(8, 2))),
    (Case(center=2), Ask(64, 1, torch.float16)),
    (Case(dim=32, key_bits=1, value_bits=1), Ask(130, 1)),
    (Case(dim=32, key_bits=1, value_bits=2, qjl=True), Ask(17, 4, torch.bfloat16)),
    (Case(dim=64, key_bits=2, value_bits=4, qjl=True, balance=False), Ask(64, 4)),
    (Case(dim=96, key_bits=4, value_bits=3, qjl=True, rotary_dim=20), Ask(17, 4)),
    (Case(dim=96, key_bits=2, value_bits=2, center=2), Ask(17, 4, torch.float16)),
    (Case(dim=128, key_bits=3, value_bits=3, rows=1), Ask(64, 4, torch.bfloat16, shape=(8, 2))),
    (Case(dim=128, key_bits=4, value_bits=4, rotary_dim=64, pairing="interleaved", rows=1), Ask(64, 1, shape=(4, 2))),
    (Case(dim=128, key_bits=2, value_bits=3, rotation="orthogonal", qjl=True, rows=1), Ask(17, 4)),
    (Case(dim=192, key_bits=3, value_bits=2, rows=1), Ask(17, 4)),
    (Case(dim=256, key_bits=4, value_bits=4, rows=1, heads=1), Ask(17, 4, softcap=4.0)),
]


@pytest.mark.parametrize(("case", "ask"), CASES, ids=lambda x: str(x)[:120])
def test_attention(case: Case, ask: Ask, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, ask, kernel_device, monkeypatch)


# One specialisation, everything that is chosen at the launch.
PLAIN = Case(center=1, max_pages=5, heads=1)
LAUNCHES = [
    (PLAIN, Ask(17, 4, splits=3)),
    (PLAIN, Ask(17, 4, splits=32)),
    (replace(PLAIN, packed_len=0), Ask(17)),
    (replace(PLAIN, packed_len=0), Ask(17, splits=2)),
    (replace(PLAIN, packed_len=(64, 131)), Ask(17)),
    (replace(PLAIN, packed_len=(1, 320), addresses=True), Ask(64, 1, splits=2)),
    (replace(PLAIN, first_page=3, packed_len=480, starts=(0, 100)), Ask(17)),
    (PLAIN, Ask(70, first_query=330, sliding_window=150)),
    (PLAIN, Ask(70, first_query=(320, 400), sliding_window=90, splits=3)),
    (PLAIN, Ask(17, first_query=5000, sliding_window=100)),
    (replace(PLAIN, starts=(0, 61)), Ask(17, 4, hidden_sinks=4)),
    (replace(PLAIN, starts=(0, 300)), Ask(17, 1, hidden_sinks=30, first_query=320, sliding_window=40)),
    (replace(PLAIN, key_scale=6.0), Ask(17)),
    (replace(PLAIN, value_scale=1e-3), Ask(17)),
    (replace(PLAIN, value_scale=1e3), Ask(17)),
]


@pytest.mark.parametrize(("case", "ask"), LAUNCHES, ids=lambda x: str(x)[:160])
def test_launches(case: Case, ask: Ask, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, ask, kernel_device, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 2])
def test_output_of_the_models_dtype(
    dtype: torch.dtype, splits: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Ask(17, 4, dtype, out_dtype=None, splits=splits)
    check(Case(heads=1), ask, kernel_device, monkeypatch, tolerance=5e-3)


def test_copy_engine_of_older_gpus(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from turboquant.cuda import jit

    get = jit.get_kernel
    monkeypatch.setattr(jit, "get_kernel", lambda source, defines, device: get(source, {**defines, "TQ_NO_BULK": 1}, device))
    check(replace(PLAIN, packed_len=(64, 131)), Ask(17, 4), kernel_device, monkeypatch)


def test_no_queries(kernel_device: torch.device) -> None:
    packed = make(Case(), kernel_device)
    out, lse = extend(torch.zeros(2, 2, 0, 64, device=kernel_device), packed.pages, scaling=1.0)
    assert out.shape == (2, 2, 0, 64) and lse.shape == (2, 2, 0)


def test_refuses(kernel_device: torch.device) -> None:
    pages = make(Case(), kernel_device).pages
    query = torch.zeros(2, 2, 17, 64, device=kernel_device)
    for bad, message in (
        (query.double(), "float64"),
        (query[..., :32], "64"),
        (query[:, :1], "KV heads"),
        (query[:1], "1"),
    ):
        with pytest.raises(ShapeError, match=message):
            extend(bad, pages, scaling=1.0)
    with pytest.raises(ShapeError, match="splits=33"):
        extend(query, pages, scaling=1.0, splits=33)
    with pytest.raises(ShapeError, match="first_query"):
        extend(query, pages, scaling=1.0, first_query=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ShapeError, match="2 rows"):
        extend(query[:1], pages, scaling=1.0)
    odd = make(Case(dim=80, center=0), kernel_device).pages
    assert "80" in str(why_not(odd)) and why_not(pages) is None
    with pytest.raises(ShapeError, match="head_dim=80"):
        extend(torch.zeros(2, 2, 17, 80, device=kernel_device), odd, scaling=1.0)
    assert "multiple of 4" in str(why_not(make(Case(rotary_dim=6), kernel_device).pages))
    assert "16 bytes" in str(why_not(replace(pages, head_stride=8)))
    with pytest.raises(ShapeError, match="shape"):
        extend(query, pages, scaling=1.0, shape=(3, 1))
