"""The interface that all vector quantizers share, and the checks of their arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import ConfigError, ShapeError
from ..rotation import MAX_DIM, splitmix64

FP16_BITS = 16
_HALF_MAX = 65504.0


@dataclass(frozen=True)
class Encoded:
    """What a quantizer stores for a batch of vectors; ``...`` is the batch shape.

    Attributes:
        codes: named uint8 tensors (..., n): indices of codebook levels, or sign bits (1 means negative). One byte each
            here, for clarity; ``bits_per_element`` counts the bits that an index needs.
        scales: named fp16 tensors: norms, of shape (...) or, for one per block, (..., blocks).
        shared: named tensors stored once for the whole batch; ``bits_per_element`` leaves them out.
    """

    codes: dict[str, Tensor]
    scales: dict[str, Tensor]
    shared: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class VectorQuantizer(ABC):
    """Maps vectors of R^d to a few bits per element and back.

    The constructor arguments are the whole configuration: equal objects encode and decode alike, on every device. Nothing
    is learned from data. Norms are stored in fp16, so vectors longer than 65504 come back shorter, and vectors shorter
    than about 1e-4 lose precision.

    Args:
        dim: length ``d`` of the vectors.
        seed: of the random rotation or projection; any integer (keyword only).
    """

    dim: int
    seed: int = field(default=0, kw_only=True)

    @property
    @abstractmethod
    def bits_per_element(self) -> float:
        """Stored bits per vector element, exactly: index and sign bits plus 16 for each fp16 number, over ``d``."""

    def encode(self, x: Tensor) -> Encoded:
        """Quantize vectors.

        Args:
            x: (..., d), any floating dtype; taken as float32, without gradient.

        Raises:
            ShapeError: the last axis is not ``d`` long, or ``x`` is not floating.
        """
        self._check(x, "x")
        with torch.no_grad():
            # Contiguous, because a matrix product may round otherwise for other strides.
            return self._encode(x.float().contiguous())

    @abstractmethod
    def _encode(self, x: Tensor) -> Encoded:
        """:meth:`encode` of a checked, contiguous float32 tensor."""

    @abstractmethod
    def decode(self, encoded: Encoded) -> Tensor:
        """Float32 (..., d) vectors from what :meth:`encode` of an equal quantizer returned."""

    def inner_product(self, query: Tensor, encoded: Encoded) -> Tensor:
        """Estimates of ``<query, x>`` for the encoded vectors ``x``; the query is not quantized.

        Args:
            query: (..., d), any floating dtype; its batch shape broadcasts with that of ``encoded``.
            encoded: from :meth:`encode`.

        Returns:
            float32, of the broadcast batch shape.

        Raises:
            ShapeError: the last axis of ``query`` is not ``d`` long, or ``query`` is not floating.
        """
        self._check(query, "query")
        return (query.float() * self.decode(encoded)).sum(-1)

    def _check(self, x: Tensor, name: str) -> None:
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}, but this quantizer was made for vectors of length {self.dim}: "
                f"pass (..., {self.dim}) or make one with the dim of your vectors"
            )
        if not x.is_floating_point():
            raise ShapeError(f"{name} has dtype {x.dtype}; pass a floating tensor, for example {name}.float()")


def to_fp16(scale: Tensor) -> Tensor:
    """``scale`` in fp16; values out of range become the largest fp16 number rather than infinity."""
    return scale.clamp(-_HALF_MAX, _HALF_MAX).half()


def check_int(name: str, value: int, low: int, high: int) -> None:
    """Raise :class:`ConfigError` unless ``value`` is an integer in [low, high]."""
    if not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r} cannot work; choose a whole number from {low} to {high}")


def check_dim(value: int, low: int = 1) -> None:
    """Raise :class:`ConfigError` unless vectors of length ``value`` can be rotated."""
    check_int("dim", value, low, MAX_DIM)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")


def derived_seed(seed: int, stream: int) -> int:
    """Seed number ``stream`` (from 0) of those that one configuration needs.

    A quantizer with two random matrices must not draw them from one seed: a sketch that repeats the rotation's numbers
    is not independent of the residual, and the estimate is then biased.
    """
    return int(splitmix64(seed, stream + 1)[stream])
