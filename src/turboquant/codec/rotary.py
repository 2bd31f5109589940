"""Rotary position embeddings as the codec needs them: pure rotations of channel pairs, by position.

Key centring subtracts ``R_p mu`` from the key at position p. Only quality depends on R being the model's own: encoder and
decoder use the same R, so a different one would still be added back exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .layout import PAGE_TOKENS

Pairing = Literal["half", "interleaved"]


@dataclass(frozen=True, eq=False)
class Rotary:
    """A rotary embedding of the first ``2 * len(inv_freq)`` channels; further channels are left alone.

    Args:
        inv_freq: (pairs,) angle per position of each channel pair, float64. Scaling of any kind (llama3, yarn, linear) is
            part of these numbers; amplitude factors are not (they multiply keys and mean alike).
        pairing: ``"half"`` pairs channel i with i + pairs (Llama, NeoX), ``"interleaved"`` 2 i with 2 i + 1 (GPT-J, GLM).
    """

    inv_freq: Tensor
    pairing: Pairing = "half"
    _angles: dict[torch.device, PageAngles] = field(default_factory=dict, init=False, repr=False)

    @property
    def rotary_dim(self) -> int:
        """Number of rotated channels."""
        return 2 * int(self.inv_freq.shape[0])

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), float32 (..., pairs), for integer ``positions`` (...). Angles are taken in float64."""
        # MPS and some accelerators lack float64; angles are tiny tensors, so they are made on the CPU.
        angle = positions.cpu().double()[..., None] * self.inv_freq.cpu()
        return angle.cos().float().to(positions.device), angle.sin().float().to(positions.device)

    def page_angles(self, device: torch.device, starts: Tensor | None = None) -> PageAngles:
        """Angles of page starts on ``device``: shared by all callers without ``starts``, else made anew (keep them)."""
        if starts is not None:
            return PageAngles(self, device, starts)
        if device not in self._angles:
            self._angles[device] = PageAngles(self, device)
        return self._angles[device]

    def page_table(self, device: torch.device, pages: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), float32 (pages, pairs), at positions 0, 64, 128, ...; views of a kept table, no sync when warm."""
        table = self.page_angles(device).get(pages)[0, :pages]
        return table[..., 0], table[..., 1]

    def apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate ``x`` (..., head_dim) by the angles of ``cos`` and ``sin`` (..., pairs); pass ``-sin`` for the inverse."""
        r = self.rotary_dim
        if self.pairing == "half":
            a, b = x[..., : r // 2], x[..., r // 2 : r]
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        else:
            a, b = x[..., 0:r:2], x[..., 1:r:2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        if r == x.shape[-1]:
            return turned
        return torch.cat((turned, x[..., r:].expand(*turned.shape[:-1], -1)), dim=-1)


class PageAngles:
    """cos and sin at the first position of every page, kept on a device and grown when more pages are asked for.

    They are made on the CPU in float64, so all devices hold the same float32 numbers.

    Args:
        rotary: the embedding.
        device: where the table is held.
        starts: (rows,) integers, index of the first real token of each row (left padding): page i of a row starts at
            position ``64 i - start``. None: one row for all, at positions ``64 i``.
    """

    def __init__(self, rotary: Rotary, device: torch.device, starts: Tensor | None = None) -> None:
        self._rotary, self._device = rotary, device
        self._starts = torch.zeros(1, dtype=torch.long) if starts is None else starts.detach().cpu().long()
        self._table: Tensor | None = None

    def get(self, pages: int) -> Tensor:
        """float32 (rows or 1, at least ``pages``, pairs, 2 = cos and sin), contiguous."""
        if self._table is None or self._table.shape[1] < pages:
            have = 0 if self._table is None else self._table.shape[1]
            count = max(pages, 2 * have, 64)
            with torch.inference_mode(False):  # shared by all later calls, whatever mode the first was in
                first = torch.arange(count)[None] * PAGE_TOKENS - self._starts[:, None]
                self._table = torch.stack(self._rotary.cos_sin(first), dim=-1).to(self._device)
        return self._table
