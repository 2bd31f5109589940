"""A ``transformers.Cache`` whose layers are packed."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from ...cache.cache import TurboQuantCache
from ...cache.exact import ExactLayer
from ...cache.layer import PackedLayer
from ...codec.center import Statistics
from ...config import TurboQuantConfig
from ...errors import CacheFileError, TurboQuantError
from .attention import NAME, PackedKV, register_attention
from .model import EXACT_BY_CONFIGURATION, LayerSpec, decoder_of, fingerprint, inspect_layers, layer_devices, text_config

if TYPE_CHECKING:
    from ...offload.store import TurboQuantStore

_HOOKED = "_turboquant_hooked"


class _StoreLayer(CacheLayerMixin):  # type: ignore[misc]
    """A cache layer of transformers over one of our stores."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, store: PackedLayer | ExactLayer, owner: HuggingFaceCache) -> None:
        super().__init__()
        self.store, self.owner = store, owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: stores take their shape from the first token."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append; returns what the model hands on to its attention function."""
        self.is_initialized = True
        self.store.append(key_states, value_states)
        if isinstance(self.store, PackedLayer) and self.owner.reads_packed:
            handle = PackedKV(self.store)
            return handle, handle
        self.owner.warn_slow_path()
        key, value = self.store.get()
        self.store.commit()
        return key, value

    @property
    def is_sliding(self) -> bool:
        """Whether the layer attends to a sliding window."""
        return getattr(self.store, "sliding_window", None) is not None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, index of the first key) of the coming call."""
        first = getattr(self.store, "first_token", 0)
        return self.store.length - first + query_length, first

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.store.length

    def get_max_length(self) -> int:
        """-1: a layer may grow without bound."""
        return getattr(self.store, "sliding_window", None) or -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.store.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch rows."""
        self.store.select_rows(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove ``-tokens_to_remove`` of the last tokens."""
        self.store.crop(self.store.length - abs(tokens_to_remove))


class ForeignLayer:
    """One of transformers' own cache layers, with the interface of our stores."""

    def __init__(self, layer: Any, reason: str) -> None:
        self.layer, self.reason = layer, reason

    @property
    def length(self) -> int:
        """Number of tokens seen."""
        return int(self.layer.get_seq_length()) if hasattr(self.layer, "get_seq_length") else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def batch_size(self) -> int:
        """Number of rows; 0 before the first token."""
        return max((int(t.shape[0]) for t in self.tensors().values()), default=0)

    def tensors(self) -> dict[str, Tensor]:
        """Keys and values, or the states of a linear-attention layer."""
        found: dict[str, Any] = {"keys": self.layer.keys, "values": self.layer.values} if hasattr(self.layer, "keys") else {}
        for name in ("conv_states", "recurrent_states"):
            found |= {f"{name}.{i}": t for i, t in enumerate(getattr(self.layer, name, None) or ())}
        return {n: t for n, t in found.items() if isinstance(t, Tensor)}

    def get(self) -> tuple[Tensor, Tensor]:
        """(key, value) held.

        Raises:
            TurboQuantError: the layer holds none.
        """
        t = self.tensors()
        if "keys" not in t:
            raise TurboQuantError(f"this layer holds no keys and values ({self.reason})")
        return t["keys"], t["values"]

    def export_state(self) -> dict[str, Tensor] | None:
        """Keys, values and length of a sliding layer; None for kinds of layers whose state cannot be rebuilt."""
        if type(self.layer) is not DynamicSlidingWindowLayer:
            return None
        state = {n: t.cpu().contiguous() for n, t in self.tensors().items()}
        return state | {"length": torch.tensor([self.length], dtype=torch.int64)}

    def import_state(self, state: dict[str, Tensor], device: torch.device | None) -> None:
        """Inverse of :meth:`export_state`."""
        key, value = state["keys"].to(device), state["values"].to(device)
        self.layer.lazy_initialization(key, value)
        self.layer.keys, self.layer.values = key, value
        self.layer.cumulative_length = int(state["length"][0])

    def check_crop(self, length: int) -> None:
        """Raise a TurboQuantError where transformers' sliding layers cannot go back."""
        window = getattr(self.layer, "sliding_window", None)
        if (
            window is not None
            and length < self.length
            and self.length >= window
            and not getattr(self.layer, "record_past", False)
        ):
            raise TurboQuantError(
                f"cannot crop to {length} tokens: an exact layer slides over {window} tokens and has dropped older ones; call "
                "activate_past_recording() before the tokens that may be taken back"
            )

    def crop(self, length: int) -> None:
        """Forget all tokens from index ``length`` on."""
        self.layer.crop(min(0, length - self.length))

    def select_rows(self, index: Tensor) -> None:
        """Replace the batch rows."""
        # batch_select_indices is missing on linear-attention layers; reorder_cache exists on all and indexes the same way.
        self.layer.reorder_cache(index)

    def reset(self) -> None:
        """Forget all tokens."""
        self.layer.reset()


class HuggingFaceCache(TurboQuantCache, Cache):  # type: ignore[misc]
    """Made by :meth:`TurboQuantCache.for_model`; a ``transformers.Cache`` with all methods of :class:`TurboQuantCache`."""

    def __init__(
        self,
        model: Any,
        specs: list[LayerSpec],
        config: TurboQuantConfig,
        name: str,
        statistics: Statistics | None,
        store: TurboQuantStore | None,
    ) -> None:
        stores: list[PackedLayer | ForeignLayer | ExactLayer] = []
        layers: list[Any] = []
        for i, spec in enumerate(specs):
            if not spec.reason:
                frozen = statistics.layers.get(i) if statistics is not None else None
                stores.append(
                    PackedLayer(spec.num_kv_heads, spec.head_dim, config, spec.bits, spec.rotary, spec.sliding_window, frozen)
                )
            elif spec.reason == EXACT_BY_CONFIGURATION and spec.sliding_window is None:
                stores.append(ExactLayer(spec.num_kv_heads, spec.head_dim))
            else:
                stores.append(ForeignLayer(spec.exact, spec.reason))
            last = stores[-1]
            layers.append(last.layer if isinstance(last, ForeignLayer) else _StoreLayer(last, self))
        Cache.__init__(self, layers=layers)
        self._setup(stores, config, dtype=model.dtype)
        self.devices = layer_devices(decoder_of(model), len(specs), model.device)
        self.specs, self.model_config = specs, text_config(model)
        self.model_fingerprint = name
        self.token_ids: list[int] = []
        self.store = store
        self._warned = False
        self._padding_open = True
        if store is not None:
            store.attach(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.name}, layers={len(self.layers)}, tokens={self.get_seq_length()})"

    @property
    def reads_packed(self) -> bool:
        """Whether the model's attention reads pages (``attn_implementation="turboquant"``)."""
        return bool(getattr(self.model_config, "_attn_implementation", None) == NAME)

    def warn_slow_path(self) -> None:
        """Say once that every call dequantizes the whole cache."""
        if not self._warned and not self.reads_packed and any(isinstance(s, PackedLayer) for s in self._stores):
            self._warned = True
            warnings.warn(
                "this model's attention cannot read packed pages, so every call dequantizes the whole cache (slow, and keys "
                'are not balanced). Load the model with attn_implementation="turboquant", or call '
                'model.set_attn_implementation("turboquant").',
                stacklevel=2,
            )

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store new tokens of one layer; returns what the model's attention function gets as key and value."""
        return self.layers[layer_idx].update(key, value, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen by a layer."""
        return int(Cache.get_seq_length(self, layer_idx))

    def reset(self) -> None:
        """Forget all tokens, and statistics measured on them."""
        TurboQuantCache.reset(self)
        self.token_ids, self._padding_open = [], True
        if self.store is not None:
            self.store.attach(self)

    def crop(self, length: int) -> None:
        """See :meth:`TurboQuantCache.crop`."""
        TurboQuantCache.crop(self, length)
        del self.token_ids[self.get_seq_length() :]
        if self.store is not None:
            self.store.rewind(self, self.get_seq_length())

    # -- called by the hooks on the model's decoder -----------------------------------------------------------------

    def begin_forward(self, new_tokens: int, position_ids: Tensor | None, attention_mask: Any) -> None:
        """Learn how far each row is padded, before the layers append their tokens.

        The centring offset of a token depends on its position, which is its index less the padding of its row.
        """
        past, stop = self.get_seq_length(), self.get_seq_length() + new_tokens
        # Prepared masks (4-D, or one per kind of layer) say nothing of padding that could be read here.
        mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
        if past and mask is not None and mask.shape[1] < stop:
            # Some versions of transformers (5.17) feed a prompt anew in generate(prefill_chunk_size=...) though the cache is
            # filled. The tokens would be stored twice and the answer be wrong, silently.
            raise TurboQuantError(
                f"the attention mask covers {mask.shape[1]} tokens, but the cache holds {past} and {new_tokens} are "
                "fed: either the prompt is fed again though the cache is filled (generate(prefill_chunk_size=...) does that in "
                "older transformers; use turboquant.prefill instead), or the mask is too short"
            )
        if not self._padding_open or position_ids is None or position_ids.dim() != 2:
            return
        starts = stop - 1 - position_ids[:, -1].long()
        open_rows = torch.zeros_like(starts, dtype=torch.bool)
        if mask is not None and mask.shape[1] >= stop:
            open_rows = mask[:, stop - 1].to(starts.device) == 0
            starts = torch.where(open_rows, torch.full_like(starts, stop), starts)
        previous = next((s.starts for s in self._stores if isinstance(s, PackedLayer)), None)
        if past:
            # Rows that already had a real token keep their padding.
            old = torch.zeros_like(starts) if previous is None else previous.to(starts.device)
            starts = torch.where(old >= past, starts, old.expand_as(starts))
        self._padding_open = bool(open_rows.any())
        for s in self._stores:
            if isinstance(s, PackedLayer):
                s.starts = starts if bool((starts != 0).any()) else None

    def end_forward(self, input_ids: Tensor | None, attention_mask: Any = None) -> None:
        """Note the tokens that were stored and save complete chunks."""
        if self.store is None:
            return
        plain = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2)
        if not plain or (attention_mask is not None and not bool(attention_mask.all())):
            # Hidden tokens change what the others hold, and a key names token ids alone.
            self.store.detach(self, "masked tokens are not stored")
            return
        if input_ids is None or input_ids.shape[0] != 1:
            self.store.detach(self, "only single sequences of token ids are stored")
            return
        self.token_ids += input_ids[0].tolist()
        self.store.save(self, self.token_ids)


def _before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, HuggingFaceCache):
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is not None:
            cache.begin_forward(tokens.shape[1], kwargs.get("position_ids"), kwargs.get("attention_mask"))


def _after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, HuggingFaceCache):
        cache.end_forward(kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask"))


def cache_for_model(
    model: Any,
    config: TurboQuantConfig,
    statistics: Statistics | str | os.PathLike[str] | None = None,
    store: TurboQuantStore | None = None,
) -> HuggingFaceCache:
    """See :meth:`TurboQuantCache.for_model`."""
    register_attention()
    specs = inspect_layers(model, config)
    name = fingerprint(model)
    if isinstance(statistics, (str, os.PathLike)):
        statistics = Statistics.load(statistics)
    if statistics is not None and statistics.model not in ("", name):
        raise CacheFileError("these statistics were measured on another model; measure them again for this one")
    decoder = decoder_of(model)
    if not getattr(decoder, _HOOKED, False):
        decoder.register_forward_pre_hook(_before, with_kwargs=True)
        decoder.register_forward_hook(_after, with_kwargs=True)
        setattr(decoder, _HOOKED, True)
    return HuggingFaceCache(model, specs, config, name, statistics, store)
