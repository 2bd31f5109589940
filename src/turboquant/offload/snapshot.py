"""Whole caches in one file: a container (container.py) whose payload is a safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..cache.layer import PackedLayer
from ..cache.state import export_state, import_state
from ..codec.center import Statistics
from ..codec.rotary import Rotary
from ..config import TurboQuantConfig
from ..errors import CacheFileError, TurboQuantError
from .container import Damaged, Kind, read, write

if TYPE_CHECKING:
    from ..cache.cache import TurboQuantCache

_SETTINGS = "settings"
_ADVICE = {
    "missing": "there is no such file",
    "unreadable": "the file cannot be read",
    "truncated": "the file is cut off or has bytes appended",
    "magic": "not a saved cache of this package",
    "header": "the header is damaged",
    "version": "written by an incompatible version of this package",
    "kind": "not a whole cache but an object of a store",
    "payload": "the content is damaged (checksum)",
}


def _namespace(settings: bytes) -> bytes:
    return hashlib.blake2b(settings, digest_size=32, person=b"tq-snapshot").digest()


def save_cache(cache: TurboQuantCache, path: str | os.PathLike[str]) -> None:
    """See :meth:`TurboQuantCache.save`.

    Raises:
        TurboQuantError: a layer's state cannot be saved (linear attention), or the file cannot be written.
    """
    tensors: dict[str, Tensor] = {f"statistics/{n}": t for n, t in cache.statistics.tensors().items()}
    rotaries: dict[str, str] = {}
    for i, store in enumerate(cache._stores):
        if store.length:
            state = export_state(store, store.length)
            if state is None:
                raise TurboQuantError(f"layer {i} cannot be saved: {getattr(store, 'reason', 'its state is not kept')}")
            tensors |= {f"{i}/{n}": t for n, t in state.items()}
        if isinstance(store, PackedLayer) and store.rotary is not None:
            tensors[f"{i}/inv_freq"] = store.rotary.inv_freq.cpu().clone()
            rotaries[str(i)] = store.rotary.pairing
    settings: dict[str, Any] = {
        "config": cache.config.canonical(),
        "model": cache.model_fingerprint,
        "shape": [cache.num_layers, *_geometry(cache)],
        "key_center": cache.statistics.key_center,
        "rotaries": rotaries,
        "token_ids": list(getattr(cache, "token_ids", [])),
    }
    raw = json.dumps(settings, sort_keys=True).encode()
    tensors[_SETTINGS] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    length = max((int(s.length) for s in cache._stores), default=0)
    try:
        write(Path(path), Kind.SNAPSHOT, length, _namespace(raw), bytes(32), [safetensors.torch.save(tensors)])
    except OSError as e:
        raise TurboQuantError(f"{path}: cannot write the cache: {e.strerror or e}") from None


def _geometry(cache: TurboQuantCache) -> list[int]:
    store = next((s for s in cache._stores if hasattr(s, "num_kv_heads")), None)
    return [store.num_kv_heads, store.head_dim] if store is not None else [0, 0]


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        header, payload = read(Path(path), Kind.SNAPSHOT, None, None)
        tensors = safetensors.torch.load(bytes(payload))
        raw = tensors.pop(_SETTINGS).numpy().tobytes()
        if _namespace(raw) != header.namespace:
            raise Damaged("payload")
        return json.loads(raw), tensors
    except Damaged as e:
        raise CacheFileError(f"{path}: {_ADVICE.get(e.reason, e.reason)}") from None
    except (SafetensorError, KeyError, ValueError) as e:
        raise CacheFileError(f"{path}: the content is not understood ({e})") from None


def load_cache(cache: TurboQuantCache, path: str | os.PathLike[str]) -> None:
    """See :meth:`TurboQuantCache.load`."""
    settings, tensors = _read(path)
    shape = [cache.num_layers, *_geometry(cache)]
    if settings["config"] != cache.config.canonical():
        changed = sorted(k for k, v in cache.config.canonical().items() if settings["config"].get(k) != v)
        raise CacheFileError(f"{path}: saved with another configuration; {', '.join(changed)} differ from this cache's")
    if settings["shape"] != shape:
        raise CacheFileError(f"{path}: saved from {settings['shape']} (layers, heads, head_dim), this cache has {shape}")
    if settings["model"] and cache.model_fingerprint and settings["model"] != cache.model_fingerprint:
        raise CacheFileError(f"{path}: saved from another model (its weights or configuration differ)")
    for i, store in enumerate(cache._stores):
        if isinstance(store, PackedLayer) and not _same_rotary(store.rotary, tensors.get(f"{i}/inv_freq"), settings, i):
            raise CacheFileError(f"{path}: layer {i} was saved with another rotary embedding than this cache's")
    dtype = next((t.dtype for n, t in tensors.items() if n.endswith(("/tail", "/exact"))), None)
    if None not in (dtype, cache._dtype) and dtype != cache._dtype:
        raise CacheFileError(f"{path}: holds {dtype}, this cache is for {cache._dtype}")
    # Imports replace attributes and never write into old tensors, so the old content can be put back.
    before = [dict(vars(s)) for s in cache._stores]
    try:
        _fill(cache, settings, tensors)
    except CacheFileError as e:
        for store, attributes in zip(cache._stores, before, strict=True):
            vars(store).update(attributes)
        raise CacheFileError(f"{path}: {e}") from None


def _same_rotary(rotary: Rotary | None, inv_freq: Tensor | None, settings: dict[str, Any], layer: int) -> bool:
    if rotary is None or inv_freq is None:
        return rotary is None and inv_freq is None
    return bool(rotary.pairing == settings["rotaries"].get(str(layer)) and torch.equal(rotary.inv_freq.cpu(), inv_freq))


def _fill(cache: TurboQuantCache, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    prefix = "statistics/"
    stats = Statistics.from_tensors(
        {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}, settings["key_center"], settings["model"]
    )
    devices = getattr(cache, "devices", None) or [cache._device] * cache.num_layers
    for i, store in enumerate(cache._stores):
        state = {n.split("/", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{i}/") and not n.endswith("/inv_freq")}
        if state:
            import_state(store, state, [], devices[i], stats.layers.get(i))
        else:
            store.reset()
    if hasattr(cache, "token_ids"):
        cache.token_ids = list(settings["token_ids"])


def cache_from_file(
    cls: type[TurboQuantCache], path: str | os.PathLike[str], device: torch.device | str | None = None
) -> TurboQuantCache:
    """A new cache with the content of a file; it does not need the model (see :meth:`TurboQuantCache.from_file`)."""
    settings, tensors = _read(path)
    layers, heads, dim = settings["shape"]
    cache = cls(layers, heads, dim, TurboQuantConfig.from_canonical(settings["config"]), device=device)
    for i, pairing in settings["rotaries"].items():
        store = cache._stores[int(i)]
        if isinstance(store, PackedLayer):
            store.rotary = Rotary(tensors[f"{i}/inv_freq"], pairing)
    _fill(cache, settings, tensors)
    cache.model_fingerprint = settings["model"]
    return cache
