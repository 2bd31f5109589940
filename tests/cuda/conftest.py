"""Where the kernel tests run: on the emulator everywhere, and on a GPU if there is one."""

from __future__ import annotations

import importlib

import pytest
import torch

from ..emulator import get_kernel, why_unavailable


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of the test's tensors; with the CPU, kernels run on the emulator, which passes for a small H100."""
    if request.param == "cuda":
        return torch.device("cuda")
    if reason := why_unavailable():
        pytest.skip(reason)
    jit = importlib.import_module("turboquant.cuda.jit")
    monkeypatch.setattr(jit, "get_kernel", get_kernel)
    monkeypatch.setattr(jit, "capability", lambda device: (9, 0))
    monkeypatch.setattr(jit, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(jit, "shared_memory", lambda device: (227 << 10, 228 << 10))
    monkeypatch.setattr(jit, "why_unavailable", lambda device=None: None)
    return torch.device("cpu")
