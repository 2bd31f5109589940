"""What a transformers model's layers cache, and which rotary embedding its keys carry."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...arithmetic import LayerShape
from ...codec.rotary import Pairing, Rotary
from ...config import EXACT_BITS, TurboQuantConfig
from ...errors import UnsupportedModelError

EXACT_BY_CONFIGURATION = "exact by configuration"


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """One layer of a model's cache.

    Attributes:
        exact: transformers' own cache layer, to use where ``reason`` is set.
        reason: why the layer is kept exact, or "".
        num_kv_heads, head_dim: shape (0 where the layer has no keys).
        bits: (key bits, value bits).
        sliding_window: tokens the layer attends to, or None for all.
        rotary: the layer's rotary embedding, or None.
        note: what a user should know about a compressed layer, or "".
    """

    exact: Any
    reason: str
    num_kv_heads: int
    head_dim: int
    bits: tuple[int, int]
    sliding_window: int | None
    rotary: Rotary | None
    note: str


def text_config(model: Any) -> Any:
    """The configuration of the model's decoder.

    Raises:
        UnsupportedModelError: not a causal language model of transformers.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model; build TurboQuantCache(num_layers, num_kv_heads, head_dim) "
            "instead"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder-decoder model; only decoder-only models are supported "
            "(cross-attention caches do not grow, so there is little to compress)"
        )
    return config.get_text_config(decoder=True)


