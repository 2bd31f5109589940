"""Compiling kernels, keeping them on disk, launching them."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from turboquant.cuda import __main__ as command
from turboquant.cuda import cache, compiler, device, instances, jit
from turboquant.errors import KernelError

SOURCE = """
#include "common.cuh"
#include "own.cuh"
struct Params { float* x; int n; float add; };
TQ_KERNEL(tq_scale, Params, 128, 1) {
  TQ_SHARED(smem);
  float* row = (float*)smem;
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  row[threadIdx.x] = i < p.n ? p.x[i] : 0.0f;
  sync_block();
  if (i < p.n) p.x[i] = row[threadIdx.x] * TQ_FACTOR + p.add;
}
TQ_KERNEL(tq_fill, Params, 128, 1) {
  if (threadIdx.x < p.n) p.x[threadIdx.x] = OWN;
}
#ifdef TQ_NEVER
#include "missing.cuh"
#endif
"""
SPILLS = """
struct Params { float* x; int n; };
extern "C" __global__ void __launch_bounds__(1024, 2) tq_spills(const __grid_constant__ Params p) {
  float a[96];
  #pragma unroll
  for (int i = 0; i < 96; i++) a[i] = p.x[i * p.n + threadIdx.x];
  for (int k = 0; k < p.n; k++)
    #pragma unroll
    for (int i = 0; i < 96; i++) a[i] = a[i] * a[(i + 1) % 96] + p.x[k];
  #pragma unroll
  for (int i = 0; i < 96; i++) p.x[i * p.n + threadIdx.x] = a[i];
}
"""


class Params(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint64), ("n", ctypes.c_int32), ("add", ctypes.c_float))


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "own.cuh").write_text("#define OWN 7.0f\n")
    (tmp_path / "scale.cu").write_text(SOURCE)
    return str(tmp_path / "scale.cu")


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of compiled kernels."""
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the cache had to compile."""
    seen: list[str] = []

    def count(source: str, *args: object) -> compiler.Compiled:
        seen.append(source)
        return compiler.compile_source(source, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "compile_source", count)
    return seen


def test_names() -> None:
    assert compiler.source_path("decode") == compiler.CSRC / "decode.cu"
    assert compiler.source_path("decode:combine") == compiler.CSRC / "decode.cu"
    assert compiler.kernel_name("decode") == "tq_decode"
    assert compiler.kernel_name("decode:combine") == "tq_combine"
    assert compiler.source_path("/x/y.cu:fill") == Path("/x/y.cu")
    assert compiler.kernel_name("/x/y.cu:fill") == "tq_fill"
    assert compiler.kernel_name("/x/y.cu") == "tq_y"
    assert compiler._split(r"C:\x\y.cu")[0] == Path(r"C:\x\y.cu")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_compiles_without_a_gpu(source: str, arch: str) -> None:
    made = jit.compile_source(source, {"TQ_FACTOR": 3}, arch)
    assert made.cubin.startswith(b"\x7fELF")
    assert set(made.kernels) == {"tq_scale", "tq_fill"}
    assert 0 < made.registers < 64
    assert made.stack == made.spill_stores == made.spill_loads == made.shared == 0
    if arch == "sm_80":
        assert made.usage.constant == 352 + ctypes.sizeof(Params)
    assert jit.compile_source(source, {"TQ_FACTOR": 4}, arch).cubin != made.cubin
    with pytest.raises(KernelError, match=r"does not mention tq_other; it has tq_"):
        _ = jit.compile_source(source + ":other", {"TQ_FACTOR": 3}, arch).registers


def test_spills_and_static_shared_memory_are_reported(tmp_path: Path) -> None:
    (tmp_path / "spills.cu").write_text(SPILLS)
    made = jit.compile_source(str(tmp_path / "spills.cu"), {}, "sm_90")
    assert made.registers == 32  # 65536 / 2048
    assert made.stack > 0
    assert made.spill_stores > 0
    assert made.spill_loads > 0
    text = 'extern "C" __global__ void tq_static(float* x) { __shared__ float s[25]; s[threadIdx.x] = *x; *x = s[3]; }'
    (tmp_path / "static.cu").write_text(text)
    assert jit.compile_source(str(tmp_path / "static.cu"), {}, "sm_90").shared == 100


def test_errors_say_where(source: str, tmp_path: Path) -> None:
    with pytest.raises(KernelError) as e:
        jit.compile_source(source, {"TQ_FACTOR": '"text"', "TQ_D": 128}, "sm_90")
    assert 'scale.cu (TQ_D=128, TQ_FACTOR="text") does not compile for sm_90' in str(e.value)
    assert re.search(r"scale\.cu\(11\): error: ", str(e.value))
    (tmp_path / "own.cuh").write_text("int f() { return g(); }\n")
    with pytest.raises(KernelError, match=r"own\.cuh\(1\): error: "):
        jit.compile_source(source, {"TQ_FACTOR": 1}, "sm_90")
    with pytest.raises(KernelError, match=r"missing\.cuh"):
        jit.compile_source(source, {"TQ_FACTOR": 1, "TQ_NEVER": 1}, "sm_90")
    with pytest.raises(KernelError, match=r"nothing\.cu: No such file"):
        jit.compile_source(str(tmp_path / "nothing.cu"), {}, "sm_90")
    with pytest.raises(KernelError, match="sm_20"):
        jit.compile_source(source, {"TQ_FACTOR": 1}, "sm_20")


@pytest.mark.parametrize("defines", [{"TQ D": 1}, {"TQ_D": 1.5}, {"TQ_D": True}, {"TQ_D=1 -DX": 1}])
def test_bad_macros_are_refused(source: str, defines: dict[str, int]) -> None:
    with pytest.raises(KernelError, match="cannot define"):
        jit.compile_source(source, defines, "sm_90")


def test_targets() -> None:
    assert compiler.arch_of((8, 0)) == "sm_80"
    assert compiler.arch_of((8, 9)) == "sm_89"
    assert compiler.arch_of((9, 0)) == "sm_90"
    assert compiler.arch_of((10, 0)) == "sm_100"
    assert compiler.arch_of((9, 7)) == "sm_90"
    with pytest.raises(KernelError, match=r"NVRTC \d+\.\d+ does not compile for compute capability 99\.0"):
        compiler.arch_of((99, 0))


def test_disk_cache(source: str, kernels: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = cache.load(source, {"TQ_FACTOR": 3, "TQ_D": 1}, "sm_90")
    again = cache.load(source, {"TQ_D": 1, "TQ_FACTOR": 3}, "sm_90")
    assert again == first == jit.compile_source(source, {"TQ_FACTOR": 3, "TQ_D": 1}, "sm_90")
    assert len(compiled) == 1
    # Another kernel of the same file comes from the same entry.
    assert set(cache.load(source + ":fill", {"TQ_FACTOR": 3, "TQ_D": 1}, "sm_90").kernels) == {"tq_scale", "tq_fill"}
    assert len(compiled) == 1
    cache.load(source, {"TQ_FACTOR": "3", "TQ_D": 1}, "sm_80")
    cache.load(source, {"TQ_FACTOR": 4, "TQ_D": 1}, "sm_90")
    assert len(compiled) == 3
    monkeypatch.setattr(compiler, "__version__", "0.0.0")
    cache.load(source, {"TQ_FACTOR": 3, "TQ_D": 1}, "sm_90")
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (11, 1))
    cache.load(source, {"TQ_FACTOR": 3, "TQ_D": 1}, "sm_90")
    assert len(compiled) == 5
    assert len(list(kernels.glob("scale-sm_*.bin"))) == 5
    assert not list(kernels.glob("*.tmp"))


def test_a_changed_header_is_another_kernel(source: str, kernels: Path, compiled: list[str]) -> None:
    old = cache.load(source, {"TQ_FACTOR": 3}, "sm_90")
    (Path(source).parent / "own.cuh").write_text("#define OWN 8.0f\n")
    assert cache.load(source, {"TQ_FACTOR": 3}, "sm_90").cubin != old.cubin
    assert len(compiled) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_damaged_entries_are_compiled_again(source: str, kernels: Path, compiled: list[str], damage: str) -> None:
    good = cache.load(source, {"TQ_FACTOR": 3}, "sm_90")
    (path,) = kernels.glob("*.bin")
    whole = path.read_bytes()
    flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    path.write_bytes({"flip": flipped, "cut": whole[:-1], "empty": b"", "foreign": b"\x7fELF" + whole}[damage])
    assert cache.load(source, {"TQ_FACTOR": 3}, "sm_90") == good
    assert path.read_bytes() == whole
    cache.load(source, {"TQ_FACTOR": 3}, "sm_90")
    assert len(compiled) == 2


def test_a_folder_that_cannot_be_written(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="Set TURBOQUANT_CACHE_DIR") as seen:
        first = cache.load(source, {"TQ_FACTOR": 3}, "sm_90")
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load(source, {"TQ_FACTOR": 3}, "sm_90") == first
    assert len(compiled) == 2


def test_a_full_disk(source: str, kernels: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[str]) -> None:
    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert cache.load(source, {"TQ_FACTOR": 3}, "sm_90").cubin
    assert not list(kernels.glob("scale*"))


RACE = """
import pathlib, sys, time
from turboquant.cuda import cache, compiler
source, log, me, other = sys.argv[1:]
def slow(*args):
    with open(log, "a") as f: f.write("x")
    time.sleep(0.5)
    return compiler.compile_source(*args)
