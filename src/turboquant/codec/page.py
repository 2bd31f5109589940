"""Token vectors to pages and back, in plain torch: the reference that every kernel is compared with.

Arithmetic is fixed so that other implementations can produce the same bytes: float32 throughout, butterflies in the order
of :func:`~turboquant.codec.rotation.fwht`, sums of squares and products by :func:`tree_sum`, IEEE square root and division,
no fused multiply-add, scales rounded to fp16 (nearest even). A vector y is coded so:

    norm2 = tree_sum(y y), rms = sqrt(norm2 * float32(1 / d))
    code of a coordinate: :func:`~turboquant.codec.layout.encoder_bounds`, each number of which is multiplied by rms
    squares = 0 + n_1 s_1 + n_2 s_2 + ... in this order: n_i coordinates have a level of square s_i (rounded to float32), the
        positive and then the negative level of each magnitude, magnitudes ascending
    scale of a key = sqrt(norm2 / squares), of a value = tree_sum(y level) / squares
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import PAGE_TOKENS, PageLayout, codes_of, encoder_bounds, magnitudes, stored_levels
from .rotation import Rotation, RotationType, get_rotation

_HALF_MAX = 65504.0
# Streams of the seed: keys, values and the QJL sketch rotate differently.
_KEY_STREAM, _VALUE_STREAM, _QJL_STREAM = 0, 1, 2


def stream_seed(seed: int, stream: int) -> int:
    """The seed of one of the rotations that a configuration needs."""
    return seed * 4 + stream


def tree_sum(x: Tensor) -> Tensor:
    """Sum of the last axis in a fixed order: neighbours are added until one is left (an odd last element is carried).

    So runs of 2, 4, 8, ... elements are summed first, which a GPU lane does within its registers.
    """
    while x.shape[-1] > 1:
        n = x.shape[-1] // 2
        rest = x[..., 2 * n :]
        x = x[..., 0 : 2 * n : 2] + x[..., 1 : 2 * n : 2]
        if rest.shape[-1]:
            x = torch.cat((x, rest), dim=-1)
    return x[..., 0]


@functools.lru_cache(maxsize=64)
def _levels_on(bits: int, role: str, device: torch.device) -> Tensor:
    """Level of each code on ``device``."""
    with torch.inference_mode(False):  # shared by all later calls, whatever mode the first was in
        return torch.from_numpy(stored_levels(bits, role)).to(device)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]``; index_select is 2.5 times as fast as advanced indexing on the CPU."""
    return table.index_select(0, index.reshape(-1).int()).view(index.shape)


@dataclass(frozen=True)
class Decoded:
    """Pages in the rotated domain: ``vector = scale * levels``, and for QJL keys ``+ qjl_scale * signs`` after S.

    Attributes:
        levels: (..., tokens, head_dim) float32.
        scale: (..., tokens) float32.
        signs: (..., tokens, head_dim) float32 of +-1, or None.
        qjl_scale: (..., tokens) float32, ``sqrt(pi / (2 d))`` times the residual norm, or None.
    """

    levels: Tensor
    scale: Tensor
    signs: Tensor | None = None
    qjl_scale: Tensor | None = None