def decoder_of(model: Any) -> Any:
    """The module that holds the model's attention layers and is called with the cache."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def inspect_layers(model: Any, config: TurboQuantConfig) -> list[LayerSpec]:
    """Decide for every layer of ``model`` whether and how it is compressed.

    Raises:
        UnsupportedModelError: no layer can be compressed; the message says why.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    text = text_config(model)
    decoder = decoder_of(model)
    dense = DynamicCache(config=text).layers
    if not dense:
        raise UnsupportedModelError(f"{text.model_type}: its configuration does not name any cache layers")
    types = list(getattr(text, "layer_types", None) or [""] * len(dense))
    per_layer = list(getattr(text, "per_layer_config", None) or [text] * len(dense))
    rotaries: dict[str, tuple[Rotary | None, str]] = {}
    specs = []
    for i, layer in enumerate(dense):
        c = per_layer[i]
        heads, dim = _geometry(c)
        bits = config.bits_of_layer(i, len(dense))
        window = int(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else None
        reason = ""
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            reason = f"{types[i] or type(layer).__name__}: not a plain attention layer"
        elif types[i] == "chunked_attention":
            reason = "chunked attention"
        elif getattr(c, "kv_lora_rank", None):
            reason = "multi-head latent attention (MLA): keys and values differ in size and are low-rank already"
        elif why := LayerShape(heads, dim, window).why_exact(config):
            reason = why
        elif bits[0] == EXACT_BITS:
            reason = EXACT_BY_CONFIGURATION
        rotary: Rotary | None = None
        note = ""
        if not reason and config.key_center == "rope_mean":
            if types[i] not in rotaries:
                rotaries[types[i]] = find_rotary(decoder, types[i], dim)
            rotary, note = rotaries[types[i]]
        specs.append(LayerSpec(layer, reason, heads, dim, bits, window, rotary, note))
    if all(s.reason for s in specs) and (config.key_bits, config.value_bits) != (EXACT_BITS, EXACT_BITS):
        reasons = "; ".join(sorted({s.reason for s in specs}))
        raise UnsupportedModelError(f"{text.model_type}: no layer of this model can be compressed ({reasons})")
    return specs


def _geometry(c: Any) -> tuple[int, int]:
    """(KV heads, head_dim) of a layer's configuration."""
    heads = getattr(c, "num_attention_heads", 0) or 0
    kv = getattr(c, "num_key_value_heads", None) or getattr(c, "num_kv_heads", None) or heads
    if getattr(c, "multi_query", False) and not getattr(c, "new_decoder_architecture", False):
        kv = 1  # Falcon, GPT-BigCode
    dim = getattr(c, "head_dim", None) or (c.hidden_size // heads if heads else 0)
    return int(kv), int(dim)


def layer_devices(decoder: Any, num_layers: int, default: torch.device) -> list[torch.device]:
    """The device of every layer's attention (models may be spread over several)."""
    found = {m.layer_idx: next(m.parameters()).device for m in decoder.modules() if _is_attention(m)}
    return [found.get(i, default) for i in range(num_layers)]


def _is_attention(module: Any) -> bool:
    return hasattr(module, "layer_idx") and "Attention" in type(module).__name__ and any(True for _ in module.parameters())


# -- rotary embedding -------------------------------------------------------------------------------------------------


def find_rotary(decoder: Any, layer_type: str, head_dim: int) -> tuple[Rotary | None, str]:
    """The rotary embedding of a layer type, read from the model's own modules and checked against the model's own function.

    Returns:
        (rotary, "") or (None, note) where there is none, or it is not understood. Centring then uses a constant mean.
    """
    module = next((m for n, m in decoder.named_modules() if n.split(".")[-1] == "rotary_emb"), None)
    if module is None:
        return None, "no rotary embedding: keys are centred by a constant mean"
    unknown = f"rotary embedding {type(module).__name__} not understood: keys are centred by a constant mean"
    attention = next((m for m in decoder.modules() if _is_attention(m)), None)
    apply = getattr(sys.modules.get(type(attention).__module__), "apply_rotary_pos_emb", None)
    try:
        cos, sin = _cos_sin(module, layer_type, head_dim)
        rotary = _match(module, layer_type, cos, sin, apply)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return None, unknown
    return rotary, "" if rotary is not None else unknown


_PROBE = (1, 2, 97)


def _cos_sin(module: Any, layer_type: str, head_dim: int) -> tuple[Tensor, Tensor]:
    """The module's cos and sin at the probe positions, normalized to pure rotations, float64 (probes, width)."""
    device = next((b.device for b in module.buffers()), torch.device("cpu"))
    x = torch.zeros(1, len(_PROBE), head_dim, device=device)
    positions = torch.tensor([_PROBE], device=device)
    takes_type = "layer_type" in inspect.signature(module.forward).parameters
    cos, sin = module(x, positions, layer_type) if takes_type else module(x, positions)
    if cos.dim() != 3:
        raise ValueError("positions of several axes")
    c, s = cos[0].double().cpu(), sin[0].double().cpu()
    amplitude = (c.square() + s.square()).sqrt()
    return c / amplitude, s / amplitude


def _match(
    module: Any, layer_type: str, cos: Tensor, sin: Tensor, apply: Callable[..., tuple[Tensor, Tensor]] | None
) -> Rotary | None:
    """The pairing and frequencies with which :class:`Rotary` does what the model's function does."""
    width = cos.shape[-1]
    angle = torch.atan2(sin[0], cos[0])
    # Most models repeat every angle for both channels of a pair; some (gpt-oss) give one column per pair.
    candidates: list[tuple[Pairing, Tensor]] = [
        ("half", angle[: width // 2]),
        ("interleaved", angle[0::2]),
        ("interleaved", angle[: width // 2]),
        ("half", angle),
    ]
    if apply is None:
        candidates = candidates[:1] if torch.equal(angle[: width // 2], angle[width // 2 :]) else []
    generator = torch.Generator().manual_seed(0)
    for pairing, freq in candidates:
        rotary = Rotary(_sharpen(module, layer_type, freq), pairing)
        x = torch.randn(1, 1, len(_PROBE), rotary.rotary_dim, generator=generator)
        got = rotary.apply(x, *rotary.cos_sin(torch.tensor(_PROBE)))
        if apply is None or _agrees(apply, x, cos, sin, got):
            return rotary
    return None


def _agrees(apply: Callable[..., tuple[Tensor, Tensor]], x: Tensor, cos: Tensor, sin: Tensor, got: Tensor) -> bool:
    try:
        want = apply(x, x, cos[None].float(), sin[None].float())[1]
    except (RuntimeError, TypeError):  # this width does not fit the model's function
        return False
    return want.shape == got.shape and torch.allclose(got, want, atol=1e-3)


def _sharpen(module: Any, layer_type: str, freq: Tensor) -> Tensor:
    """The module's own frequencies where they agree: an arc tangent of float32 loses digits that matter at 100k tokens."""
    for name in (f"{layer_type}_inv_freq", "inv_freq"):
        own = getattr(module, name, None)
        if (
            isinstance(own, Tensor)
            and own.shape == freq.shape
            and torch.allclose(own.double().cpu(), freq, rtol=1e-4, atol=1e-7)
        ):
            return own.detach().double().cpu()
    return freq


# -- identity ---------------------------------------------------------------------------------------------------------


def _bit_sum(parameter: Tensor) -> int:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.dtype.itemsize]
    return int(parameter.contiguous().view(integers).sum(dtype=torch.int64))


def fingerprint(model: Any) -> str:
    """A hex digest that names a model's keys and values: configuration, dtype and weights.

    Names and revisions are not enough: a fine-tuned model may have the same ones. Every parameter enters with the sum of its
    bits as integers, which is exact, the same on every device, and changes with any single weight.
    """
    text = text_config(model)
    skip = ("_name_or_path", "transformers_version", "_attn_implementation", "use_cache", "dtype", "torch_dtype")
    settings = {k: v for k, v in text.to_dict().items() if k not in skip and not k.startswith("_")}
    h = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, p in sorted(decoder_of(model).named_parameters()):
        h.update(f"{name} {tuple(p.shape)} {p.dtype} {_bit_sum(p.detach())}".encode())
    return h.hexdigest()
