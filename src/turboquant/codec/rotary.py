"""Rotary position embeddings as the codec needs them: pure rotations of channel pairs, by position.

Key centring subtracts ``R_p mu`` from the key at position p. Only quality depends on R being the model's own: encoder and
decoder use the same R, so a different one would still be added back exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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

    @property
    def rotary_dim(self) -> int:
        """Number of rotated channels."""
        return 2 * int(self.inv_freq.shape[0])

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), float32 (..., pairs), for integer ``positions`` (...). Angles are taken in float64."""
        # MPS and some accelerators lack float64; angles are tiny tensors, so they are made on the CPU.
        angle = positions.cpu().double()[..., None] * self.inv_freq.cpu()
        return angle.cos().float().to(positions.device), angle.sin().float().to(positions.device)

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
