"""Attention over packed pages in plain torch: the statement of what every kernel computes.

Pages are streamed: at most ``BLOCK_PAGES`` pages (1,024 tokens) are decoded at a time, folded into an online softmax and
forgotten, so the whole cache is never dequantized. Per call the extra memory is at most

    batch * kv_heads * 1024 * head_dim * 24 bytes              decoded levels of K and V, their codes and look-up indices
  + 3 * batch * heads * min(queries, 256) * 1024 * 4 bytes     scores, probabilities and the centring term
  + batch * kv_heads * 1024 * head_dim * 16 bytes              with centred keys: offsets of the block
  + 2 * batch * heads * queries * head_dim * 4 bytes           rotated queries and the accumulator

whatever the context length (measured peaks are 10-20 % below). Scores use the rotated query, so pages are never rotated
back: values accumulate in the rotated domain and the inverse rotation is applied once to the output. With centred keys the
term q . R_p mu is added per page of start p0 as (R_{-p0} q) . (R_j mu), j < 64: one rotation of q per page against a fixed
table, and no bytes from the cache. (Calls with many queries add R_p mu to the decoded block instead, which is the same sum
in another order.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.layer import BLOCK_PAGES, PackedLayer
from ..codec.center import KeyTransform
from ..codec.layout import PAGE_TOKENS
from ..codec.page import Decoded
from .mask import Mask

_QUERY_BLOCK = 256
_KEY_BLOCK = BLOCK_PAGES * PAGE_TOKENS
#: With more query rows per KV head than this it is cheaper to add the centring to the block's keys (1,024 rotations) than to
#: turn every query back to each of its 16 pages and multiply twice.
_MANY_ROWS = 64


class _Softmax:
    """Online softmax over blocks of keys, float32 (Milakov and Gimelshein 2018)."""

    def __init__(self, batch: int, kv_heads: int, group: int, queries: int, dim: int, device: torch.device) -> None:
        shape = (batch, kv_heads, group, queries)
        self.top = torch.full(shape, float("-inf"), device=device)
        self.total = torch.zeros(shape, device=device)
        self.out = torch.zeros(*shape, dim, device=device)

    def add(self, q0: int, q1: int, scores: Tensor, values: Tensor, value_scale: Tensor | None = None) -> None:
        """Fold in ``scores`` (batch, kv heads, group, q1 - q0, keys) and ``values`` (batch, kv heads, keys, dim)."""
        old = self.top[..., q0:q1]
        top = torch.maximum(old, scores.amax(-1))
        base = torch.where(top == float("-inf"), torch.zeros_like(top), top)
        p = (scores - base[..., None]).exp()
        shrink = (old - base).exp()
        self.top[..., q0:q1] = top
        self.total[..., q0:q1] = self.total[..., q0:q1] * shrink + p.sum(-1)
        if value_scale is not None:
            p = p * value_scale[:, :, None, None, :]
        b, h, g, t, n = p.shape
        part = (p.view(b, h, g * t, n) @ values).view(b, h, g, t, -1)
        self.out[..., q0:q1, :] = self.out[..., q0:q1, :] * shrink[..., None] + part

    def finish(self, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """(output, log-sum-exp); rows that saw nothing are zero and -inf."""
        total, top = self.total, self.top
        if sink_logits is not None:
            sink = sink_logits.float().view(1, total.shape[1], total.shape[2], 1)
            base = torch.maximum(top, sink)
            shrink = (top - base).exp()
            total = total * shrink + (sink - base).exp()
            out = self.out * (shrink / total)[..., None]
            return out, base + total.log()
        safe = torch.where(total > 0, total, torch.ones_like(total))
        return self.out / safe[..., None], top + total.log()


def _apply_mask(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    h, g = scores.shape[1:3]
    mask = mask[:, :, None] if mask.shape[1] == 1 else mask.view(mask.shape[0], h, g, *mask.shape[2:])
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask.float()


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else (scores / softcap).tanh() * softcap


class _Center:
    """The term q . R_p mu of packed keys."""

    def __init__(self, transform: KeyTransform, device: torch.device) -> None:
        self.rotary = transform.rotary
        self.table = transform.offset(torch.arange(PAGE_TOKENS, device=device)[None])  # (1, heads, 64, dim)

    def scores(self, query: Tensor, page_positions: Tensor) -> Tensor | None:
        """Term for ``query`` (batch, kv heads, rows, dim) and pages that start at ``page_positions`` (rows, pages)."""
        if self.table is None:
            return None
        if self.rotary is None:
            constant = query @ self.table[0, :, 0, :, None]
            return constant.expand(-1, -1, -1, page_positions.shape[1] * PAGE_TOKENS)
        cos, sin = self.rotary.cos_sin(page_positions)
        turned = self.rotary.apply(query[:, :, :, None], cos[:, None, None], -sin[:, None, None])
        b, h, r, n, d = turned.shape
        return (turned.view(b, h, r * n, d) @ self.table[0].transpose(-1, -2)).view(b, h, r, n * PAGE_TOKENS)


def _packed(state: _Softmax, query: Tensor, layer: PackedLayer, mask: Mask, scaling: float, softcap: float | None) -> None:
    """Fold the packed pages of ``layer`` in; afterwards the accumulator is back in the model's basis."""
    assert layer.transform is not None
    codec, transform = layer.codec, layer.transform
    b, hq, t, d = query.shape
    h, g = layer.num_kv_heads, hq // layer.num_kv_heads
    plain = query.float().view(b, h, g, t, d) * scaling
    coded = codec.key_rotation.forward(transform.scale_query(plain))
    sketched = codec.sketch.forward(coded) if layer.layout.qjl else None
    center = _Center(transform, query.device)
    sink_index = layer.sink_index()
    last_sink = -1 if sink_index is None else int(sink_index.max())
    for page, view in layer.slabs.blocks(BLOCK_PAGES):
        start = (page + layer.first_page) * PAGE_TOKENS
        stop = start + view.shape[2] * PAGE_TOKENS
        blocks = [(q0, min(q0 + _QUERY_BLOCK, t)) for q0 in range(0, t, _QUERY_BLOCK)]
        masks = [mask.block(q0, q1, start, stop, query.device) for q0, q1 in blocks]
        if all(m is not None and m.dtype == torch.bool and not bool(m.any()) for m in masks):
            continue
        keys, values = codec.decode_keys(view), codec.decode_values(view)
        positions = layer.positions(start, stop, query.device)
        whole: Tensor | None = None
        if t * g > _MANY_ROWS and (offset := transform.coded_offset(positions)) is not None:
            whole = keys.levels * keys.scale[..., None] + codec.key_rotation.forward(offset)
        for (q0, q1), m in zip(blocks, masks, strict=True):
            scores = _code_scores(coded[..., q0:q1, :], keys, whole, None if sketched is None else sketched[..., q0:q1, :])
            if whole is None:
                term = center.scores(plain[..., q0:q1, :].reshape(b, h, -1, d), positions[:, ::PAGE_TOKENS])
                scores = scores if term is None else scores + term.view_as(scores)
            scores = _apply_mask(_cap(scores, softcap), m)
            if start <= last_sink and sink_index is not None:
                scores = _hide(scores, sink_index, start, stop)
            state.add(q0, q1, scores, values.levels, values.scale)
    state.out = codec.value_rotation.inverse(state.out)


