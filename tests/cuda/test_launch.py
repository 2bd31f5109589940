"""Launching kernels on a GPU: streams, graphs, threads, devices, errors."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import pytest
import torch

from turboquant.cuda import jit
from turboquant.errors import KernelError

from .test_jit import Params, compiled, kernels, source

__all__ = ["compiled", "kernels", "source"]  # fixtures
pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


def run(kernel: jit.Kernel, x: torch.Tensor, add: float = 0.5, shared: int = 512) -> None:
    kernel.launch((-(-x.numel() // 128), 1, 1), 128, shared, Params(x.data_ptr(), x.numel(), add))


@pytest.mark.parametrize("shared", [512, 40 << 10, 96 << 10])
def test_launch(source: str, kernels: Path, shared: int) -> None:
    kernel = jit.get_kernel(source, {"TQ_FACTOR": 3}, GPU)
    assert jit.get_kernel(source, {"TQ_FACTOR": 3}, torch.device("cuda")) is kernel
    assert 0 < kernel.registers < 64
    assert kernel.local_bytes == kernel.static_shared == 0
    assert kernel.max_block >= 128
    assert kernel.parameter_bytes in (None, ctypes.sizeof(Params))
    x = torch.arange(1000.0, device=GPU)
    run(kernel, x, shared=shared)
    assert torch.equal(x.cpu(), torch.arange(1000.0) * 3 + 0.5)
    run(jit.get_kernel(source + ":fill", {"TQ_FACTOR": 3}, GPU), x[:100])
    assert torch.equal(x[:101].cpu(), torch.tensor([7.0] * 100 + [300.5]))
    assert len(list(kernels.glob("*.bin"))) == 1


def test_launches_follow_the_current_stream(source: str, kernels: Path) -> None:
    kernel = jit.get_kernel(source, {"TQ_FACTOR": 3}, GPU)
    x = torch.ones(1 << 20, device=GPU)
    stream = torch.cuda.Stream(GPU)
    stream.wait_stream(torch.cuda.current_stream(GPU))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.mul_(2)
        run(kernel, x)
        assert not stream.query()  # nothing has waited
    stream.synchronize()
    assert torch.equal(x, torch.full_like(x, 6.5))


def test_graphs(source: str, kernels: Path) -> None:
    x = torch.ones(1000, device=GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # loading and preparing happen during the capture, too
        run(jit.get_kernel(source, {"TQ_FACTOR": 2}, GPU), x, shared=96 << 10)
    assert x[0] == 1
    for _ in range(3):
        graph.replay()
    assert torch.equal(x.cpu(), torch.full((1000,), 11.5))


def test_threads(source: str, kernels: Path, compiled: list[str]) -> None:
    found: list[jit.Kernel] = []
    x = torch.zeros(8, 1000, device=GPU)
    torch.cuda.synchronize()

    def work(i: int) -> None:  # a thread that has not used CUDA before
        kernel = jit.get_kernel(source, {"TQ_FACTOR": 5}, GPU)
        for _ in range(10):
            run(kernel, x[i], float(i))
        found.append(kernel)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert len(compiled) == 1
    want = torch.arange(8.0) * sum(5**k for k in range(10))
    assert torch.equal(x.cpu(), want[:, None].expand(8, 1000))


def test_another_device_is_current(source: str, kernels: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.ones(1000, device="cuda:1")
    with torch.cuda.device(0):
        run(jit.get_kernel(source, {"TQ_FACTOR": 3}, x.device), x, shared=96 << 10)
    assert torch.equal(x.cpu(), torch.full((1000,), 3.5))


def test_launch_errors(source: str, kernels: Path) -> None:
    class Short(ctypes.Structure):
        _fields_ = (("x", ctypes.c_uint64),)

    kernel = jit.get_kernel(source, {"TQ_FACTOR": 3}, GPU)
    x = torch.ones(8, device=GPU)
    if kernel.parameter_bytes is not None:
        with pytest.raises(KernelError, match="takes 16 bytes, Short has 8"):
            kernel.launch((1, 1, 1), 128, 512, Short(x.data_ptr()))
    with pytest.raises(KernelError, match="asks for 10000000 bytes of shared memory"):
        run(kernel, x, shared=10_000_000)
    with pytest.raises(KernelError, match=r"cannot launch tq_scale of scale.cu \(TQ_FACTOR=3\) with grid \(1, 1, 1\), 4096"):
        kernel.launch((1, 1, 1), 4096, 0, Params(x.data_ptr(), 8, 0.0))
    with pytest.raises(KernelError, match="no kernel tq_other"):
        jit.get_kernel(source + ":other", {"TQ_FACTOR": 3}, GPU)
    run(kernel, x)
    assert x[0] == 3.5  # no error has stuck


def test_what_is_known_of_the_gpu() -> None:
    assert jit.why_unavailable(GPU) is None
    p = torch.cuda.get_device_properties(GPU)
    assert jit.capability(GPU) == (p.major, p.minor)
    assert jit.multiprocessors(GPU) == p.multi_processor_count
    block, whole = jit.shared_memory(GPU)
    assert 99 << 10 <= block < whole <= 228 << 10
