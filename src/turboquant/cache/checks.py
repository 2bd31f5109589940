"""Checks that all kinds of layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_tokens(key: Tensor, value: Tensor, num_kv_heads: int, head_dim: int, held: Tensor | None) -> None:
    """Check new tokens against a layer's shape and against what it holds, (batch, heads, tokens, head_dim) or None.

    Raises:
        ShapeError: says what was expected.
    """
    for name, t in (("key", key), ("value", value)):
        if t.dim() != 4 or (t.shape[1], t.shape[3]) != (num_kv_heads, head_dim):
            raise ShapeError(
                f"{name} of shape {tuple(t.shape)} does not fit: expected (batch, {num_kv_heads} heads, tokens, "
                f"head_dim {head_dim})"
            )
    if key.shape != value.shape or key.dtype != value.dtype or key.device != value.device:
        raise ShapeError(
            f"key {tuple(key.shape)} {key.dtype} {key.device} and value {tuple(value.shape)} {value.dtype} {value.device} "
            "must agree"
        )
    if key.dtype not in _DTYPES:
        raise ShapeError(f"keys and values must be float32, float16 or bfloat16, not {key.dtype}")
    if held is not None and (key.shape[0], key.dtype, key.device) != (held.shape[0], held.dtype, held.device):
        raise ShapeError(
            f"batch {key.shape[0]}, {key.dtype} on {key.device} does not match the cached batch {held.shape[0]}, {held.dtype} "
            f"on {held.device}; call reset() to start anew"
        )
