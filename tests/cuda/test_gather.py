"""Pages back to keys and values, and page bytes to and from a buffer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from turboquant.codec.layout import PAGE_TOKENS
from turboquant.cuda.gather import copy_pages, gather
from turboquant.errors import ShapeError

from .packed import Case, Packed, make

CASES = [
    Case(center=0),
    Case(center=1),
    Case(center=2),
    Case(pairing="interleaved", rotary_dim=32, starts=(5, 70)),
    Case(balance=False, addresses=True),
    Case(dim=32, key_bits=1, value_bits=1, packed_len=(3, 128), max_pages=3),
    Case(dim=64, key_bits=2, value_bits=4, qjl=True),
    Case(dim=128, key_bits=4, value_bits=3, rotary_dim=64, first_page=2, packed_len=200),
    Case(dim=256, key_bits=3, value_bits=2, qjl=True, heads=1),
    Case(dim=512, key_bits=4, value_bits=4, heads=1, rows=1),
    # torch rotates
    Case(dim=96, key_bits=2, value_bits=2, qjl=True, packed_len=(70, 0)),
    Case(dim=192, key_bits=4, value_bits=1, center=2, heads=1),
    Case(dim=64, key_bits=2, value_bits=4, rotation="orthogonal", max_pages=18, heads=1),
    # torch does it all
    Case(dim=80, key_bits=3, value_bits=4, qjl=True, packed_len=(70, 0)),
    Case(dim=64, rotary_dim=6, center=1),
]


def expected(case: Case, packed: Packed) -> tuple[Tensor, Tensor]:
    index = case.first_page * PAGE_TOKENS + torch.arange(packed.key.shape[2])
    beyond = (index >= case.lens[:, None])[:, None, :, None]
    return packed.key.masked_fill(beyond, 0.0), packed.value.masked_fill(beyond, 0.0)


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return bool((got.double().cpu() - want).abs().max() <= tolerance * want.abs().max())


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c)[:140])
def test_gather(case: Case, kernel_device: torch.device) -> None:
    packed = make(case, kernel_device)
    want = expected(case, packed)
    shape = want[0].shape
    # fp16 and bf16 round once more: 11 and 8 bits.
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        poison = [torch.full(shape, float("nan"), dtype=dtype, device=kernel_device) for _ in range(2)]
        held = slice(0, int(case.lens.max()) - case.first_page * PAGE_TOKENS)
        out = gather(packed.pages, dtype=dtype, stop=int(case.lens.max()), out=(poison[0][:, :, held], poison[1][:, :, held]))
        for got, all_of_it, right in zip(out, poison, want, strict=True):
            assert close(got, right[:, :, held], tolerance)
            assert bool(all_of_it[:, :, held.stop :].isnan().all())


def test_range_and_strides(kernel_device: torch.device) -> None:
    case = Case(center=1, max_pages=4)
    packed = make(case, kernel_device)
    key, value = gather(packed.pages, dtype=torch.float32, start=64, stop=150)
    assert key.shape == (2, 2, 86, 64)
    assert close(key, packed.key[:, :, 64:150], 1e-5) and close(value, packed.value[:, :, 64:150], 1e-5)
    # (batch, tokens, heads, dim) memory, as engines keep it; and one whose numbers are not neighbours.
    for spread in (
        torch.zeros(2, 256, 2, 64, device=kernel_device),
        torch.zeros(2, 256, 2, 128, device=kernel_device)[..., ::2],
    ):
        k, v = spread.clone().transpose(1, 2), spread.transpose(1, 2)
        gather(packed.pages, dtype=torch.float32, out=(k, v))
        assert close(k, packed.key, 1e-5) and close(v, packed.value, 1e-5)
    empty, _ = gather(packed.pages, dtype=torch.float32, start=64, stop=64)
    assert empty.shape == (2, 2, 0, 64)


def test_gather_refuses(kernel_device: torch.device) -> None:
    pages = make(Case(first_page=1), kernel_device).pages
    for start, stop in ((0, 64), (65, 128), (128, 64), (64, 300)):
        with pytest.raises(ShapeError, match="cannot be read"):
            gather(pages, dtype=torch.float32, start=start, stop=stop)
    with pytest.raises(ShapeError, match="float64"):
        gather(pages, dtype=torch.float64)
    wrong = torch.zeros(2, 2, 64, 64, device=kernel_device)
    with pytest.raises(ShapeError, match="128, 64"):
        gather(pages, dtype=torch.float32, out=(wrong, wrong))
    with pytest.raises(ShapeError, match="hold addresses"):
        gather(replace(pages, pool=None), dtype=torch.float32)
    with pytest.raises(ShapeError, match="starts"):
        gather(replace(pages, starts=torch.zeros(3, dtype=torch.int32)), dtype=torch.float32)


@pytest.mark.parametrize("dim", [64, 72, 33])
def test_copy_pages(dim: int, kernel_device: torch.device) -> None:
    case = Case(dim=dim, center=0, max_pages=3, first_page=1, packed_len=(130, 256), key_bits=2, value_bits=4)
    packed = make(case, kernel_device)
    size = packed.pages.codec.layout.page_bytes
    held = packed.pool[packed.blocks.to(kernel_device)].transpose(0, 1)  # (pages, rows, heads, bytes)
    buffer = torch.full((3, 2, 2, size), 7, dtype=torch.uint8, device=kernel_device)
    copy_pages(packed.pages, buffer)
    assert torch.equal(buffer[0], held[0]) and torch.equal(buffer[:, 1], held[:, 1])
    assert torch.equal(buffer[1, 0], held[1, 0])  # its last tokens are not in use, but the page is
    assert not bool(buffer[2, 0].any())
    part = torch.zeros(1, 2, 2, size, dtype=torch.uint8, device=kernel_device)
    copy_pages(packed.pages, part, start=2)
    assert torch.equal(part[0], held[1])

    # and back, into a pool of other contents
    before = packed.pool.clone()
    packed.pool.fill_(9)
    copy_pages(packed.pages, buffer, to_pages=True)
    used = torch.zeros(packed.pool.shape[0], dtype=torch.bool)
    used[packed.blocks] = True
    used[packed.blocks[0, 2]] = False
    used = used.to(kernel_device)
    assert torch.equal(packed.pool[used], before[used]) and bool((packed.pool[~used] == 9).all())


def test_copy_refuses(kernel_device: torch.device) -> None:
    pages = make(Case(), kernel_device).pages
    size = pages.codec.layout.page_bytes
    with pytest.raises(ShapeError, match="not held"):
        copy_pages(pages, torch.zeros(3, 2, 2, size, dtype=torch.uint8, device=kernel_device))
    with pytest.raises(ShapeError, match="uint8"):
        copy_pages(pages, torch.zeros(2, 2, 2, size, device=kernel_device))
    with pytest.raises(ShapeError, match="multiples of 8"):
        copy_pages(pages, torch.zeros(2, 2, 2, size + 1, dtype=torch.uint8, device=kernel_device)[..., 1:])
