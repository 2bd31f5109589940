"""Kernels by name: compiled or fetched from disk on first use, then launched within microseconds.

    kernel = jit.get_kernel("decode", {"TQ_D": 128}, query.device)
    kernel.launch((splits, heads, rows), 128, shared, params)

A source ``"decode"`` is ``csrc/decode.cu`` and its kernel ``tq_decode``; ``"decode:combine"`` is ``tq_combine`` of the same
file, compiled once for both. A path that ends in ``.cu`` is taken as it is. A kernel takes one struct, which the caller mirrors
as a :class:`ctypes.Structure`. All functions may be called from several threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from ..errors import KernelError
from . import cache
from .compiler import Compiled, Defines, arch_of, compile_source, describe, freeze, kernel_name, source_path
from .device import capability, check, driver, explain, index_of, multiprocessors, shared_memory, why_unavailable
from .instances import compile_all, instances, register_instances, representative

__all__ = [
    "Compiled",
    "Kernel",
    "capability",
    "compile_all",
    "compile_source",
    "get_kernel",
    "instances",
    "multiprocessors",
    "register_instances",
    "representative",
    "shared_memory",
    "why_unavailable",
]

_Frozen = tuple[tuple[str, int | str], ...]
_Pointers = ctypes.c_void_p * 1
#: Above this many bytes of shared memory per block, the multiprocessor is asked to have as much of it as it can instead of L1.
_MUCH_SHARED = 16 << 10

_kernels: dict[tuple[Any, ...], Kernel] = {}
_modules: dict[tuple[str, int, _Frozen], Any] = {}
_locks: dict[tuple[str, int, _Frozen], threading.Lock] = {}


def get_kernel(source: str, defines: Defines, device: torch.device) -> Kernel:
    """A kernel that is ready to be launched.

    The first call of a process takes about a millisecond if the kernel was compiled before on this machine, else up to some
    seconds; further calls take about a microsecond. Works during the capture of a CUDA graph.

    Args:
        source: see above.
        defines: macros that specialise it.
        device: where it will run.

    Raises:
        KernelError: kernels cannot run here (see :func:`why_unavailable`), or this one does not compile or load.
    """
    index = device.index
    if index is None or device.type != "cuda":
        index = index_of(device)
    key = (source, index, *defines.items())
    kernel = _kernels.get(key)
    if kernel is None:
        kernel = _kernels[key] = _load(source, freeze(defines), index)
    return kernel


def _load(source: str, defines: _Frozen, index: int) -> Kernel:
    module_key = str(source_path(source)), index, defines
    with _locks.setdefault(module_key, threading.Lock()):
        kernel = _kernels.get((source, index, *defines))
        if kernel is not None:
            return kernel
        reason = why_unavailable(torch.device("cuda", index))
        if reason is not None:
            raise KernelError(f"CUDA kernels cannot run: {reason}")
        what = f"cannot load {describe(source, defines)}"
        with _context(index).current() as functions:
            if module_key not in _modules:
                made = cache.load(source, dict(defines), arch_of(capability(torch.device("cuda", index))))
                _modules[module_key] = check(functions.cuLibraryLoadData(made.cubin, [], [], 0, [], [], 0), what)
            name = kernel_name(source)
            handle = check(functions.cuLibraryGetKernel(_modules[module_key], name.encode()), f"{what}: no kernel {name}")
            function = check(functions.cuKernelGetFunction(handle), what)
            kernel = Kernel(name, f"{name} of {describe(source, defines)}", index, function)
        _kernels[(source, index, *defines)] = kernel
        return kernel


class _Context:
    """The context of a device that torch uses, too."""

    def __init__(self, index: int) -> None:
        functions = driver()
        check(functions.cuInit(0), "the CUDA driver does not start")
        self.device = check(functions.cuDeviceGet(index), f"no CUDA device {index}")
        # Never released: torch holds the primary context until the process ends.
        self.handle = check(functions.cuDevicePrimaryCtxRetain(self.device), f"cannot use CUDA device {index}")

    @contextlib.contextmanager
    def current(self) -> Iterator[Any]:
        """Calls inside, of the functions it gives, mean this device, and may load code while a graph is captured."""
        functions = driver()
        relaxed = functions.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        check(functions.cuCtxPushCurrent(self.handle), "cannot use the CUDA device")
        try:
            before = check(functions.cuThreadExchangeStreamCaptureMode(relaxed), "cannot load a kernel")
            try:
                yield functions
            finally:
                functions.cuThreadExchangeStreamCaptureMode(before)
        finally:
            functions.cuCtxPopCurrent()


@functools.cache
def _context(index: int) -> _Context:
    return _Context(index)


class Kernel:
    """A loaded kernel of one device. :func:`get_kernel` makes them.

    Attributes:
        name: of the function.
        registers: of a thread.
        local_bytes: local memory of a thread: spilled registers and arrays indexed at run time; 0 is wanted.
        static_shared: shared memory of a block besides the dynamic part, bytes.
        max_block: most threads of a block.
        parameter_bytes: size of the struct it takes; None if the driver is too old (before CUDA 12.4) to tell.
    """

    def __init__(self, name: str, description: str, index: int, function: Any) -> None:
        functions = driver()
        kinds = functions.CUfunction_attribute
        self.name = name
        self._description, self._index, self._function = description, index, function
        self._context = _context(index)
        self._launch = functions.cuLaunchKernel
        self._device_now = torch._C._cuda_getDevice
        self._stream = torch._C._cuda_getCurrentRawStream
        self.registers = self._attribute(kinds.CU_FUNC_ATTRIBUTE_NUM_REGS)
        self.local_bytes = self._attribute(kinds.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)
        self.static_shared = self._attribute(kinds.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
        self.max_block = self._attribute(kinds.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)
        try:
            self.parameter_bytes: int | None = check(functions.cuFuncGetParamInfo(function, 0), description)[1]
        except RuntimeError as e:
            if isinstance(e, KernelError):
                raise
            self.parameter_bytes = None  # the driver lacks the function
        self._shared_ready = _MUCH_SHARED
        self._struct: type[ctypes.Structure] | None = None

    def _attribute(self, kind: Any) -> int:
        return int(
            check(driver().cuFuncGetAttribute(kind, self._function), f"cannot ask for {kind.name} of {self._description}")
        )

    def launch(self, grid: tuple[int, int, int], block: int, shared: int, params: ctypes.Structure) -> None:
        """Put one run on torch's current stream of the device; returns at once.

        Nothing is allocated on the device and nothing is waited for, so it can be captured by a CUDA graph. ``params`` is
        copied. What its pointers refer to must stay until the run is over; torch sees to that for tensors freed on this stream.

        Args:
            grid: number of blocks, (x, y, z), each at least 1.
            block: threads of a block.
            shared: bytes of dynamic shared memory of a block.
            params: the struct.

        Raises:
            KernelError: the driver refuses; the kernel has not run.
        """
        if shared > self._shared_ready or type(params) is not self._struct:
            self._prepare(shared, params)
        if self._device_now() == self._index:
            error = self._try(grid, block, shared, params)
            if not error:
                return
            if error.name != "CUDA_ERROR_INVALID_CONTEXT":
                self._fail(error, grid, block, shared)
        # Another device is torch's current one, or this thread has not used CUDA yet.
        with self._context.current():
            error = self._try(grid, block, shared, params)
        if error:
            self._fail(error, grid, block, shared)

    def _try(self, grid: tuple[int, int, int], block: int, shared: int, params: ctypes.Structure) -> Any:
        pointers = _Pointers(ctypes.addressof(params))
        x, y, z = grid
        (error,) = self._launch(self._function, x, y, z, block, 1, 1, shared, self._stream(self._index), pointers, 0)
        return error

    def _prepare(self, shared: int, params: ctypes.Structure) -> None:
        """What must be checked or set before the first launch with this much shared memory and this struct."""
        size = ctypes.sizeof(params)
        if self.parameter_bytes not in (None, size):
            raise KernelError(f"{self._description} takes {self.parameter_bytes} bytes, {type(params).__name__} has {size}")
        if shared > self._shared_ready:
            most = shared_memory(torch.device("cuda", self._index))[0] - self.static_shared
            if shared > most:
                raise KernelError(f"{self._description} asks for {shared} bytes of shared memory, a block here can have {most}")
            with self._context.current() as functions:
                kinds = functions.CUfunction_attribute
                for kind, value in (
                    (kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most),
                    (kinds.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),  # percent
                ):
                    check(
                        functions.cuFuncSetAttribute(self._function, kind, value),
                        f"cannot set {kind.name} of {self._description}",
                    )
            self._shared_ready = most
        self._struct = type(params)

    def _fail(self, error: Any, grid: tuple[int, int, int], block: int, shared: int) -> NoReturn:
        raise KernelError(
            f"cannot launch {self._description} with grid {grid}, {block} threads (at most {self.max_block}), "
            f"{shared} bytes of shared memory: {explain(error)}"
        )
