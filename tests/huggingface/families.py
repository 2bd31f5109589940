"""Tiny random models of every supported family. A new family is tested by adding one line to FAMILIES."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB = 199


@dataclass(frozen=True)
class Family:
    """A config class, its settings beside the common ones, and what the cache is expected to do with the layers."""

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    packed: tuple[int, ...] = (0, 1, 2, 3)
    rotary_dim: int | None = 32
    pairing: str = "half"


_LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 512}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig"),
    "llama3-rope": Family("LlamaConfig", {"rope_parameters": _LLAMA3}),
    "llama-yarn": Family("LlamaConfig", {"rope_parameters": _YARN}),
    "llama-mha": Family("LlamaConfig", {"num_key_value_heads": 4}),
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config"),
    "mistral-sliding": Family("MistralConfig", {"sliding_window": 384}),
    "mistral-short-sliding": Family("MistralConfig", {"sliding_window": 100}, packed=()),
    "mistral-full": Family("MistralConfig", {"sliding_window": None}),
    "gemma3": Family(
        "Gemma3TextConfig",
        {"head_dim": 256, "sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"] * 2},
        packed=(1, 3),
        rotary_dim=256,
    ),
    "gemma2-softcap": Family(
        "Gemma2Config",
        {"sliding_window": 96, "attn_logit_softcapping": 20.0, "layer_types": ["sliding_attention", "full_attention"] * 2},
        packed=(1, 3),
    ),
    "phi3": Family("Phi3Config", {"pad_token_id": 0}),
    "gpt-neox-partial": Family(
        "GPTNeoXConfig",
        {
            "num_key_value_heads": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        },
        rotary_dim=8,
    ),
    "stablelm-partial": Family(
        "StableLmConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        rotary_dim=16,
    ),
    "glm-interleaved": Family("GlmConfig", {"pad_token_id": 0}, rotary_dim=16, pairing="interleaved"),
    "cohere-interleaved": Family("CohereConfig", pairing="interleaved"),
    "gpt-oss-sinks": Family(
        "GptOssConfig",
        {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": 96,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        packed=(1, 3),
    ),
    "opt-no-rotary": Family(
        "OPTConfig", {"num_key_value_heads": None, "ffn_dim": 96, "word_embed_proj_dim": 128}, rotary_dim=None
    ),
}


def build(name: str, seed: int = 0, attention: str = "turboquant", **settings: Any) -> PreTrainedModel:
    """A random model of a family: 4 layers, 4 heads, 2 KV heads, head_dim 32 unless the family says otherwise."""
    family = FAMILIES[name]
    common = dict(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, initializer_range=0.08,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config = getattr(transformers, family.config)(**{**common, **family.settings, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for n, p in model.named_parameters():
        # Key biases are the hard case of real Qwen2 models; the library initializes them to zero.
        if n.endswith("k_proj.bias"):
            torch.nn.init.normal_(p, std=2.0)
    return model.eval()


def tokens(count: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids without the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, count), generator=generator)