def _code_scores(query: Tensor, keys: Decoded, whole: Tensor | None, sketched: Tensor | None) -> Tensor:
    """Scores of rotated queries against codes, or against ``whole`` keys with scale and centring put in."""
    b, h, g, t, d = query.shape
    rows = query.reshape(b, h, g * t, d)
    if whole is None:
        scores = (rows @ keys.levels.transpose(-1, -2)) * keys.scale[:, :, None]
    else:
        scores = rows @ whole.transpose(-1, -2)
    if sketched is not None and keys.signs is not None and keys.qjl_scale is not None:
        scores = scores + (sketched.reshape(b, h, g * t, d) @ keys.signs.transpose(-1, -2)) * keys.qjl_scale[:, :, None]
    return scores.view(b, h, g, t, -1)


def _hide(scores: Tensor, index: Tensor, start: int, stop: int) -> Tensor:
    """Hide the packed copies of sink tokens; their exact copies are read instead."""
    here = (torch.arange(start, stop, device=scores.device)[None, :, None] == index[:, None, :]).any(-1)
    return scores.masked_fill(here[:, None, None, None, :], float("-inf"))


def _exact(
    state: _Softmax, query: Tensor, key: Tensor, value: Tensor, start: int, mask: Mask, scaling: float, softcap: float | None
) -> None:
    """Fold exact tokens with indices from ``start`` on in."""
    b, hq, t, d = query.shape
    h = key.shape[1]
    q = query.float().view(b, h, hq // h, t, d) * scaling
    for k0 in range(0, key.shape[2], _KEY_BLOCK):
        k = key[:, :, k0 : k0 + _KEY_BLOCK].float()
        v = value[:, :, k0 : k0 + _KEY_BLOCK].float()
        for q0 in range(0, t, _QUERY_BLOCK):
            q1 = min(q0 + _QUERY_BLOCK, t)
            m = mask.block(q0, q1, start + k0, start + k0 + k.shape[2], query.device)
            if m is not None and m.dtype == torch.bool and not bool(m.any()):
                continue
            scores = (q[..., q0:q1, :].reshape(b, h, -1, d) @ k.transpose(-1, -2)).view(b, h, hq // h, q1 - q0, -1)
            state.add(q0, q1, _apply_mask(_cap(scores, softcap), m), v)


def _sinks(state: _Softmax, query: Tensor, layer: PackedLayer, mask: Mask, scaling: float, softcap: float | None) -> None:
    """Fold the exact copies of packed sink tokens in."""
    found = layer.sinks()
    if found is None:
        return
    key, value, index = found
    b, hq, t, d = query.shape
    h = layer.num_kv_heads
    q = query.float().view(b, h, hq // h, t, d) * scaling
    scores = _cap((q.reshape(b, h, -1, d) @ key.float().transpose(-1, -2)).view(b, h, hq // h, t, -1), softcap)
    # A row may have more padding than was packed so far: its sinks are then still in the exact tail.
    held = index < layer.packed_tokens
    safe = torch.where(held, index, torch.zeros_like(index))
    scores = _apply_mask(scores, mask.at(0, t, safe)).masked_fill(~held[:, None, None, None, :], float("-inf"))
    state.add(0, t, scores, value.float())


def attend_packed(
    query: Tensor,
    layer: PackedLayer,
    mask: Mask,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`turboquant.attention.attend`."""
    b, hq, t, d = query.shape
    state = _Softmax(b, layer.num_kv_heads, hq // layer.num_kv_heads, t, d, query.device)
    if layer.packed_pages > layer.first_page:
        _packed(state, query, layer, mask, scaling, softcap)
        _sinks(state, query, layer, mask, scaling, softcap)
    key, value = layer.exact(layer.packed_tokens, layer.length)
    _exact(state, query, key, value, layer.packed_tokens, mask, scaling, softcap)
    out, lse = state.finish(sink_logits)
    return out.reshape(b, hq, t, d).to(query.dtype), lse.reshape(b, hq, t)


def attend_window(
    query: Tensor, layer: PackedLayer, mask: Mask, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the exact tokens of a layer alone (sinks, tail, pending), float32."""
    b, hq, t, d = query.shape
    state = _Softmax(b, layer.num_kv_heads, hq // layer.num_kv_heads, t, d, query.device)
    if layer.packed_pages > layer.first_page:
        _sinks(state, query, layer, mask, scaling, softcap)
    key, value = layer.exact(layer.packed_tokens, layer.length)
    _exact(state, query, key, value, layer.packed_tokens, mask, scaling, softcap)
    out, lse = state.finish(None)
    return out.reshape(b, hq, t, d), lse.reshape(b, hq, t)


def attend_exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_key: int,
    mask: Mask,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over exact keys and values (batch, kv heads, tokens, head_dim) whose first token has index ``first_key``."""
    b, hq, t, _ = query.shape
    state = _Softmax(b, key.shape[1], hq // key.shape[1], t, value.shape[3], query.device)
    _exact(state, query, key, value, first_key, mask, scaling, softcap)
    out, lse = state.finish(sink_logits)
    return out.reshape(b, hq, t, -1).to(query.dtype), lse.reshape(b, hq, t)
