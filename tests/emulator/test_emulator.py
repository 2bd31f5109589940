"""What the emulator reports, how it schedules, and how it compiles."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from . import runner
from .kernels import HEAD, KERNEL, Params, aligned, run
from .runner import EmulationError, get_kernel, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=why_unavailable() or "")
CPU = torch.device("cpu")
READY = "uint64_t* bar = (uint64_t*)(smem + 64); if (t == 0) { mbar_init(bar); mbar_fence(); } sync_block();\n"

ODD = "smem + 8"
# Name: the statements, what the message must match.
BROKEN = {
    "two collectives in one warp": (
        "if (lane < 16) shfl_xor(1, 1); else ballot(true);",
        r"block \(0, 0, 0\), thread 16 \(warp 0, lane 16\): diverged warp: .* reached ballot, lanes 0000ffff wait in shfl_xor",
    ),
    "lanes that end": (
        "if (t >= 32 && lane > 3) return; sync_warp();",
        r"warp 1.*diverged warp: this lane reached the end of the kernel, lanes 0000000f wait in sync_warp",
    ),
    "lanes that ended": ("if (t < 40) return; sync_warp();", "this lane reached sync_warp, lanes 000000ff ended"),
    "half a warp in sync_block": (
        "if (lane & 1) sync_block(); else sync_warp();",
        "diverged warp: this lane reached sync_block",
    ),
    "lane that ends before sync_block": ("if (t == 40) return; sync_block();", "diverged warp.*the end of the kernel"),
    "write behind shared memory": ("if (t == 0) smem[100] = 1;", r"block \(0, 0, 0\): wrote behind the 100 bytes"),
    "write far behind": (
        "if (t == 33) smem[128] = 1;",
        r"warp 1, lane 1\): access outside of shared memory, at byte 128 of 100",
    ),
    "read far behind": ("p.out[0] = smem[1000 + lane];", "access outside of shared memory, at byte 1000 of 100"),
    "write before shared memory": ("if (t == 0) smem[-1] = 1;", "wrote before the start of shared memory"),
    "null pointer": ("*(volatile uint8_t*)(size_t)p.n = 1;", "thread 0 .*invalid memory access at address"),
    "misaligned word": ("p.out[0] += *(const uint32_t*)(p.in + 1);", r"misaligned or null pointer at .*broken.cu:\d+"),
    "misaligned vector": (f"((uint4*)({ODD}))->x = 1;", r"misaligned or null pointer at .*broken.cu:\d+"),
    "copy to an odd place": (f"copy_async_16({ODD}, p.in);", "copy_async_16: byte 8 of shared memory is no multiple of 16"),
    "copy from an odd place": ("copy_async_16(smem, p.in + 8);", r"copy_async_16: the global address \w+ is no multiple"),
    "copy behind the end": ("copy_async_16(smem + 96, p.in);", "copy_async_16: bytes 96 to 112 are outside of the 100"),
    "ldmatrix behind the end": (
        "uint32_t r[4]; ldmatrix_x4(r, smem + lane * 16);",
        r"lane 6\): ldmatrix_x4: bytes 96 to 112 are",
    ),
    "load of 8 bytes": (READY + "bulk_load(smem, p.in, 8, bar);", "bulk_load: 8 bytes are no positive multiple of 16"),
    "load to an odd place": (READY + f"bulk_load({ODD}, p.in, 16, bar);", "bulk_load: byte 8 .* no multiple of 16"),
    "load from an odd place": (READY + "bulk_load(smem, p.in + 4, 16, bar);", "bulk_load: the global address"),
    "load behind the end": (READY + "bulk_load(smem + 80, p.in, 32, bar);", "bulk_load: bytes 80 to 112 are outside"),
    "barrier in global memory": (READY + "mbar_wait((uint64_t*)p.out, 0);", r"mbar_wait: bytes -?\d+ to -?\d+ are outside"),
    "barrier without init": ("mbar_wait((uint64_t*)smem, 0);", "mbar_wait: the barrier was not initialised"),
    "barrier overwritten": (READY + "smem[64] = 99; sync_block(); mbar_wait(bar, 0);", r"\(or was overwritten\)"),
    "barrier initialised twice": (READY + "if (t == 5) mbar_init(bar);", "mbar_init: the barrier was initialised before"),
    "barrier without fence": (
        "if (t == 0) mbar_init((uint64_t*)smem); mbar_wait((uint64_t*)smem, 1);",
        "no mbar_fence by the thread",
    ),
    "fence of another thread": (
        "auto bar = (uint64_t*)smem; if (t == 1) mbar_init(bar); sync_warp(); if (t == 0) { mbar_fence(); mbar_wait(bar, 1); }",
        "no mbar_fence by the thread",
    ),
    "two loads in one phase": (
        READY + "if (t == 0) { bulk_load(smem, p.in, 16, bar); bulk_load(smem + 16, p.in, 16, bar); }",
        "bulk_load: nobody waited for the load before",
    ),
    "load that nobody waits for": (
        READY + "if (t == 0) bulk_load(smem, p.in, 32, bar);",
        "ended before a bulk load of 32 bytes",
    ),
    "wait without a load": (
        READY + "if (t < 32) mbar_wait(bar, 0);",
        "no thread of the block can go on; warp 0 lanes f{8} wait in mbar_wait",
    ),
    "wait with parity 2": (READY + "mbar_wait(bar, 2);", "the parity is 2"),
}
if platform.machine() == "x86_64":  # elsewhere it gives 0
    BROKEN["division by zero"] = ("p.out[0] = t / p.n;", "integer division by zero")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One source with all broken kernels, and a good one: it compiles faster than thirty."""
    bodies = {"good": "sync_block(); ((uint32_t*)p.out)[t] = t;"}
    bodies |= {f"broken{i}": body for i, (body, _) in enumerate(BROKEN.values())}
    path = tmp_path_factory.mktemp("broken") / "broken.cu"
    path.write_text(HEAD + "".join(KERNEL.format(name=name, body=body) for name, body in bodies.items()))
    return path


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rules_are_reported(broken: Path, name: str) -> None:
    kernel = get_kernel(f"{broken}:broken{list(BROKEN).index(name)}", {}, CPU)
    data, out = aligned(bytes(1024)), np.zeros(64, np.uint32)
    params = Params(data.ctypes.data, out.ctypes.data, 0)
    with pytest.raises(EmulationError, match=BROKEN[name][1]):
        kernel.launch((1, 1, 1), 64, 100, params)
    get_kernel(f"{broken}:good", {}, CPU).launch((1, 1, 1), 64, 100, params)  # not affected by what happened before
    np.testing.assert_array_equal(out, np.arange(64))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"block": 48}, "multiple of 32"),
        ({"block": 2048}, "multiple of 32 up to 1024"),
        ({"grid": (1, 0, 1)}, "the grid must be 1 or more"),
        ({"grid": (1, 70000, 1)}, "65535"),
        ({"shared": 228 << 10}, "more shared memory than a block may have"),
        ({"shared": 164 << 10, "TQ_NO_BULK": 1}, "more shared memory than a block may have"),
        ({"shared": -1}, "negative sizes"),
    ],
)
def test_launches_that_a_gpu_refuses(tmp_path: Path, how: dict[str, int], message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        run(tmp_path, "sync_warp();", **how)  # type: ignore[arg-type]


def test_launch_bound_and_size_of_the_parameters(tmp_path: Path) -> None:
    path = tmp_path / "bound.cu"
    path.write_text(
        '#include "common.cuh"\nstruct P { void* a; void* b; int n; };\nTQ_KERNEL(tq_bound, P, 64, 1) { sync_block(); }\n'
    )
    kernel = get_kernel(str(path), {}, CPU)
    kernel.launch((1, 1, 1), 64, 0, Params())
    with pytest.raises(EmulationError, match="above the kernel's launch bound"):
        kernel.launch((1, 1, 1), 96, 0, Params())

    class Small(ctypes.Structure):
        _fields_ = (("a", ctypes.c_void_p),)

    with pytest.raises(EmulationError, match="struct of parameters has 24 bytes, the one passed has 8"):
        kernel.launch((1, 1, 1), 64, 0, Small())


def test_shared_memory_is_poisoned_for_every_block(tmp_path: Path) -> None:
    code = "((uint32_t*)p.out)[blockIdx.x * 32 + t] = ((uint32_t*)smem)[t]; sync_warp(); ((uint32_t*)smem)[t] = 5;"
    assert np.all(run(tmp_path, code, None, np.zeros(96, np.uint32), grid=(3, 1, 1), shared=128) == 0xFFFFFFFF)


def test_the_opposite_order_shows_a_missing_barrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warp 1 reads what warp 0 writes: right in one order by luck, in both with the barrier."""
    code = "if (t < 32) smem[t] = t; SYNC ((uint32_t*)p.out)[t] = smem[t & 31];"
    results = {}
    for sync in ("", "sync_block();"):
        for reverse in ("0", "1"):
            monkeypatch.setenv("TQ_EMULATE_REVERSE", reverse)
            found = run(tmp_path, code.replace("SYNC", sync), block=64, shared=32)
            results[sync, reverse] = bool(np.array_equal(found[32:], np.arange(32)))
    assert results == {("", "0"): True, ("", "1"): False, ("sync_block();", "0"): True, ("sync_block();", "1"): True}


@pytest.mark.parametrize("reverse", ["0", "1"])
@pytest.mark.parametrize("defines", [{}, {"TQ_UCONTEXT": 1}])
def test_a_block_of_1024_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reverse: str, defines: dict[str, int]
) -> None:
    """Sums over warps and blocks; warps that have ended do not count in sync_block. Both ways to switch stacks."""
    monkeypatch.setenv("TQ_EMULATE_REVERSE", reverse)
    code = """auto sums = (uint32_t*)smem;
    if (t >= 992) return;
    uint32_t x = ((const uint32_t*)p.in)[blockIdx.x * 1024 + t];
    for (int m = 16; m; m >>= 1) x += shfl_xor(x, m);
    if (lane == 0) sums[t >> 5] = x;
    sync_block();
    if (t >= 32) return;
    x = lane < 31 ? sums[lane] : 0;
    for (int m = 16; m; m >>= 1) x += shfl_xor(x, m);
    ((uint32_t*)p.out)[blockIdx.x * 32 + t] = x;"""
    x = np.random.default_rng(1).integers(0, 1 << 20, (3, 1024), np.uint32)
    found = run(tmp_path, code, x, np.zeros((3, 32), np.uint32), grid=(3, 1, 1), block=1024, shared=124, **defines)
    np.testing.assert_array_equal(found, np.repeat(x[:, :992].sum(1)[:, None], 32, 1))


def test_undefined_behaviour_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "((int*)p.out)[t] = (p.n << 31) >> t % 2;\nint a[4] = {1, 2, 3, 4}; ((int*)p.out)[t] += a[t & 3] << (t + p.n);"
    run(tmp_path, code)
    monkeypatch.setenv("TQ_EMULATE_SANITIZE", "1")
    with pytest.raises(EmulationError, match=r"shift out of bounds at .*\.cu:\d+"):
        run(tmp_path, code, n=32)
    with pytest.raises(EmulationError, match=r"integer overflow at .*\.cu:\d+"):
        run(tmp_path, "((int*)p.out)[t] = p.n + t;", n=2**31 - 5)


def test_sources_and_their_errors(tmp_path: Path) -> None:
    path = tmp_path / "pair.cu"
    path.write_text(
        f'{HEAD}#include "own.cuh"\nTQ_KERNEL(tq_pair, Params, 32, 1) {{ ((int*)p.out)[threadIdx.x] = OWN; }}\n'
        "TQ_KERNEL(tq_other, Params, 32, 1) { ((int*)p.out)[threadIdx.x] = TQ_X; }\n"
    )
    out = np.zeros(32, np.int32)
    params = Params(None, out.ctypes.data, 0)
    for own in (5, 6):  # a changed header is noticed, by a process that starts later
        (tmp_path / "own.cuh").write_text(f"#define OWN {own}\n")
        runner._load.cache_clear()
        get_kernel(str(path), {"TQ_X": 7}, CPU).launch((1, 1, 1), 32, 0, params)
        assert np.all(out == own)
    get_kernel(f"{path}:other", {"TQ_X": 7}, CPU).launch((1, 1, 1), 32, 0, params)
    assert np.all(out == 7)
    get_kernel(f"{path}:other", {"TQ_X": 8}, CPU).launch((1, 1, 1), 32, 0, params)
    assert np.all(out == 8)
    with pytest.raises(EmulationError, match=r"pair\.cu:5:.*TQ_X"):
        get_kernel(f"{path}:other", {}, CPU)
    with pytest.raises(EmulationError, match="frame size"):  # more than a fiber's stack
        run(tmp_path, "volatile uint8_t big[100000]; big[t] = 1;")
    with pytest.raises(EmulationError, match=r"no TQ_KERNEL\(tq_third"):
        get_kernel(f"{path}:third", {"TQ_X": 7}, CPU)
    with pytest.raises(EmulationError, match=r"no kernel source .*nothing\.cu"):
        get_kernel("nothing", {}, CPU)
    with pytest.raises(EmulationError, match="not on cuda"):
        get_kernel(str(path), {"TQ_X": 7}, torch.device("cuda:1"))


def test_processes_and_threads_build_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "side.cu").write_text(HEAD + KERNEL.format(name="side", body="((int*)p.out)[t] = 3;"))
    (tmp_path / "cache").mkdir()
    code = """if True:
        import sys, types
        sys.modules["torch"] = types.SimpleNamespace(device=object)  # not needed here, and slow to import
        from tests.emulator import get_kernel
        get_kernel(sys.argv[1], {}, types.SimpleNamespace(type="cpu"))"""
    command = [sys.executable, "-c", code, str(tmp_path / "side.cu")]
    env = os.environ | {"TQ_EMULATE_CACHE": str(tmp_path / "cache")}
    running = [subprocess.Popen(command, cwd=runner.HERE.parents[1], env=env) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".so"]

    failures: list[BaseException] = []

    def use() -> None:
        out = np.zeros(32, np.int32)
        try:
            for _ in range(50):
                get_kernel(str(tmp_path / "side.cu"), {}, CPU).launch((1, 1, 1), 32, 0, Params(None, out.ctypes.data, 0))
            assert np.all(out == 3)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
