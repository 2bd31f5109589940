"""The attention function ``"turboquant"`` of transformers and its masks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ...attention import CausalMask, Mask, TensorMask, attend, attend_exact
from ...cache.layer import PackedLayer
from ...errors import ConfigError

NAME = "turboquant"


class PackedKV:
    """What the cache hands to the attention function in place of key and value tensors: the layer itself.

    Model code between the two may look at shape, dtype and device; they are those of the dense tensors.
    """

    def __init__(self, layer: PackedLayer) -> None:
        self.layer = layer

    @property
    def shape(self) -> torch.Size:
        """(batch, heads, tokens, head_dim)."""
        s = self.layer
        return torch.Size((s.batch_size, s.num_kv_heads, s.length - s.first_token, s.head_dim))

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        """Where the exact tail is."""
        return self.layer.exact(self.layer.packed_tokens, self.layer.length)[0].device


class RuleMask(Mask):
    """A mask of transformers kept as its rule and evaluated block by block.

    Args:
        rule: ``rule(batch, head, query, key)`` on broadcastable index tensors, True is visible.
        first_query, first_key: index of the first query and key of the call.
        queries, keys: how many.
        padding: (batch, keys seen) bool, True is a real token, or None.
        causal: the rule is plain causal attention.
    """

    def __init__(
        self,
        rule: Callable[..., Tensor],
        first_query: int,
        first_key: int,
        queries: int,
        keys: int,
        padding: Tensor | None,
        causal: bool,
    ) -> None:
        self.rule, self.first_query, self.first_key = rule, first_query, first_key
        self.queries, self.keys, self.padding = queries, keys, padding
        self.causal = causal and padding is None
        self._plain: CausalMask | None = None
        self._looked = False

    @property
    def square(self) -> bool:
        """Plain causal attention of the first tokens among themselves."""
        return self.causal and self.first_query == self.first_key == 0 and self.queries == self.keys

    def plain(self) -> CausalMask | None:
        """See :meth:`Mask.plain`. Looked at once per call of the model; padding costs one wait for the GPU."""
        if not self._looked:
            self._looked = True
            window = window_of(self.rule)
            starts = None if self.padding is None else _left_padding(self.padding)
            if window is not None and (self.padding is None or starts is not None):
                self._plain = CausalMask(self.first_query, window or None, starts)
        return self._plain

    def at(self, q0: int, q1: int, index: Tensor) -> Tensor | None:
        """See :meth:`Mask.at`."""
        device = index.device
        key = index[:, None, None, :]
        query = torch.arange(self.first_query + q0, self.first_query + q1, device=device)[None, None, :, None]
        rows = self.padding.shape[0] if self.padding is not None else index.shape[0]
        batch = torch.arange(rows, device=device)[:, None, None, None]
        ok = self.rule(batch, torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device), query, key)
        if self.padding is not None:
            ok = ok & self.padding[batch, key.clamp(max=self.padding.shape[1] - 1)]
        return ok

    def block(self, q0: int, q1: int, start: int, stop: int, device: torch.device) -> Tensor | None:
        """See :meth:`Mask.block`."""
        if self.causal and stop <= self.first_query + q0 + 1:
            return None
        return super().block(q0, q1, start, stop, device)


def window_of(rule: Callable[..., Any]) -> int | None:
    """0 for plain causal attention, the width of a causal sliding window, or None for any other rule of transformers.

    A sliding rule is a closure over its parts; only what is exactly built like transformers builds it is taken for one.
    """
    from transformers import masking_utils

    if rule is masking_utils.causal_mask_function:
        return 0
    parts = inspect.getclosurevars(rule).nonlocals.get("mask_functions") if inspect.isfunction(rule) else None
    like = masking_utils.sliding_window_causal_mask_function(1)
    if not parts or rule.__code__ is not like.__code__ or len(parts) != 2 or parts[1] is not masking_utils.causal_mask_function:
        return None
    overlay = masking_utils.sliding_window_overlay(1)
    if getattr(parts[0], "__code__", None) is not overlay.__code__:
        return None
    window = inspect.getclosurevars(parts[0]).nonlocals.get("sliding_window")
    return window if isinstance(window, int) and window > 0 else None


def _left_padding(padding: Tensor) -> Tensor | None:
    """(batch,) index of the first real token of each row, or None if there is padding elsewhere than on the left."""
    if not bool((padding[:, 1:] >= padding[:, :-1]).all()):
        return None
    return padding.shape[1] - padding.sum(-1)


def turboquant_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Any:
    """Mask interface of transformers: the rule instead of a (queries x keys) tensor.

    Rules that users pass in may work on scalars only (``use_vmap``); those are made a tensor by transformers.
    """
    from transformers import masking_utils

    rule = mask_function or masking_utils.causal_mask_function
    if use_vmap:
        kwargs["allow_is_causal_skip"] = False
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, rule, attention_mask, use_vmap=True, **kwargs
        )
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding.bool()
        padding = None if bool(padding[:, kv_offset:].all()) else padding
    causal = rule is masking_utils.causal_mask_function
    return RuleMask(rule, int(q_offset), int(kv_offset), q_length, kv_length, padding, causal)


def _as_mask(mask: Any, first_query: int, first_key: int, window: int | None, causal: bool) -> Mask | None:
    if isinstance(mask, Tensor):
        return TensorMask(mask, first_key)
    if isinstance(mask, Mask):
        return mask
    return CausalMask(first_query, window) if causal else None


def turboquant_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedKV,
    value: Tensor | PackedKV,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers.

    Args:
        module: the attention module (its ``is_causal`` counts where no mask is given).
        query: (batch, query heads, tokens, head_dim).
        key, value: a :class:`PackedKV` of a compressed layer, or dense tensors of any other.
        attention_mask: what :func:`turboquant_mask` made, a 4-D tensor, or None.
        scaling, softcap, s_aux, sliding_window, is_causal: as transformers passes them.
        dropout: must be 0.

    Returns:
        (output (batch, tokens, query heads, head_dim), None).

    Raises:
        ConfigError: dropout was asked for (this is inference).
    """
    if dropout:
        raise ConfigError("attn_implementation='turboquant' is for inference: attention dropout must be 0 (call model.eval())")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    plain = softcap is None and s_aux is None
    if isinstance(key, PackedKV):
        layer = key.layer
        layer.observe_queries(query)
        if plain and isinstance(attention_mask, RuleMask) and attention_mask.square and not layer.packed_pages:
            dense_key, dense_value = layer.exact(0, layer.length)
            out = _sdpa(query, dense_key, dense_value, None, scaling, True)
        else:
            mask = _as_mask(attention_mask, layer.length - query.shape[2], layer.first_token, layer.sliding_window, True)
            out = attend(query, layer, mask, scaling, softcap, s_aux)[0]
        layer.commit()
    else:
        assert isinstance(value, Tensor)
        if plain and isinstance(attention_mask, RuleMask) and attention_mask.square:
            out = _sdpa(query, key, value, None, scaling, True)
        else:
            first_key = attention_mask.first_key if isinstance(attention_mask, RuleMask) else 0
            last = first_key + key.shape[2]
            mask = _as_mask(attention_mask, last - query.shape[2], first_key, sliding_window, causal)
            if plain and not isinstance(mask, (RuleMask, CausalMask)):
                out = _sdpa(query, key, value, attention_mask, scaling, False)
            else:
                assert mask is not None
                out = attend_exact(query, key, value, first_key, mask, scaling, softcap, s_aux)[0]
    return out.transpose(1, 2).contiguous(), None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scaling, enable_gqa=True)


def register_attention() -> None:
    """Register attention and mask under :data:`NAME`; harmless if repeated."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, turboquant_attention)
    AttentionMaskInterface.register(NAME, turboquant_mask)
