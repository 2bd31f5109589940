"""A readable report of what a cache stores."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from .exact import ExactLayer
from .layer import PackedLayer

if TYPE_CHECKING:
    from .cache import TurboQuantCache


def _describe(cache: TurboQuantCache, i: int, store: Any) -> str:
    spec = cache.specs[i] if hasattr(cache, "specs") else None
    if isinstance(store, PackedLayer):
        key, value = store.bits
        text = (
            f"packed K{key}V{value}, {store.num_kv_heads} KV heads x {store.head_dim}, {store.layout.bits_per_element:g} bits"
        )
        if store.sliding_window is not None:
            text += f", sliding window {store.sliding_window}"
        if store.config.key_center != "none":
            center = "rope-mean" if store.rotary is not None else "mean"
            state = "not measured yet" if store.statistics is None else "frozen"
            balanced = store.statistics is not None and store.statistics.balance is not None
            text += f", keys centred ({center}{', balanced' if balanced else ''}; {state})"
        return text + (f" [{spec.note}]" if spec is not None and spec.note else "")
    if isinstance(store, ExactLayer):
        return "exact (exact by configuration)"
    return f"exact ({store.reason})"


def summary(cache: TurboQuantCache) -> str:
    """See :meth:`TurboQuantCache.summary`."""
    lines = [f"TurboQuantCache {cache.config.name}: {cache.num_layers} layers, {cache.get_seq_length()} tokens"]
    described = [(i, _describe(cache, i, s)) for i, s in enumerate(cache._stores)]
    for text, group in groupby(described, key=lambda item: item[1]):
        indices = [i for i, _ in group]
        name = f"layer {indices[0]}" if len(indices) == 1 else f"layers {indices[0]}-{indices[-1]}"
        lines.append(f"  {name}: {text}")
    c = cache.config
    lines.append(f"  exact window: first {c.sink_tokens} and at least {c.recent_tokens} last tokens")
    held, exact = cache.nbytes, cache.exact_nbytes
    ratio = f", {exact / held:.2f}x less than exact" if held and exact else ""
    lines.append(
        f"  {held:,} bytes held; {cache.bits_per_element:.3f} bits per element nominal, "
        f"{cache.effective_bits:.3f} effective{ratio}"
    )
    return "\n".join(lines)
