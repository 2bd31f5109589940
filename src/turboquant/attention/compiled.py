"""``attend`` as one operator, so that ``torch.compile`` takes it into a graph without looking inside."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.layer import LAYERS, PackedLayer
from ..errors import TurboQuantError


@torch.library.custom_op("turboquant::attend", mutates_args=())
def _attend(
    query: Tensor, layer: int, scaling: float, softcap: float | None, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    from . import attend

    if layer not in LAYERS:
        raise TurboQuantError("the cache that this compiled graph was traced with is gone; compile again with the new one")
    return attend(query, LAYERS[layer], None, scaling, softcap, sink_logits)


@_attend.register_fake
def _(query: Tensor, layer: int, scaling: float, softcap: float | None, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def attend_compiled(
    query: Tensor, layer: PackedLayer, scaling: float, softcap: float | None, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Causal attention over a layer through the operator ``turboquant::attend``."""
    out, lse = torch.ops.turboquant.attend(query, layer.handle, scaling, softcap, sink_logits)
    return out, lse