cache.compile_source = slow
pathlib.Path(me).touch()
while not pathlib.Path(other).exists(): time.sleep(0.001)
print(len(cache.load(source, {"TQ_FACTOR": 3}, "sm_90").cubin))
"""


def test_two_processes_compile_once(source: str, kernels: Path, tmp_path: Path) -> None:
    package = Path(compiler.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
    log, a, b = (str(tmp_path / name) for name in ("log", "a", "b"))
    started = [
        subprocess.Popen([sys.executable, "-c", RACE, source, log, *names], env=environment, stdout=subprocess.PIPE)
        for names in ((a, b), (b, a))
    ]
    outputs = [p.communicate(timeout=120)[0] for p in started]
    assert [p.returncode for p in started] == [0, 0]
    assert outputs[0] == outputs[1] != b""
    assert Path(log).read_text() == "x"


def test_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TURBOQUANT_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.folder() == Path("/xdg/turboquant/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path("/home/me/.cache/turboquant/kernels")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.folder() == Path("/home/me/Library/Caches/turboquant/kernels")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert cache.folder() == Path("/local/turboquant/kernels")
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", "~/mine")
    assert cache.folder() == Path("/home/me/mine/kernels")


def test_why_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jit.why_unavailable(torch.device("cpu")) == "cpu is not a CUDA device"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "built without CUDA" in (jit.why_unavailable() or "")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "built for AMD GPUs" in (jit.why_unavailable() or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no NVIDIA GPU or driver" in (jit.why_unavailable() or "")


class Driver:
    """The one function that matters here, of a driver for CUDA 12.8."""

    @staticmethod
    def cuDriverGetVersion() -> tuple[int, int]:
        return 0, 12080


@pytest.mark.parametrize(
    ("capability", "missing", "reason"),
    [
        ((7, 5), "", "compute capability is 7.5, the kernels need 8.0"),
        ((9, 0), "cuda.bindings.nvrtc", 'pip install "turboquant-cache[cuda]"'),
        ((99, 0), "", "install a newer nvidia-cuda-nvrtc"),
        (
            (9, 0),
            "",
            "driver is for CUDA 12, the installed NVRTC for CUDA 13: update the driver, or pip install "
            '"turboquant-cache[cuda12]"',
        ),
    ],
)
def test_why_a_gpu_is_not_usable(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], missing: str, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "capability", lambda d: capability)
    monkeypatch.setattr(device, "driver", Driver)
    monkeypatch.setattr(device, "_why_unavailable", device._why_unavailable.__wrapped__)
    monkeypatch.setattr(device, "nvrtc_version", lambda: (13, 0))
    if missing:
        monkeypatch.setattr(device, "nvrtc_version", compiler.nvrtc_version.__wrapped__)
        monkeypatch.setitem(sys.modules, missing, None)
    assert reason in (jit.why_unavailable(torch.device("cuda", 0)) or "")


def test_cuda12_users_are_told_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert "[cuda12]" in compiler.install_hint()


def test_other_devices_are_refused(source: str) -> None:
    with pytest.raises(KernelError, match="CUDA kernels take tensors on a CUDA device, not on cpu"):
        jit.get_kernel(source, {"TQ_FACTOR": 3}, torch.device("cpu"))
    with pytest.raises(KernelError, match="not on cpu"):
        jit.multiprocessors(torch.device("cpu"))


def test_representative_has_every_value_of_every_macro() -> None:
    every = [(("A", a), ("B", b), ("C", c)) for a in range(5) for b in range(3) for c in "xy"]
    few = jit.representative(every)
    assert {pair for macros in few for pair in macros} == {pair for macros in every for pair in macros}
    assert len(few) == 5
    assert jit.representative([()]) == [()]
    assert jit.representative([]) == []
    sizes = [(("A", a % 2), ("SIZE", a)) for a in range(100)]
    assert jit.representative(sizes) == [(("A", 0), ("SIZE", 0)), (("A", 1), ("SIZE", 1))]


def test_registered_instances(source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(instances, "_registered", {})
    monkeypatch.setattr(instances, "instances", lambda: dict(instances._registered))
    monkeypatch.setattr(command, "instances", instances.instances)
    jit.register_instances(source, lambda: [{"TQ_FACTOR": f} for f in (2, 3, 2)], Params)
    jit.register_instances(source + ":fill", lambda: [{"TQ_FACTOR": 3}])
    made = list(jit.compile_all(["sm_80", "sm_90"]))
    assert [(c.defines, c.arch) for c in made] == [((("TQ_FACTOR", f),), arch) for f in (2, 3) for arch in ("sm_80", "sm_90")]
    assert len(list(jit.compile_all(["sm_90"], limit=1, sources=[source]))) == 1
    assert command.main(["--arch", "sm_90", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3
    assert "TQ_FACTOR=2" in lines[2]
    assert command.main(["--arch", "sm_90", "--define", "TQ_FACTOR=2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1
    assert command.main(["--arch", "sm_20"]) == 2
    Path(source).with_name("spills.cu").write_text(SPILLS)
    jit.register_instances(str(Path(source).with_name("spills.cu")), lambda: [{"TQ_FACTOR": 2}])
    assert command.main(["--arch", "sm_90"]) == 1
