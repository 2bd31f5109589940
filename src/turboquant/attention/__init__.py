"""Attention over a compressed layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.layer import PackedLayer
from ..errors import ShapeError
from .base import Backend, Call
from .compiled import attend_compiled
from .mask import CausalMask, Mask, TensorMask
from .reference import attend_exact
from .select import backend_for, use_backend

__all__ = ["Backend", "CausalMask", "Mask", "TensorMask", "attend", "attend_exact", "backend_for", "use_backend"]


def attend(
    query: Tensor,
    layer: PackedLayer,
    mask: Mask | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of new queries over everything a layer holds: packed pages, exact sinks, exact tail and pending tokens.

    The fastest back-end that supports the call does it (see :func:`~turboquant.attention.select.backend_for`). Inside
    ``torch.compile`` a call without ``mask`` becomes one operator, ``turboquant::attend``.

    Args:
        query: (batch, query heads, tokens, head_dim); the last query belongs to the layer's last token. The number of query
            heads is a multiple of the layer's KV heads.
        layer: after ``append`` of the keys and values of the same tokens.
        mask: None means causal, with the layer's padding and sliding window.
        scaling: of the scores; 1 / sqrt(head_dim) by default.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        sink_logits: (query heads,) logits that only enter the denominator (gpt-oss).

    Returns:
        Output (batch, query heads, tokens, head_dim) in the query's dtype, and the log-sum-exp (batch, query heads, tokens)
        in float32, so that parts of a context can be merged.

    Raises:
        ShapeError: the query does not fit the layer.
    """
    if query.dim() != 4:
        raise ShapeError(f"query of shape {tuple(query.shape)} must be (batch, query heads, tokens, head_dim)")
    b, hq, t, d = query.shape
    if b != layer.batch_size or d != layer.head_dim or hq % layer.num_kv_heads or t > layer.length:
        raise ShapeError(
            f"query of shape {tuple(query.shape)} does not fit a layer with batch {layer.batch_size}, {layer.num_kv_heads} KV "
            f"heads, head_dim {layer.head_dim} and {layer.length} tokens"
        )
    scaling = d**-0.5 if scaling is None else scaling
    if torch.compiler.is_compiling() and mask is None:
        return attend_compiled(query, layer, scaling, softcap, sink_logits)
    if mask is None:
        mask = CausalMask(layer.length - t, layer.sliding_window, layer.starts)
    call = Call(query, layer, mask, scaling, softcap, sink_logits)
    return backend_for(call).attend(call)
