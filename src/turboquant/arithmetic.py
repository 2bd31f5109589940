"""How many bytes a cache takes, from shapes alone: no tensors, no torch.

The numbers are those of the storage itself: :func:`cache_bytes` equals ``TurboQuantCache.nbytes`` at every length once the
key statistics are frozen (tests/test_arithmetic.py compares them). Until then, which is for fewer than
``statistics_tokens`` tokens of a sequence that measures its own, all tokens are exact.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .config import EXACT_BITS, TurboQuantConfig
from .errors import ConfigError

# codec/layout.py states these for tensors and cannot be imported without torch; a test compares both.
PAGE_TOKENS = 64
MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 512
#: A sliding layer keeps this many tokens beyond its window (cache/layer.py).
SLIDING_SLACK = PAGE_TOKENS
#: :func:`longest_context` looks no further. A cache whose layers all slide stops growing, so any context fits.
NO_LIMIT = 2**40

_SCALE_BYTES = 2 * PAGE_TOKENS
_STATISTICS_ITEM_BYTES = 4
_UNITS = (
    {"": 1, "b": 1} | {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
)


def page_bytes(head_dim: int, key_bits: int, value_bits: int, qjl: bool = False) -> int:
    """Bytes of a page of 64 tokens of one KV head.

    Args:
        head_dim: 32 to 512.
        key_bits: bits of the scalar codes of keys, 1 to 4.
        value_bits: the same of values.
        qjl: keys carry a 1-bit QJL plane and a residual norm besides (as in ``PageLayout``).
    """
    codes = PAGE_TOKENS * head_dim * (key_bits + value_bits + qjl) // 8
    return codes + _SCALE_BYTES * (2 + qjl)


@dataclass(frozen=True)
class LayerShape:
    """What one layer caches.

    Attributes:
        kv_heads: number of KV heads; 0 where the layer caches no keys and values.
        head_dim: numbers per head and token.
        sliding_window: tokens the layer attends to, or None for all.
        exact_reason: why the layer cannot be compressed, or "".
    """

    kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    exact_reason: str = ""

    @property
    def elements(self) -> int:
        """Cached numbers per token, keys and values."""
        return 2 * self.kv_heads * self.head_dim

    def why_exact(self, config: TurboQuantConfig) -> str:
        """Why this layer stays exact whatever its bits, or "" where it can be compressed."""
        if self.exact_reason:
            return self.exact_reason
        if not MIN_HEAD_DIM <= self.head_dim <= MAX_HEAD_DIM:
            return f"head_dim {self.head_dim} is outside {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
        window = self.sliding_window
        if window is not None and window <= config.sink_tokens + config.recent_tokens + PAGE_TOKENS:
            return f"sliding window of {window} tokens fits in the exact window"
        return ""


@dataclass(frozen=True)
class CacheShape:
    """The layers of a model's cache, in order."""

    layers: tuple[LayerShape, ...]

    @classmethod
    def uniform(
        cls, num_layers: int, num_kv_heads: int, head_dim: int, sliding_windows: Iterable[int | None] | None = None
    ) -> CacheShape:
        """Layers of one size.

        Args:
            num_layers: of the model.
            num_kv_heads: of every layer.
            head_dim: numbers per head and token.
            sliding_windows: tokens each layer attends to, None for all; by default no layer slides.

        Raises:
            ConfigError: a number is below 1, or there are not as many windows as layers.
        """
        for name, n in (("num_layers", num_layers), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
            if n < 1:
                raise ConfigError(f"{name}={n!r} must be a positive integer")
        windows = [None] * num_layers if sliding_windows is None else list(sliding_windows)
        if len(windows) != num_layers:
            raise ConfigError(f"{len(windows)} sliding windows do not fit {num_layers} layers")
        return cls(tuple(LayerShape(num_kv_heads, head_dim, w) for w in windows))

    def groups(self, config: TurboQuantConfig) -> list[tuple[LayerShape, tuple[int, int], int]]:
        """(layer, (key bits, value bits), how many) of the layers that are alike; (16, 16) where a layer stays exact."""
        n = len(self.layers)
        bits = [config.bits_of_layer(i, n) for i in range(n)]
        exact = (EXACT_BITS, EXACT_BITS)
        found = Counter((s, exact if s.why_exact(config) else b) for s, b in zip(self.layers, bits, strict=True))
        return [(s, b, count) for (s, b), count in found.items()]


def _layer_bits(layer: LayerShape, bits: tuple[int, int], config: TurboQuantConfig, exact_bytes: int) -> float:
    """Nominal stored bits per cached number of a layer."""
    if bits[0] == EXACT_BITS:
        return 8.0 * exact_bytes
    return _page(layer, bits, config) * 8 / (PAGE_TOKENS * 2 * layer.head_dim)


def _page(layer: LayerShape, bits: tuple[int, int], config: TurboQuantConfig) -> int:
    qjl = config.quantizer == "lloyd_max_qjl"
    return page_bytes(layer.head_dim, bits[0] - qjl, bits[1], qjl)


def bits_per_element(shape: CacheShape, config: TurboQuantConfig, exact_bytes: int = 2) -> float:
    """Nominal stored bits per cached number, scales included, averaged over the layers that can be compressed.

    Over all layers where none can. 0 for a model that caches nothing.
    """
    groups = shape.groups(config)
    groups = [g for g in groups if not g[0].why_exact(config)] or groups
    total = sum(layer.elements * n for layer, _, n in groups)
    return sum(_layer_bits(s, b, config, exact_bytes) * s.elements * n for s, b, n in groups) / total if total else 0.0


def bytes_per_token(shape: CacheShape, config: TurboQuantConfig, exact_bytes: int = 2) -> float:
    """Nominal bytes per token beyond the exact window, keys and values of all layers."""
    return sum(_layer_bits(s, b, config, exact_bytes) * s.elements * n / 8 for s, b, n in shape.groups(config))


def _layer_bytes(layer: LayerShape, bits: tuple[int, int], config: TurboQuantConfig, tokens: int, exact_bytes: int) -> int:
    """Bytes of one layer for one sequence, without statistics."""
    window = layer.sliding_window
    if bits[0] == EXACT_BITS:
        return layer.elements * exact_bytes * (tokens if window is None else min(tokens, window))
    packed = max(0, (tokens - config.recent_tokens) // PAGE_TOKENS)
    first = 0 if window is None else max(0, tokens - window + 1 - SLIDING_SLACK) // PAGE_TOKENS
    held = packed - min(first, packed)
    # The tail is allocated in whole pages of room.
    tail = -(-(tokens - packed * PAGE_TOKENS) // PAGE_TOKENS) * PAGE_TOKENS
    sinks = config.sink_tokens if packed and window is None else 0
    return held * layer.kv_heads * _page(layer, bits, config) + (tail + sinks) * layer.elements * exact_bytes


class _Sizes:
    """Bytes of one shape with one recipe at any length; the layers are gone through once."""

    def __init__(self, shape: CacheShape, config: TurboQuantConfig, exact_bytes: int) -> None:
        self.config, self.exact_bytes = config, exact_bytes
        self.groups = shape.groups(config)
        vectors = 0 if config.key_center == "none" else 2 if config.key_balance else 1
        packed = ((s, n) for s, b, n in self.groups if b[0] != EXACT_BITS)
        vector_bytes = sum(s.kv_heads * s.head_dim * _STATISTICS_ITEM_BYTES * n for s, n in packed)
        #: Mean and balance of the keys, float32; one copy serves all sequences of a cache.
        self.statistics = vectors * vector_bytes
        #: The mean turned to the 64 positions of a page, made when the first page is packed.
        self.tables = PAGE_TOKENS * vector_bytes if vectors else 0

    def shared(self, tokens: int) -> int:
        """Bytes that all sequences of a cache share, when the longest has ``tokens``: statistics and their tables."""
        return self.statistics + (self.tables if tokens - self.config.recent_tokens >= PAGE_TOKENS else 0)

    def sequence(self, tokens: int) -> int:
        """Bytes of one sequence, without statistics."""
        return sum(_layer_bytes(s, b, self.config, tokens, self.exact_bytes) * n for s, b, n in self.groups)

    def total(self, tokens: int, batch: int) -> int:
        """Bytes of a cache of ``batch`` sequences."""
        return batch * self.sequence(tokens) + self.shared(tokens)

    def last_turn(self, tokens: int) -> range:
        """Lengths among which the largest size up to ``tokens`` is found.

        Packing a page frees 64 exact tokens, so a cache is largest just before. The pattern repeats every 64 tokens and never
        falls from one turn to the next: the last turn holds the maximum.
        """
        return range(max(0, tokens - PAGE_TOKENS + 1), tokens + 1)

    def peak(self, tokens: int, batch: int) -> int:
        """Return the most bytes of a cache of ``batch`` sequences while it grows to ``tokens``."""
        return max(self.total(t, batch) for t in self.last_turn(tokens))


def _check(**numbers: int) -> None:
    for name, n in numbers.items():
        if n < 0:
            raise ConfigError(f"{name}={n} must not be negative")


def cache_bytes(shape: CacheShape, config: TurboQuantConfig, tokens: int, batch: int = 1, exact_bytes: int = 2) -> int:
    """Bytes of a cache whose statistics are frozen: pages, exact window, sinks, statistics and their tables.

    Args:
        shape: the model's layers.
        config: the recipe. Layers that cannot be compressed are counted exact; a sliding one up to its window.
        tokens: per sequence, 0 or more.
        batch: sequences in the cache.
        exact_bytes: per exact number: 2 for bfloat16 and float16, 4 for float32.

    Raises:
        ConfigError: a number is negative, or ``config.layers`` names a layer that does not exist.
    """
    _check(tokens=tokens, batch=batch)
    return _Sizes(shape, config, exact_bytes).total(tokens, batch)


def peak_bytes(shape: CacheShape, config: TurboQuantConfig, tokens: int, batch: int = 1, exact_bytes: int = 2) -> int:
    """Bytes that a cache takes at most while it grows to ``tokens`` per sequence; the default window then holds 191 tokens.

    Arguments and errors are those of :func:`cache_bytes`.
    """
    _check(tokens=tokens, batch=batch)
    return _Sizes(shape, config, exact_bytes).peak(tokens, batch)


def longest_context(
    shape: CacheShape, config: TurboQuantConfig, memory_bytes: int, batch: int = 1, exact_bytes: int = 2
) -> int:
    """Return the most tokens per sequence that a cache can grow to within ``memory_bytes``.

    Returns:
        0 if not one token fits; :data:`NO_LIMIT` if the cache stops growing before it is full.

    Raises:
        ConfigError: as :func:`cache_bytes`.
    """
    _check(batch=batch)
    sizes = _Sizes(shape, config, exact_bytes)

    def fits_in(tokens: int) -> bool:
        return sizes.peak(tokens, max(1, batch)) <= memory_bytes

    if fits_in(NO_LIMIT):
        return NO_LIMIT
    fits, too_many = 0, NO_LIMIT
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if fits_in(middle):
            fits = middle
        else:
            too_many = middle
    return fits


def concurrent_sequences(
    shape: CacheShape, config: TurboQuantConfig, memory_bytes: int, tokens: int, exact_bytes: int = 2
) -> int:
    """How many sequences of one cache can grow to ``tokens`` at the same time within ``memory_bytes``.

    Raises:
        ConfigError: ``tokens`` is below 1.
    """
    if tokens < 1:
        raise ConfigError(f"tokens={tokens} must be at least 1")
    sizes = _Sizes(shape, config, exact_bytes)
    lengths = [t for t in sizes.last_turn(tokens) if sizes.sequence(t)]
    return min((max(0, memory_bytes - sizes.shared(t)) // sizes.sequence(t) for t in lengths), default=0)


def parse_bytes(text: str, name: str = "size") -> int:
    """Bytes of ``80GiB`` (1024^3), ``24GB`` (1000^3), ``512MiB`` or plain ``1073741824``.

    Raises:
        ConfigError: not understood, or not above 0; the message begins with ``name``.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{name}={text!r} is not understood; write for example 80GiB, 24GB, 512MiB or a number of bytes")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise ConfigError(f"{name}={text!r} must be more than 0 bytes")
    return size


def format_bytes(size: float) -> str:
    """Write a size in binary units: ``64,000 B``, ``512 KiB``, ``7.85 GiB``."""
    if abs(size) < 100_000:
        return f"{size:,.0f} B"
    power = next((p for p in (1, 2, 3) if abs(size) < 1024 ** (p + 1)), 4)
    value = size / 1024**power
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{digits}f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
