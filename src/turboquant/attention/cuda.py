"""The CUDA back-end: the decode kernel for up to 16 new tokens, the extend kernel and flash attention for more."""

from __future__ import annotations

import weakref
from collections import OrderedDict

import torch
from torch import Tensor

from ..cache.kernels import kernels_run_on
from ..cache.layer import PackedLayer
from ..cuda import decode, extend
from ..cuda.decode_plan import DecodePlan
from ..cuda.pages import PackedPages
from .base import Backend, Call
from .mask import CausalMask
from .reference import attend_window

_FLASH_DTYPES = (torch.float16, torch.bfloat16)


_pages: weakref.WeakKeyDictionary[PackedLayer, tuple[Tensor | None, PackedPages]] = weakref.WeakKeyDictionary()


def packed_pages(layer: PackedLayer) -> PackedPages:
    """The pages of a layer as kernels are told of them; the same object until a page or the padding changes."""
    assert layer.transform is not None
    table, heads, size = layer.slabs.addresses(), layer.num_kv_heads, layer.layout.page_bytes
    starts, held = _pages.get(layer, (None, None))
    if (
        held is None
        or held.table is not table
        or starts is not layer.starts
        or held.transform is not layer.transform
        or (held.packed_len, held.first_page) != (layer.packed_tokens, layer.first_page)
    ):
        held = PackedPages(
            layer.codec,
            layer.transform,
            heads,
            table,
            layer.packed_tokens,
            row_stride=heads * size,
            head_stride=size,
            first_page=layer.first_page,
            starts=None if layer.starts is None else layer.starts.int(),
            angles=layer.page_angles(layer.packed_pages) if layer.transform.statistics is not None else None,
            rows=layer.batch_size,
        )
        _pages[layer] = layer.starts, held
    return held


