"""The cache of all layers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..codec.center import Statistics
from ..codec.layout import PageLayout
from ..codec.rotary import Rotary
from ..config import EXACT_BITS, TurboQuantConfig
from ..errors import ConfigError, ShapeError, TurboQuantError
from .exact import ExactLayer
from .layer import PackedLayer

if TYPE_CHECKING:
    from ..offload.store import TurboQuantStore


class TurboQuantCache:
    """Keys and values of a model, packed at 1 to 4 bits beyond an exact window.

    Example:
        >>> config = TurboQuantConfig(n_bits=3)
        >>> cache = TurboQuantCache(num_layers=2, num_kv_heads=4, head_dim=64, config=config)
        >>> cache.update(layer_idx=0, key=torch.randn(1, 4, 300, 64), value=torch.randn(1, 4, 300, 64))
        >>> key, value = cache.get(layer_idx=0)
        >>> key.shape
        torch.Size([1, 4, 300, 64])

    For Hugging Face models use :meth:`for_model`, which returns a subclass that is a ``transformers.Cache``.

    Args:
        num_layers, num_kv_heads, head_dim: shape of the model's cache.
        config: the recipe, or the name of a preset; ``TurboQuantConfig()`` by default.
        device: where tokens must come from; None accepts the device of the first token.
        dtype: their dtype; None accepts that of the first token.
        rotary: the model's rotary embedding, one for all layers, for ``key_center="rope_mean"``.
        statistics: statistics measured earlier; without them they are measured on the first tokens.

    Raises:
        ConfigError: a setting cannot work for this shape.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        config: TurboQuantConfig | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rotary: Rotary | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        config = resolve_config(config)
        for name, n in (("num_layers", num_layers), ("num_kv_heads", num_kv_heads)):
            if not isinstance(n, int) or n < 1:
                raise ConfigError(f"{name}={n!r} must be a positive integer")
        layers: list[PackedLayer | ExactLayer] = []
        for i in range(num_layers):
            bits = config.bits_of_layer(i, num_layers)
            if bits[0] == EXACT_BITS:
                layers.append(ExactLayer(num_kv_heads, head_dim))
            else:
                frozen = statistics.layers.get(i) if statistics is not None else None
                layers.append(PackedLayer(num_kv_heads, head_dim, config, bits, rotary, None, frozen))
        self._setup(layers, config, device, dtype)

    def _setup(
        self,
        stores: Sequence[Any],
        config: TurboQuantConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config = config
        self.model_fingerprint = ""
        self._stores = list(stores)
        self._device = None if device is None else torch.device(device)
        self._dtype = dtype
        self._session: object = None  # of the store that saves this cache

    @classmethod
    def for_model(
        cls,
        model: Any,
        preset: TurboQuantConfig | str = "turboquant_3bit",
        *,
        statistics: Statistics | str | os.PathLike[str] | None = None,
        store: TurboQuantStore | None = None,
    ) -> TurboQuantCache:
        """A cache for a Hugging Face causal language model: ``model.generate(..., past_key_values=cache)``.

        Args:
            model: a ``transformers`` model. With ``attn_implementation="turboquant"`` attention reads packed pages directly;
                with any other the cache hands out dequantized tensors (slow, and says so once).
            preset: a preset's name or a configuration.
            statistics: statistics measured earlier, or the path of a file of them.
            store: save full chunks of tokens to this store while generating; see
                :meth:`~turboquant.offload.store.TurboQuantStore.restore`.

        Raises:
            UnsupportedModelError: with the reason.
        """
        from ..integrations.huggingface import cache_for_model

        return cache_for_model(model, resolve_config(preset), statistics, store)

    # -- content --------------------------------------------------------------------------------------------------

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store new tokens of one layer.

        Args:
            key, value: (batch, heads, tokens, head_dim), float32, float16 or bfloat16.
            layer_idx: the layer.
            args, kwargs: ignored (models of ``transformers`` may pass more).

        Raises:
            ShapeError: the tensors do not fit the cache; the message says what was expected.
        """
        store = self._store(layer_idx)
        if self._device is not None and (key.device.type, key.device.index or 0) != (
            self._device.type,
            self._device.index or 0,
        ):
            raise ShapeError(f"the cache is on {self._device} but the key on {key.device}; move one of them")
        if self._dtype is not None and key.dtype != self._dtype:
            raise ShapeError(f"the cache holds {self._dtype} but the key is {key.dtype}; convert it or change dtype")
        store.append(key, value)
        store.commit()

    def get(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """(key, value) of one layer, dequantized, (batch, heads, tokens, head_dim), in the model's dtype.

        Raises:
            TurboQuantError: nothing was stored yet, or there is no such layer.
        """
        key, value = self._store(layer_idx).get()
        return key, value

    def _store(self, layer_idx: int) -> Any:
        if not -len(self._stores) <= layer_idx < len(self._stores):
            raise TurboQuantError(f"there is no layer {layer_idx}; the cache has {len(self._stores)}")
        return self._stores[layer_idx]

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self._stores)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen by a layer."""
        return int(self._store(layer_idx).length)

    # -- edit -----------------------------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens; a negative number removes that many of the last ones, 0 changes nothing.

        (Like ``transformers``, where ``crop(-n)`` takes back n speculative tokens.)

        Raises:
            TurboQuantError: a sliding layer no longer holds the tokens its window would need; nothing is changed.
        """
        length = int(length)  # some versions of transformers pass a tensor
        seen = max((s.length for s in self._stores), default=0)
        target = seen if length == 0 else length if length > 0 else max(0, seen + length)
        for s in self._stores:
            if hasattr(s, "check_crop"):
                s.check_crop(target)
        for s in self._stores:
            s.crop(target)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch rows by rows ``beam_idx`` (beam search)."""
        for s in self._stores:
            s.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows ``indices``."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row ``repeats`` times."""
        for s in self._stores:
            s.select_rows(torch.arange(s.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget all tokens, and statistics measured on them."""
        for s in self._stores:
            s.reset()

    # -- facts ----------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all storage really held: pages, exact windows and layers, statistics."""
        return sum(int(s.nbytes) for s in self._stores)

    @property
    def exact_nbytes(self) -> int:
        """Bytes that the same tokens would take in the model's dtype."""
        return sum(_elements(s) * _item_size(s) for s in self._stores)

    @property
    def bits_per_element(self) -> float:
        """Nominal stored bits per cached number beyond the window: codes and scales, averaged over the layers."""
        bits = [(_nominal(s), s.num_kv_heads * s.head_dim) for s in self._stores if hasattr(s, "num_kv_heads")]
        return float(sum(b * w for b, w in bits) / sum(w for _, w in bits))

    @property
    def effective_bits(self) -> float:
        """``nbytes`` in bits per cached number at the current length: window, statistics and all. 0 while empty."""
        elements = sum(_elements(s) for s in self._stores)
        return self.nbytes * 8 / elements if elements else 0.0

    @property
    def statistics(self) -> Statistics:
        """The frozen key statistics of the layers that have them: ``cache.statistics.save(path)``."""
        layers = {i: s.statistics for i, s in enumerate(self._stores) if isinstance(s, PackedLayer) and s.statistics}
        return Statistics(layers, self.config.key_center, self.model_fingerprint)

    def summary(self) -> str:
        """A readable report: what each layer stores and why, bytes held, nominal and effective bits."""
        from .summary import summary

        return summary(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole cache to one checksummed file, as it is (packed pages, exact window, statistics)."""
        from ..offload.snapshot import save_cache

        save_cache(self, path)

    def load(self, path: str | os.PathLike[str]) -> TurboQuantCache:
        """Replace the content by that of a file of :meth:`save`, on ``device``; returns self.

        Raises:
            CacheFileError: missing, damaged, or of another model or configuration. The cache is then unchanged.
        """
        from ..offload.snapshot import load_cache

        load_cache(self, path)
        return self

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> TurboQuantCache:
        """A cache with the shape, configuration and content of a file of :meth:`save`, without its model.

        Raises:
            CacheFileError: missing or damaged.
        """
        from ..offload.snapshot import cache_from_file

        return cache_from_file(TurboQuantCache, path, device)


def resolve_config(config: TurboQuantConfig | str | None) -> TurboQuantConfig:
    """A configuration from itself, a preset's name or None (the default)."""
    if config is None:
        return TurboQuantConfig()
    if isinstance(config, str):
        return TurboQuantConfig.preset(config)
    if not isinstance(config, TurboQuantConfig):
        raise ConfigError(f"config={config!r} must be a TurboQuantConfig or the name of a preset")
    return config


def _elements(store: Any) -> int:
    if not hasattr(store, "num_kv_heads"):
        return 0
    held = store.length - getattr(store, "first_token", 0)
    return 2 * int(store.batch_size * store.num_kv_heads * held * store.head_dim)


def _item_size(store: Any) -> int:
    tensor = store.get()[0] if isinstance(store, ExactLayer) and store.length else None
    dtype = tensor.dtype if tensor is not None else getattr(store, "dtype", torch.get_default_dtype())
    return int(dtype.itemsize)


def _nominal(store: Any) -> float:
    layout = getattr(store, "layout", None)
    return layout.bits_per_element if isinstance(layout, PageLayout) else 8.0 * _item_size(store)
