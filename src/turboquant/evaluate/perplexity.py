"""Teacher-forced comparison of caches on one text.

Every chunk of tokens is fed through a fresh cache in small blocks, so that what is read is what is stored: beyond the exact
window, packed pages. A single large call would read everything exactly and measure nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..cache import TurboQuantCache
from ..codec.center import Statistics
from ..config import PRESETS
from ..errors import ConfigError
from .baselines import BASELINES, BaselineCache

EXACT = "exact"


@dataclass(frozen=True)
class Row:
    """Result of one cache.

    Attributes:
        preset: name of the preset, reference row, or "exact".
        bits_per_element: stored bits per number beyond the window, scales included.
        effective_bits: bits per number really held at the end of a chunk: window (in the model's dtype), statistics and all.
        ppl: perplexity.
        dppl: perplexity minus that of the exact cache.
        kl: mean KL divergence of the next-token distribution from the exact cache's, nats per token.
        top1: share of tokens whose most likely next token is the exact cache's.
        tokens: number of predictions scored.
    """

    preset: str
    bits_per_element: float
    effective_bits: float
    ppl: float
    dppl: float
    kl: float
    top1: float
    tokens: int


def known_rows() -> list[str]:
    """All names that :func:`evaluate` takes."""
    return [EXACT, *PRESETS, *BASELINES]


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _new_cache(model: Any, name: str, statistics: Statistics | None) -> Any:
    if name == EXACT:
        return DynamicCache(config=model.config.get_text_config(decoder=True))
    if name in BASELINES:
        return BaselineCache(name, model.config.get_text_config(decoder=True).num_hidden_layers)
    return TurboQuantCache.for_model(model, name, statistics=statistics)


def _bits(cache: Any) -> tuple[float, float]:
    if hasattr(cache, "bits_per_element"):
        return float(cache.bits_per_element), float(cache.effective_bits)
    width = 8.0 * next(layer.keys.dtype.itemsize for layer in cache.layers if getattr(layer, "keys", None) is not None)
    return width, width


def _log_probs(
    model: Any, ids: Tensor, cache: Any, block: int, skip: int, tick: Callable[[int], None] | None
) -> Iterator[Tensor]:
    """Yield log-probabilities of the next token after each of tokens skip to len - 2, in pieces (n, vocabulary), float32."""
    last = ids.shape[0] - 1
    for start in range(0, last, block):
        stop = min(start + block, last)
        keep = max(0, stop - max(start, skip))
        # logits_to_keep=0 would mean all of them, so a block that is not scored keeps one.
        out = model(ids[None, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=max(keep, 1))
        if tick is not None:
            tick(stop - start)
        if keep:
            yield torch.log_softmax(out.logits[0, -keep:].float(), dim=-1)


@torch.no_grad()
def evaluate(
    model: Any,
    ids: Tensor,
    presets: Sequence[str],
    chunk_tokens: int = 2048,
    chunks: int = 4,
    block: int = 64,
    skip: int = 256,
    statistics: Statistics | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> list[Row]:
    """Compare caches on ``chunks`` consecutive pieces of a text.

    Args:
        model: a causal language model of transformers, in eval mode.
        ids: (tokens,) int64, at least ``chunks * chunk_tokens`` of them.
        presets: names of :func:`known_rows`; "exact" is always added first.
        chunk_tokens: length of a piece; each starts with an empty cache.
        chunks: number of pieces.
        block: tokens per call.
        skip: predictions after the first ``skip`` tokens of a piece are scored: before, little or nothing is packed.
        statistics: key statistics to use instead of measuring them on each piece's first tokens.
        progress: called with (row name, tokens done).

    Raises:
        ConfigError: unknown names, a number that cannot work, or the text is too short.
        UnsupportedModelError: no layer of the model can be compressed.
    """
    unknown = [p for p in presets if p not in known_rows()]
    if unknown:
        raise ConfigError(f"unknown presets {', '.join(unknown)}; choose from {', '.join(known_rows())}")
    if chunks < 1 or block < 1:
        raise ConfigError(f"chunks={chunks} and block={block} must be at least 1")
    if not 0 <= skip < chunk_tokens - 1:
        raise ConfigError(f"skip={skip} leaves nothing of {chunk_tokens} tokens to score")
    if ids.shape[0] < chunks * chunk_tokens:
        raise ConfigError(
            f"the text has {ids.shape[0]} tokens but {chunks} chunks of {chunk_tokens} need {chunks * chunk_tokens}; "
            "give a longer text, fewer chunks or fewer tokens"
        )
    names = [EXACT, *(p for p in dict.fromkeys(presets) if p != EXACT)]
    sums = {n: [0.0, 0.0, 0.0] for n in names}  # negative log-likelihood, KL, agreement
    bits = dict.fromkeys(names, (0.0, 0.0))
    scored = 0
    for c in range(chunks):
        piece = ids[c * chunk_tokens : (c + 1) * chunk_tokens].to(model.device)
        target = piece[skip + 1 :]
        scored += target.shape[0]
        base: list[Tensor] = []
        for name in names:
            packed = name in PRESETS
            with _attention(model, "turboquant" if packed else "sdpa"):
                cache = _new_cache(model, name, statistics)
                at = 0
                tick = partial(progress, name) if progress else None
                for i, lp in enumerate(_log_probs(model, piece, cache, block, skip, tick)):
                    if name == EXACT:
                        base.append(lp)
                    exact = base[i]
                    sums[name][0] -= float(lp.gather(1, target[at : at + lp.shape[0], None]).sum())
                    sums[name][1] += float((exact.exp() * (exact - lp)).sum())
                    sums[name][2] += float((exact.argmax(-1) == lp.argmax(-1)).sum())
                    at += lp.shape[0]
                bits[name] = _bits(cache)
    ppl = {n: math.exp(s[0] / scored) for n, s in sums.items()}
    return [Row(n, *bits[n], ppl[n], ppl[n] - ppl[EXACT], s[1] / scored, s[2] / scored, scored) for n, s in sums.items()]
