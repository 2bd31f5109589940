"""Feeding a prompt in blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import ShapeError
from ...offload.keys import CHUNK_TOKENS


@torch.no_grad()
def prefill(
    model: Any, input_ids: Tensor, cache: Any, block: int = CHUNK_TOKENS, progress: Callable[[int], None] | None = None
) -> int:
    """Feed a prompt to the model in blocks, after what the cache holds already; ``model.generate`` then feeds the rest.

    Blocks end at multiples of ``block``, so a prompt whose beginning was restored from a store goes on exactly like one that
    was fed from the start. Memory for activations is bounded by a block.

    Args:
        model: a causal language model of transformers.
        input_ids: (1, tokens) or (batch, tokens) without padding: the whole prompt.
        cache: filled with a beginning of the prompt, or empty.
        block: tokens per call; 256, the chunk of stores, by default.
        progress: called with the number of tokens of each block.

    Returns:
        The number of tokens the cache then holds: the last multiple of ``block`` that leaves at least one token to feed.

    Raises:
        ShapeError: the cache holds as many tokens as the prompt, or more.
    """
    start, tokens = int(cache.get_seq_length()), int(input_ids.shape[1])
    if start and start >= tokens:
        raise ShapeError(f"the cache holds {start} tokens already, the prompt has {tokens}; at least one must be left to feed")
    stop = max(start, (tokens - 1) // block * block)
    while start < stop:
        end = min(start // block * block + block, stop)
        model(input_ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
        if progress is not None:
            progress(end - start)
        start = end
    return start
