"""Whether CUDA kernels do the work on a device; torch does it otherwise."""

from __future__ import annotations

import os
import warnings

import torch

_known: dict[torch.device, bool] = {}


def kernels_run_on(device: torch.device) -> bool:
    """True if the kernels of :mod:`turboquant.cuda` can run on ``device``; says once why not, if it is a GPU.

    ``TURBOQUANT_KERNELS=off`` in the environment leaves everything to torch.
    """
    if device.type != "cuda":
        return False
    if device not in _known:
        if os.environ.get("TURBOQUANT_KERNELS", "").lower() in ("off", "0"):
            _known[device] = False
            return False
        from ..cuda.jit import why_unavailable

        reason = why_unavailable(device)
        if reason is not None:
            warnings.warn(f"CUDA kernels do not run, so torch does their work, slowly: {reason}", stacklevel=3)
        _known[device] = reason is None
    return _known[device]
