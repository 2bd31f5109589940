"""What a model's configuration says about its cache and its size, read without loading the model."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arithmetic import CacheShape, LayerShape
from ..errors import ConfigError, UnsupportedModelError

# Architectures whose config.json says everything needed here. All others are read through transformers, which knows the
# defaults of their fields.
# fmt: off
_KNOWN = frozenset((
    "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj",
    "granite", "granitemoe", "llama", "mistral", "mixtral", "olmo", "olmo2", "olmoe", "opt", "phi", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
))
# Of these: input and output embeddings are two tables unless the configuration says otherwise.
_UNTIED = _KNOWN - {
    "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "opt", "smollm3", "starcoder2",
}
_PLAIN_MLP = frozenset((
    "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt", "nemotron", "opt", "persimmon",
    "phi", "starcoder2",
))
# fmt: on
# Files written before `layer_types` existed: every n-th layer attends to all tokens, the others slide.
_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}
_ALL_SLIDE = frozenset(("mistral", "mixtral", "phi3", "starcoder2"))
# Fields that change what single layers cache.
_UNEVEN = ("attention_chunk_size", "global_head_dim", "kv_sharing_modes", "num_kv_shared_layers", "per_layer_config")
_QKV_BIAS = frozenset(("qwen2", "qwen2_moe"))
_MLA = (
    "its keys and values are low-rank already (multi-head latent attention, MLA, kv_lora_rank); there is no plain cache to plan"
)

# Names used by older configurations.
_ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length"),
    "intermediate_size": ("n_inner", "ffn_hidden_size", "ffn_dim"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
}


@dataclass
class ModelFacts:
    """What a configuration says.

    Attributes:
        model_type: the architecture's name.
        shape: layers of the cache.
        parameters: estimated number of weights.
        max_context: longest context the model was made for, or None.
        notes: sentences a reader of the numbers should know.
    """

    model_type: str
    shape: CacheShape
    parameters: int
    max_context: int | None
    notes: list[str] = field(default_factory=list)


def _get(c: dict[str, Any], name: str, default: Any = None) -> Any:
    """Look up a field under its present or an older name; null counts as absent."""
    return next((c[n] for n in (name, *_ALIASES.get(name, ())) if c.get(n) is not None), default)


def _number(c: dict[str, Any], name: str, default: int | None = None) -> int:
    """Look up a whole number; with a ``default`` it may be absent or 0.

    Raises:
        ConfigError: missing, or no such number.
    """
    value = _get(c, name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < (1 if default is None else 0):
        problem = "is missing" if value is None else f"is {value!r}"
        raise ConfigError(f"{name} {problem} in the model's configuration")
    return value


# -- find the configuration -------------------------------------------------------------------------------------------


def read_model(model: str) -> ModelFacts:
    """Facts of a folder, a config.json, a .gguf file or a hub id.

    A local file of a known architecture is read as JSON; anything else through transformers.

    Raises:
        ConfigError: nothing is there, or it is not understood.
        UnsupportedModelError: the model has no cache of plain keys and values.
    """
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ConfigError(f"there is no file {model}")
        return _through_transformers(str(path.parent), gguf_file=path.name)
    if path.is_dir():
        found = [path / "config.json"] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
        if not found:
            raise ConfigError(f"the folder {model} holds neither a config.json nor a .gguf file")
        if len(found) > 1:
            raise ConfigError(f"the folder {model} holds {len(found)} .gguf files; name one of them")
        path = found[0]
        if path.suffix == ".gguf":
            return _through_transformers(str(path.parent), gguf_file=path.name)
    if not path.is_file():
        if model.startswith((".", "/", "~")) or path.suffix == ".json" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
            raise ConfigError(f"there is no file or folder {model}")
        return _through_transformers(model)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read as JSON: {e}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a model's configuration: it holds a {type(raw).__name__}, not an object")
    return _from_json(raw, path)


def _from_json(raw: dict[str, Any], path: Path) -> ModelFacts:
    notes = []
    c = raw
    if isinstance(raw.get("text_config"), dict):
        c = {**{k: raw[k] for k in ("model_type", "tie_word_embeddings") if k in raw}, **raw["text_config"]}
        notes.append("Only the language model is counted, not its vision or audio parts.")
    _reject(raw)
    _reject(c)
    model_type = str(c.get("model_type", ""))
    if model_type in _KNOWN and not any(_get(c, name) for name in _UNEVEN):
        # Where a field is left to its default, transformers knows it.
        with contextlib.suppress(ConfigError):
            return _facts(c, _layers(c), notes)
    try:
        return _through_transformers(str(path), notes=notes)
    except ConfigError as e:
        try:
            facts = _facts(c, _layers(c), notes)
        except ConfigError as missing:
            raise ConfigError(f"{path}: {missing}; {e}") from None
        name = model_type or "this architecture"
        facts.notes.append(f"transformers does not know {name}: all layers are taken as alike, by the fields of config.json.")
        return facts


def _reject(c: dict[str, Any]) -> None:
    name = c.get("model_type") or "this model"
    if _get(c, "kv_lora_rank"):
        raise UnsupportedModelError(f"{name}: {_MLA}")
    if c.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; only decoder-only models are supported")


def _through_transformers(where: str, gguf_file: str | None = None, notes: list[str] | None = None) -> ModelFacts:
    try:
        from transformers import AutoConfig, DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
    except ImportError:
        raise ConfigError(f'reading {gguf_file or where} needs transformers: pip install "turboquant-cache[hf]"') from None
    try:
        options = {} if gguf_file is None else {"gguf_file": gguf_file}
        config = AutoConfig.from_pretrained(where, **options)
        text = config.get_text_config(decoder=True)
        c = text.to_dict()
        # Attributes also resolve the names that an architecture gives to common fields.
        c |= {name: v for name in _ALIASES if (v := getattr(text, name, None)) is not None}
        c["tie_word_embeddings"] = getattr(config, "tie_word_embeddings", None)
        _reject(config.to_dict())
        _reject(c)
        dense = DynamicCache(config=text).layers
    except UnsupportedModelError:
        raise
    except Exception as e:  # whatever goes wrong in there, the user gave a model that cannot be read
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        raise ConfigError(f"transformers cannot read the configuration of {gguf_file or where}: {reason}") from None
    types = list(getattr(text, "layer_types", None) or [""] * len(dense))
    each = list(getattr(text, "per_layer_config", None) or [text] * len(dense))
    layers = []
    for i, layer in enumerate(dense):
        own = {n: getattr(each[i], n, None) for n in ("head_dim", "hidden_size", "num_attention_heads", "num_key_value_heads")}
        kv_heads, head_dim = _geometry(c | {n: v for n, v in own.items() if v is not None})
        window = getattr(layer, "sliding_window", None)
        reason = ""
        if not isinstance(layer, DynamicLayer):
            kv_heads, reason = 0, "no keys and values"
        elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            reason = f"{types[i] or type(layer).__name__}: not a plain attention layer"
        elif types[i] == "chunked_attention":
            reason = "chunked attention"
        layers.append(LayerShape(kv_heads, head_dim, window, reason))
    return _facts(c, tuple(layers), list(notes or ()))


# -- read it ----------------------------------------------------------------------------------------------------------


def _geometry(c: dict[str, Any]) -> tuple[int, int]:
    """(KV heads, head_dim)."""
    heads = _number(c, "num_attention_heads")
    # Falcon's and GPT-BigCode's way to say one KV head.
    one = c.get("multi_query") and not c.get("new_decoder_architecture")
    kv_heads = 1 if one else _number(c, "num_key_value_heads", heads)
    return kv_heads, _number(c, "head_dim", 0) or _number(c, "hidden_size") // heads


def _layers(c: dict[str, Any]) -> tuple[LayerShape, ...]:
    """Read the layers from the fields of a plain configuration.

    Raises:
        ConfigError: a field is missing, or which layers slide is left to a default.
    """
    n, (kv_heads, head_dim) = _number(c, "num_hidden_layers"), _geometry(c)
    window, kind = _get(c, "sliding_window"), c.get("model_type")
    types = c.get("layer_types")
    if types is None:
        every = _get(c, "sliding_window_pattern", _FULL_EVERY.get(str(kind)))
        if not window or c.get("use_sliding_window") is False:
            types = ["full_attention"] * n
        elif isinstance(every, int) and every > 0:
            types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n)]
        elif kind in _ALL_SLIDE:
            types = ["sliding_attention"] * n
        else:
            raise ConfigError("layer_types is missing in the model's configuration")
    if len(types) != n or set(types) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"layer_types does not describe {n} layers of plain attention in the model's configuration")
    if "sliding_attention" in types:
        window = _number(c, "sliding_window")
    return tuple(LayerShape(kv_heads, head_dim, window if t == "sliding_attention" else None) for t in types)


def _facts(c: dict[str, Any], layers: tuple[LayerShape, ...], notes: list[str]) -> ModelFacts:
    if not any(layer.kv_heads for layer in layers):
        raise UnsupportedModelError(f"{c.get('model_type')}: its layers cache no keys and values")
    context = _number(c, "max_position_embeddings", 0) or None
    kind = str(c.get("model_type") or "?")
    if kind not in _KNOWN:
        notes = [*notes, f"The number of parameters is a rough estimate for {kind}; --parameters sets it."]
    return ModelFacts(kind, CacheShape(layers), estimate_parameters(c, layers), context, notes)


def estimate_parameters(c: dict[str, Any], layers: tuple[LayerShape, ...]) -> int:
    """Count about how many weights a decoder has: embeddings, attention, MLPs or experts, norms.

    State-space layers are counted as if they were attention.
    """
    hidden, kind = _number(c, "hidden_size"), str(c.get("model_type"))
    heads = _number(c, "num_attention_heads")
    tied = bool(_get(c, "tie_word_embeddings", kind not in _UNTIED))
    total = _number(c, "vocab_size", 0) * _number(c, "word_embed_proj_dim", hidden) * (1 if tied else 2) + hidden
    if kind in ("gpt2", "gpt_bigcode", "opt"):
        total += _number(c, "max_position_embeddings", 0) * hidden
    # Gemma 3n and 4 have a second embedding table for every layer.
    total += len(layers) * _number(c, "vocab_size_per_layer_input", 0) * _number(c, "hidden_size_per_layer_input", 0)
    for i, layer in enumerate(layers):
        # Layers without a cache of their own have projections all the same.
        kv_heads, head_dim = layer.kv_heads or _geometry(c)[0], layer.head_dim
        query, key = heads * head_dim, kv_heads * head_dim
        total += 2 * hidden * (query + key)
        if c.get("attention_bias") or c.get("qkv_bias") or c.get("use_qkv_bias") or kind in _QKV_BIAS:
            total += query + 2 * key + (hidden if c.get("attention_bias") else 0)
        total += _mlp(c, i, hidden, kind) + 2 * hidden
    return total


def _mlp(c: dict[str, Any], layer: int, hidden: int, kind: str) -> int:
    """Weights of one layer's MLP or experts."""
    activation = str(_get(c, "hidden_act", _get(c, "hidden_activation", "")))
    matrices = 2 if kind in _PLAIN_MLP or activation in ("relu", "relu2", "gelu_new", "gelu_fast") else 3
    if isinstance(sizes := c.get("intermediate_size"), list) and layer < len(sizes):
        c = {**c, "intermediate_size": sizes[layer]}
    size = _number(c, "intermediate_size", 4 * hidden)
    experts = _number(c, "num_experts", 0)
    sparse = (
        experts > 0
        and layer >= _number(c, "first_k_dense_replace", 0)
        and layer not in (_get(c, "mlp_only_layers") or ())
        and (layer + 1) % max(1, _number(c, "decoder_sparse_step", 1)) == 0
    )
    if not sparse:
        return matrices * hidden * size
    one = _number(c, "moe_intermediate_size", size)
    shared = _number(c, "shared_expert_intermediate_size", _number(c, "n_shared_experts", 0) * one)
    return matrices * hidden * (experts * one + shared) + experts * hidden