class PageCodec:
    """Encodes and decodes pages of one layout.

    Args:
        layout: where the bytes sit.
        rotation_type: see :mod:`turboquant.codec.rotation`.
        seed: of the rotations.
        per_head_scale: True gives every token vector its own scale; False lets all heads of a token share one (a cruder
            variant for comparisons; the page keeps its size).
    """

    def __init__(
        self, layout: PageLayout, rotation_type: RotationType = "hadamard", seed: int = 0, per_head_scale: bool = True
    ) -> None:
        d = layout.head_dim
        self.layout, self.per_head_scale = layout, per_head_scale
        self.key_rotation: Rotation = get_rotation(d, rotation_type, stream_seed(seed, _KEY_STREAM))
        self.value_rotation: Rotation = get_rotation(d, rotation_type, stream_seed(seed, _VALUE_STREAM))
        self.sketch: Rotation = get_rotation(d, rotation_type, stream_seed(seed, _QJL_STREAM))

    # -- encode ---------------------------------------------------------------------------------------------------

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """Pages of whole groups of 64 tokens.

        Args:
            keys: (batch, heads, tokens, head_dim), already centred and balanced; tokens is a multiple of 64.
            values: the same shape.

        Returns:
            uint8 (batch, heads, tokens / 64, page_bytes).
        """
        lay = self.layout
        y = self.key_rotation.forward(keys)
        k_codes, k_scale = self._quantize(y, lay.key_bits, "key", least_squares=False)
        parts = [self._planes(k_codes, lay.key_bits)]
        norms: Tensor | None = None
        if lay.qjl:
            levels = _look_up(_levels_on(lay.key_bits, "key", y.device), k_codes)
            residual = y - levels * k_scale.float()[..., None]
            parts.append(self._planes(self.sketch.forward(residual).signbit().to(torch.uint8), 1))
            norms = tree_sum(residual * residual).sqrt().clamp(max=_HALF_MAX).half()
        v_codes, v_scale = self._quantize(self.value_rotation.forward(values), lay.value_bits, "value", least_squares=True)
        parts.append(self._planes(v_codes, lay.value_bits))
        parts += [self._as_bytes(s) for s in (k_scale, norms, v_scale) if s is not None]
        return torch.cat(parts, dim=-1)

    def _quantize(self, y: Tensor, bits: int, role: str, least_squares: bool) -> tuple[Tensor, Tensor]:
        """Codes (uint8, like y) and fp16 scales of rotated vectors."""
        norm2 = tree_sum(y * y)
        mean2 = norm2 if self.per_head_scale else norm2.mean(dim=1, keepdim=True)
        # A factor, not a division: torch divides by a number as IEEE says on the CPU, but not on CUDA.
        rms = (mean2 * (1.0 / self.layout.head_dim)).sqrt()
        middle, shifts, bounds = encoder_bounds(bits, role)
        # Keys have no shifts; zero times an infinite rms would be none.
        negative = (y - (rms * middle)[..., None] if middle else y).signbit()
        magnitude = torch.zeros_like(y, dtype=torch.uint8)
        counts = [(self.layout.head_dim - (below := negative.sum(-1).float()), below)]  # of this magnitude or a larger one
        for shift, bound in zip(shifts.tolist(), bounds.tolist(), strict=True):
            above = (y - (rms * shift)[..., None] if shift else y).abs() > (rms * bound)[..., None]
            magnitude += above
            below = (above & negative).sum(-1).float()
            counts.append((above.sum(-1).float() - below, below))
        codes = codes_of(magnitude, negative, bits)
        top = tree_sum(y * _look_up(_levels_on(bits, role, y.device), codes)) if least_squares else norm2
        bottom = torch.zeros_like(norm2)
        for k, pair in enumerate((magnitudes(bits, role) ** 2).T.tolist()):
            for sign, square in enumerate(pair):
                n = counts[k][sign] - counts[k + 1][sign] if k + 1 < len(counts) else counts[k][sign]
                bottom = bottom + n * square
        if not self.per_head_scale:
            top, bottom = (t.mean(dim=1, keepdim=True).expand_as(norm2) for t in (top, bottom))
        scale = top / bottom if least_squares else (top / bottom).sqrt()
        return codes, scale.clamp(-_HALF_MAX, _HALF_MAX).half()

    def _planes(self, codes: Tensor, bits: int) -> Tensor:
        return self.layout.pack(codes.reshape(*codes.shape[:2], -1, PAGE_TOKENS, codes.shape[-1]), bits)

    def _as_bytes(self, scale: Tensor) -> Tensor:
        return scale.reshape(*scale.shape[:2], -1, PAGE_TOKENS).contiguous().view(torch.uint8)

    # -- decode ---------------------------------------------------------------------------------------------------

    def decode_keys(self, pages: Tensor) -> Decoded:
        """Keys of ``pages`` (batch, heads, n, page_bytes) in the rotated domain, tokens in order."""
        lay = self.layout
        levels = self._levels(pages[..., lay.key_offset : lay.qjl_offset], lay.key_bits, "key")
        scale = self._scales(pages, lay.key_scale_offset)
        if not lay.qjl:
            return Decoded(levels, scale)
        bits = lay.unpack(pages[..., lay.qjl_offset : lay.value_offset], 1).flatten(2, 3)
        norm = self._scales(pages, lay.qjl_norm_offset)
        return Decoded(levels, scale, 1.0 - 2.0 * bits.float(), norm * math.sqrt(math.pi / (2 * lay.head_dim)))

    def decode_values(self, pages: Tensor) -> Decoded:
        """Values of ``pages`` in the rotated domain."""
        lay = self.layout
        levels = self._levels(pages[..., lay.value_offset : lay.key_scale_offset], lay.value_bits, "value")
        return Decoded(levels, self._scales(pages, lay.value_scale_offset))

    def dequantize(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) float32 (batch, heads, n * 64, head_dim); keys are still centred and balanced."""
        k, v = self.decode_keys(pages), self.decode_values(pages)
        key = k.levels * k.scale[..., None]
        if k.signs is not None and k.qjl_scale is not None:
            key = key + self.sketch.inverse(k.signs) * k.qjl_scale[..., None]
        return self.key_rotation.inverse(key), self.value_rotation.inverse(v.levels * v.scale[..., None])

    def _levels(self, planes: Tensor, bits: int, role: str) -> Tensor:
        codes = self.layout.unpack(planes, bits)
        return _look_up(_levels_on(bits, role, planes.device), codes).flatten(2, 3)

    def _scales(self, pages: Tensor, offset: int) -> Tensor:
        raw = pages[..., offset : offset + 2 * PAGE_TOKENS].contiguous()
        return raw.view(torch.float16).float().flatten(2)
