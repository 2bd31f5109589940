"""Key centring and balance: what makes few bits enough for real keys.

*Centring* subtracts the part of the keys that all tokens share. Models with a key bias (Qwen2) put most of the key energy
there; subtracting R_p mu, with mu the mean of the un-rotated keys, leaves what tells tokens apart.
*Balance* multiplies key channel j by s_j = (q_rms_j / k_rms_j)^e and divides the query by it: the rotation then spreads
the error where queries are small.

Both are properties of the model, not of the text: measured on the first tokens, then frozen; they can be saved and reused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import MAX_STATISTICS_TOKENS, KeyCenter
from ..errors import CacheFileError
from .layout import PAGE_TOKENS
from .rotary import Rotary

#: Attention sinks have unlike norms and would dominate the mean squares; the first tokens are left out of the balance.
_SKIP_FOR_BALANCE = 4
_FORMAT = "turboquant-statistics-1"


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Frozen statistics of one layer.

    Attributes:
        mean: (heads, head_dim) float32, mean of the un-rotated keys (of the keys as they are without a rotary embedding).
        balance: (heads, head_dim) float32 with geometric mean 1 per head, or None (no balance).
    """

    mean: Tensor
    balance: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.mean.nbytes + (self.balance.nbytes if self.balance is not None else 0)