def merge(parts: list[tuple[Tensor, Tensor]], sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over a context from (output, log-sum-exp) of its parts, and from logits that only enter the denominator."""
    lse = torch.stack([part[1] for part in parts])
    if sink_logits is not None:
        lse = torch.cat((lse, sink_logits.float()[None, None, :, None].expand(1, *lse.shape[1:])))
    total = lse.logsumexp(0)
    weights = (lse - total).exp().nan_to_num(0.0)
    out = torch.zeros((), device=total.device)
    for (part, _), weight in zip(parts, weights[: len(parts)], strict=True):
        out = out + part.float() * weight[..., None]
    return out, total


_plans: OrderedDict[tuple[object, ...], DecodePlan] = OrderedDict()
_PLANS_KEPT = 32


def _plan(pages: PackedPages, group: int, tokens: int, exact_tokens: int) -> DecodePlan:
    """The plan of a decode step, shared by all layers of one shape: launches of one stream run one after another."""
    layout = pages.codec.layout
    shape = (pages.rows, pages.num_kv_heads, group, tokens, layout, pages.center, pages.rotates)
    key = (pages.device, stream_of(pages.device), *shape, pages.packed_len, pages.first_page, exact_tokens)
    if key in _plans:
        _plans.move_to_end(key)
    else:
        assert isinstance(pages.packed_len, int)
        _plans[key] = decode.plan(pages, pages.packed_len, group, tokens, exact_tokens, rows=pages.rows)
        if len(_plans) > _PLANS_KEPT:
            _plans.popitem(last=False)
    return _plans[key]


def is_gpu(query: Tensor) -> bool:
    """Whether kernels may be asked for these queries."""
    return query.is_cuda


def stream_of(device: torch.device) -> int:
    """The stream on which kernels are launched."""
    return int(torch.cuda.current_stream(device).cuda_stream)


class CudaBackend(Backend):
    """Kernels of :mod:`turboquant.cuda`."""

    name = "cuda"

    def why_not(self, call: Call) -> str | None:
        """See :meth:`Backend.why_not`."""
        layer, query = call.layer, call.query
        if not is_gpu(query) or layer.packed_pages <= layer.first_page or not kernels_run_on(query.device):
            return ""
        mask = call.mask.plain()
        if mask is None or mask.first_query != layer.length - query.shape[2]:
            return "a mask that is not causal attention with padding on the left and a sliding window"
        if not _same_starts(mask, layer):
            return "a mask with other padding than the cache was told of"
        if query.dtype != layer.dtype:
            return f"queries are {query.dtype}, exact tokens {layer.dtype}"
        pages = packed_pages(layer)
        if query.shape[2] > decode.MAX_QUERY_TOKENS:
            return extend.why_not(pages)
        return decode.supports(pages, query.dtype, query.shape[1] // layer.num_kv_heads, query.shape[2])

    def attend(self, call: Call) -> tuple[Tensor, Tensor]:
        """See :meth:`Backend.attend`."""
        mask = call.mask.plain()
        assert mask is not None
        return (_decode if call.query.shape[2] <= decode.MAX_QUERY_TOKENS else _extend)(call, mask)


def _same_starts(mask: CausalMask, layer: PackedLayer) -> bool:
    if mask.starts is None or layer.starts is None:
        return mask.starts is layer.starts
    return mask.starts is layer.starts or torch.equal(mask.starts.to(layer.starts), layer.starts)


def _decode(call: Call, mask: CausalMask) -> tuple[Tensor, Tensor]:
    query, layer = call.query, call.layer
    if query.stride(3) != 1:
        query = query.contiguous()
    b, hq, t, d = query.shape
    pages = packed_pages(layer)
    tail, first = layer.tail()
    sinks = layer.sinks()
    exact = decode.ExactTokens(tail[0], tail[1], first, None if sinks is None else (sinks[0], sinks[1]))
    group = hq // layer.num_kv_heads
    work = _plan(pages, group, t, layer.config.recent_tokens + 64 + layer.sink_tokens)
    out = torch.empty((b, t, hq, d), dtype=query.dtype, device=query.device).transpose(1, 2)
    lse = torch.empty((b, hq, t), dtype=torch.float32, device=query.device)
    logits = None if call.sink_logits is None else call.sink_logits.float().contiguous()
    decode.run(query, pages, exact, layer.length, work, out, lse, call.scaling, call.softcap, mask.sliding_window, logits)
    return out, lse


def _extend(call: Call, mask: CausalMask) -> tuple[Tensor, Tensor]:
    query, layer = call.query, call.layer
    sinks = layer.sinks()
    packed = extend.extend(
        query,
        packed_pages(layer),
        scaling=call.scaling,
        softcap=call.softcap,
        first_query=mask.first_query,
        sliding_window=mask.sliding_window,
        hidden_sinks=0 if sinks is None else layer.sink_tokens,
    )
    plain = call.softcap is None and mask.sliding_window is None and mask.starts is None
    if plain and query.dtype in _FLASH_DTYPES and query.shape[3] <= 256:
        exact = _flash(query, layer, call.scaling)
    else:
        exact = attend_window(query, layer, call.mask, call.scaling, call.softcap)
    out, lse = merge([packed, exact], call.sink_logits)
    return out.to(query.dtype), lse


def _flash(query: Tensor, layer: PackedLayer, scaling: float) -> tuple[Tensor, Tensor]:
    """Flash attention over sinks, tail and new tokens: a causal square, with queries of no interest for the old tokens."""
    key, value = layer.exact(layer.packed_tokens, layer.length)
    if (sinks := layer.sinks()) is not None:
        held = min(layer.sink_tokens, layer.packed_tokens)
        key, value = (torch.cat((s[:, :, :held], x), dim=2) for s, x in zip(sinks[:2], (key, value), strict=True))
    t, n = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    square = query.new_zeros(query.shape[0], query.shape[1], n, query.shape[3])
    square[:, :, n - t :] = query
    found = torch.ops.aten._scaled_dot_product_flash_attention(square, key, value, 0.0, True, False, scale=scaling)
    return found[0][:, :, n - t :], found[1][:, :, n - t : n].float()
