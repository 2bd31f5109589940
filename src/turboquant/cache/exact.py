"""A layer kept exact on purpose: a plain growing tensor with the interface of :class:`~turboquant.cache.layer.PackedLayer`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import TurboQuantError
from .checks import check_tokens


class ExactLayer:
    """Keys and values of one layer in the model's dtype.

    Args:
        num_kv_heads, head_dim: shape of the layer.
    """

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return 0 if self.key is None else self.key.shape[2]

    @property
    def batch_size(self) -> int:
        """Number of rows; 0 before the first token."""
        return 0 if self.key is None else self.key.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.key is None or self.value is None else self.key.nbytes + self.value.nbytes

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add tokens, (batch, heads, tokens, head_dim) each.

        Raises:
            ShapeError: another shape, dtype or device than the cache holds.
        """
        check_tokens(key, value, self.num_kv_heads, self.head_dim, self.key)
        if self.key is None or self.value is None:
            self.key, self.value = key.clone(), value.clone()
            return
        self.key, self.value = torch.cat((self.key, key), dim=2), torch.cat((self.value, value), dim=2)

    def commit(self) -> None:
        """Nothing is pending in an exact layer."""

    def get(self) -> tuple[Tensor, Tensor]:
        """(key, value) of all tokens.

        Raises:
            TurboQuantError: the layer is empty.
        """
        if self.key is None or self.value is None:
            raise TurboQuantError("the cache is empty: nothing was stored yet")
        return self.key, self.value

    def crop(self, length: int) -> None:
        """Forget all tokens from index ``length`` on."""
        if not length:
            self.reset()
        elif self.key is not None and self.value is not None and length < self.length:
            self.key, self.value = self.key[:, :, :length].clone(), self.value[:, :, :length].clone()

    def select_rows(self, index: Tensor) -> None:
        """Replace the batch rows by rows ``index``."""
        if self.key is not None and self.value is not None:
            index = index.to(self.key.device)
            self.key, self.value = self.key.index_select(0, index), self.value.index_select(0, index)

    def reset(self) -> None:
        """Forget all tokens."""
        self.key = self.value = None