@dataclass(frozen=True, eq=False)
class KeyTransform:
    """Centring and balance of one layer's keys; the identity where ``statistics`` is None.

    The offset of token j of a page whose first position is p is taken in two float32 steps, ``R_p (R_j mu)``: first the table
    of ``R_j mu``, j < 64, then one turn by the page's angles. Kernels do the same, so all find the same bits.

    Positions given to the methods are (rows, tokens), consecutive within a row and beginning with a page: every 64th of them
    is the first position of a page (negative at left padding).

    Args:
        statistics: frozen statistics, or None for ``key_center="none"``.
        rotary: the layer's rotary embedding, or None (a constant mean).
    """

    statistics: KeyStatistics | None
    rotary: Rotary | None
    _held: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes held: statistics, and the tables made of them so far."""
        own = () if self.statistics is None else (self.statistics.mean, self.statistics.balance)
        held = {t.untyped_storage().data_ptr(): t.nbytes for t in (*own, *self._held.values()) if t is not None}
        return sum(held.values())

    def table(self, device: torch.device) -> Tensor | None:
        """R_j mu for j < 64, float32 (heads, 64, head_dim), contiguous; made once per device. None without statistics."""
        if self.statistics is None:
            return None
        if ("table", device) not in self._held:
            with torch.inference_mode(False):  # shared by all later calls, whatever mode the first was in
                mean = self.statistics.mean.detach().to(device, torch.float32)[:, None].expand(-1, PAGE_TOKENS, -1)
                if self.rotary is not None:
                    cos, sin = self.rotary.cos_sin(torch.arange(PAGE_TOKENS))
                    mean = self.rotary.apply(mean, cos.to(device), sin.to(device))
                self._held["table", device] = mean.contiguous()
        return self._held["table", device]

    def balance(self, device: torch.device) -> Tensor | None:
        """The balance on ``device``, float32 (heads, head_dim), made once; None without one."""
        if self.statistics is None or self.statistics.balance is None:
            return None
        if ("balance", device) not in self._held:
            with torch.inference_mode(False):
                self._held["balance", device] = self.statistics.balance.detach().to(device, torch.float32).contiguous()
        return self._held["balance", device]

    def page_offset(self, cos: Tensor, sin: Tensor) -> Tensor | None:
        """R_p mu of whole pages, float32 (rows, heads, pages * 64, head_dim), given cos and sin (rows, pages, pairs) at
        their first positions (see :class:`~turboquant.codec.rotary.PageAngles`; ignored for a constant mean).
        """
        table = self.table(cos.device)
        if table is None:
            return None
        rows, pages = cos.shape[:2]
        spread = table[None, :, None]
        if self.rotary is not None:
            spread = self.rotary.apply(spread, cos[:, None, :, None], sin[:, None, :, None])
        return spread.expand(rows, -1, pages, -1, -1).flatten(2, 3)

    def offset(self, positions: Tensor) -> Tensor | None:
        """R_p mu, float32 (rows, heads, tokens, head_dim), for ``positions`` (rows, tokens) from a page's first on."""
        if self.statistics is None:
            return None
        first = positions[:, ::PAGE_TOKENS]
        cos, sin = (first[..., None],) * 2 if self.rotary is None else self.rotary.cos_sin(first)
        offset = self.page_offset(cos, sin)
        return None if offset is None else offset[:, :, : positions.shape[1]]

    def coded_offset(self, positions: Tensor) -> Tensor | None:
        """The balanced offset: what balanced keys have more than coded ones, like :meth:`offset`."""
        offset, s = self.offset(positions), self._factors(positions.device)
        return offset if offset is None or s is None else offset * s

    def forward(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys (batch, heads, tokens, head_dim) as they are coded: centred, then balanced, float32."""
        offset = self.offset(positions)
        x = keys.float() if offset is None else keys.float() - offset
        return x if (s := self._factors(keys.device)) is None else x * s

    def inverse(self, coded: Tensor, positions: Tensor) -> Tensor:
        """Undo :meth:`forward`."""
        s = self._factors(coded.device)
        x = coded if s is None else coded / s
        offset = self.offset(positions)
        return x if offset is None else x + offset

    def scale_query(self, grouped: Tensor) -> Tensor:
        """Queries (batch, kv heads, group, tokens, head_dim) divided by the balance, to meet coded keys."""
        s = self._factors(grouped.device)
        return grouped if s is None else grouped / s[:, None]

    def _factors(self, device: torch.device) -> Tensor | None:
        s = self.balance(device)
        return None if s is None else s[:, None, :]


def unrotate(keys: Tensor, positions: Tensor, rotary: Rotary | None) -> Tensor:
    """Keys (batch, heads, tokens, head_dim) turned back to position 0, float32."""
    if rotary is None:
        return keys.float()
    cos, sin = rotary.cos_sin(positions)
    return rotary.apply(keys.float(), cos[:, None], -sin[:, None])


def measure(
    keys: Tensor, positions: Tensor, rotary: Rotary | None, query_square: Tensor | None, exponent: float
) -> KeyStatistics:
    """Statistics from the first tokens of one layer.

    Args:
        keys: (batch, heads, tokens, head_dim) as the model hands them over (after the rotary embedding).
        positions: (batch, tokens); negative at padding, which is left out.
        rotary: the layer's rotary embedding, or None.
        query_square: (heads, head_dim) mean square of the queries that read each KV head, or None (no balance).
        exponent: of the balance; 0 turns it off.
    """
    valid = positions >= 0
    weight = valid[:, None, :, None].float()
    plain = unrotate(keys, positions, rotary) * weight
    mean = plain.sum((0, 2)) / weight.sum((0, 2)).clamp_min(1.0)
    if query_square is None or not exponent:
        return KeyStatistics(mean)
    # Balance acts on keys after the rotary embedding, so its mean squares are taken there.
    centred = keys.float() - _turn(mean, positions, rotary)
    used = (positions >= min(_SKIP_FOR_BALANCE, keys.shape[2] - 1))[:, None, :, None].float()
    k_rms = ((centred.square() * used).sum((0, 2)) / used.sum((0, 2)).clamp_min(1.0)).sqrt().clamp_min(1e-6)
    q_rms = query_square.sqrt().clamp_min(1e-6)
    log = exponent * (q_rms / k_rms).log()
    return KeyStatistics(mean, (log - log.mean(-1, keepdim=True)).exp())


def _turn(mean: Tensor, positions: Tensor, rotary: Rotary | None) -> Tensor:
    """R_p mu directly, for any positions (before there are pages)."""
    spread = mean[None, :, None]
    if rotary is None:
        return spread
    cos, sin = rotary.cos_sin(positions)
    return rotary.apply(spread, cos[:, None], sin[:, None])


class QuerySquares:
    """Running mean square of the queries of one layer, per KV head and channel, over the first tokens."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0.0

    def add(self, query: Tensor, num_kv_heads: int, positions: Tensor) -> None:
        """Add queries (batch, query heads, tokens, head_dim) at ``positions`` (batch, tokens; negative is padding)."""
        used = (positions >= _SKIP_FOR_BALANCE) & (positions < MAX_STATISTICS_TOKENS)
        weight = used[:, None, None, :, None].float()
        b, h, t, d = query.shape
        grouped = query.float().view(b, num_kv_heads, h // num_kv_heads, t, d)
        total = (grouped.square() * weight).sum((0, 2, 3))
        self.total = total if self.total is None else self.total + total
        self.count += float(used.sum()) * (h // num_kv_heads)

    def mean(self) -> Tensor | None:
        """(heads, head_dim) mean square, or None before any query was seen."""
        return None if self.total is None or not self.count else self.total / self.count


@dataclass(eq=False)
class Statistics:
    """Statistics of all layers of a model, to save and reuse.

    Attributes:
        layers: layer index -> frozen statistics; empty until they were measured.
        key_center: how the means are meant (``"rope_mean"`` or ``"mean"``).
        model: fingerprint of the model, or "" when unknown.
    """

    layers: dict[int, KeyStatistics] = field(default_factory=dict)
    key_center: KeyCenter = "rope_mean"
    model: str = ""

    def tensors(self) -> dict[str, Tensor]:
        """Contiguous CPU tensors by name, in a fixed order."""
        out: dict[str, Tensor] = {}
        for i, s in sorted(self.layers.items()):
            out[f"{i}.mean"] = s.mean.cpu().contiguous()
            if s.balance is not None:
                out[f"{i}.balance"] = s.balance.cpu().contiguous()
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], key_center: KeyCenter, model: str) -> Statistics:
        """Inverse of :meth:`tensors`."""
        layers = {
            int(name[: -len(".mean")]): KeyStatistics(mean, tensors.get(name[: -len("mean")] + "balance"))
            for name, mean in tensors.items()
            if name.endswith(".mean")
        }
        return cls(layers, key_center, model)

    def digest(self) -> str:
        """Hex digest of the values; equal digests mean interchangeable pages."""
        h = hashlib.blake2b(self.key_center.encode(), digest_size=16)
        for name, t in self.tensors().items():
            h.update(f"{name}{tuple(t.shape)}".encode())
            h.update(t.numpy().tobytes())
        return h.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        meta = {"format": _FORMAT, "key_center": self.key_center, "model": self.model, "digest": self.digest()}
        save_file(self.tensors(), str(path), metadata={"turboquant": json.dumps(meta)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read a file of :meth:`save`.

        Raises:
            CacheFileError: missing, damaged, or not a statistics file.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise CacheFileError(f"{path}: there is no statistics file")
        try:
            with safe_open(str(path), framework="pt") as f:
                meta: dict[str, Any] = json.loads((f.metadata() or {})["turboquant"])
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (not a dict)
            stats = cls.from_tensors(tensors, meta["key_center"], meta["model"])
        except (SafetensorError, KeyError, ValueError, TypeError) as e:
            raise CacheFileError(f"{path}: not a statistics file of this package ({e})") from None
        if meta.get("format") != _FORMAT or stats.digest() != meta.get("digest"):
            raise CacheFileError(f"{path}: the statistics are damaged or of another version; measure and save them again")
        return stats
