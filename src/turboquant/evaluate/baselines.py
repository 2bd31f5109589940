"""Reference rows: what plain number formats do to the same cache, with and without the same exact window.

They are simulated (tokens are rounded to the format and kept as floats), which is what their quality depends on; their bits
are those of the format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..codec.layout import PAGE_TOKENS
from ..config import TurboQuantConfig


def fp8(x: Tensor) -> Tensor:
    """float8 e4m3 without scales, vLLM's ``--kv-cache-dtype fp8`` default; out of range saturates at 448."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def int4(x: Tensor) -> Tensor:
    """Asymmetric 4-bit integers with an fp16 scale and an fp16 minimum per token vector."""
    low = x.amin(-1, keepdim=True).half().float()
    scale = ((x.float().amax(-1, keepdim=True) - low) / 15).half().float().clamp_min(1e-8)
    return (((x.float() - low) / scale).round().clamp(0, 15) * scale + low).to(x.dtype)


@dataclass(frozen=True)
class Baseline:
    """A number format.

    Attributes:
        round_trip: (..., head_dim) to the same shape, rounded.
        bits: stored bits per number at a head_dim.
        window: keep the default exact window (sinks and recent tokens) like the presets do.
    """

    round_trip: Callable[[Tensor], Tensor]
    bits: Callable[[int], float]
    window: bool


BASELINES: dict[str, Baseline] = {
    "fp8": Baseline(fp8, lambda d: 8.0, False),
    "fp8_window": Baseline(fp8, lambda d: 8.0, True),
    "int4": Baseline(int4, lambda d: 4.0 + 32 / d, False),
    "int4_window": Baseline(int4, lambda d: 4.0 + 32 / d, True),
}


class _RoundedLayer(DynamicLayer):  # type: ignore[misc]
    """A dense layer whose tokens are read in rounded form; with a window, once they have left it."""

    def __init__(self, baseline: Baseline) -> None:
        super().__init__()
        self.baseline, self.rounded = baseline, 0
        default = TurboQuantConfig()
        self.sinks, self.recent = default.sink_tokens, default.recent_tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append; returns the (keys, values) that this call's queries read."""
        trip = self.baseline.round_trip
        if not self.baseline.window:
            # Strict, like a paged cache: a token is written before it is read, its own included.
            return super().update(trip(key_states), trip(value_states))
        read = super().update(key_states, value_states)
        stop = max(0, (read[0].shape[2] - self.recent) // PAGE_TOKENS * PAGE_TOKENS)
        start = max(self.rounded, self.sinks)
        if stop > start:
            kept = [t.clone() for t in read]
            for t in kept:
                t[:, :, start:stop] = trip(t[:, :, start:stop])
            self.keys, self.values = kept
            self.rounded = stop
        return read


class BaselineCache(DynamicCache):  # type: ignore[misc]
    """A dense cache that reads like a baseline's.

    Args:
        name: of :data:`BASELINES`.
        num_layers: of the model.
    """

    def __init__(self, name: str, num_layers: int) -> None:
        super().__init__()
        self.baseline = BASELINES[name]
        self.layer_class_to_replicate = None
        self.layers = [_RoundedLayer(self.baseline) for _ in range(num_layers)]

    @property
    def bits_per_element(self) -> float:
        """Nominal bits of the format."""
        return self.baseline.bits(self.layers[0].keys.shape[-1])

    @property
    def effective_bits(self) -> float:
        """Bits per number with the exact window counted in the model's dtype."""
        keys = self.layers[0].keys
        length = keys.shape[2]
        exact = length - max(0, self.layers[0].rounded - self.layers[0].sinks) if self.baseline.window else 0
        return float((exact * keys.dtype.itemsize * 8 + (length - exact) * self.bits_per_element) / length)
