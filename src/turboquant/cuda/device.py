"""What the kernels need to know of a GPU, and whether they can run at all."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..errors import KernelError
from .compiler import arch_of, bindings, nvrtc_version

#: Tensor cores for int8 and bf16, and copies past the registers, exist since Ampere.
MIN_CAPABILITY = (8, 0)


def index_of(device: torch.device) -> int:
    """The number of a CUDA device; ``cuda`` alone is torch's current one.

    Raises:
        KernelError: the device is no CUDA device.
    """
    if device.type != "cuda":
        raise KernelError(f"CUDA kernels take tensors on a CUDA device, not on {device}")
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, (major, minor)."""
    p = _properties(index_of(device))
    return p.major, p.minor


def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors."""
    return int(_properties(index_of(device)).multi_processor_count)


def shared_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory that (one block can have, all blocks of one multiprocessor have together).

    Every block occupies 1 KB more than it asks for.
    """
    return _shared_memory(index_of(device))


@functools.cache
def _shared_memory(index: int) -> tuple[int, int]:
    functions = driver()
    kinds, what = functions.CUdevice_attribute, "cannot ask for the shared memory of the GPU"
    check(functions.cuInit(0), what)
    handle = check(functions.cuDeviceGet(index), what)
    block = check(functions.cuDeviceGetAttribute(kinds.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, handle), what)
    whole = check(functions.cuDeviceGetAttribute(kinds.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, handle), what)
    return int(block), int(whole)


def driver() -> Any:
    """The functions of the CUDA driver.

    Raises:
        KernelError: cuda-bindings is not installed.
    """
    return bindings("driver")


def check(result: tuple[Any, ...], what: str) -> Any:
    """The value of a driver call that succeeded.

    Args:
        result: (error code, values...).
        what: begins the message: ``"cannot load decode.cu"``.

    Raises:
        KernelError: the call failed.
    """
    if int(result[0]):
        raise KernelError(f"{what}: {explain(result[0])}")
    return result[1] if len(result) == 2 else result[1:]


def explain(error: Any) -> str:
    """Name and description of a driver's error code."""
    code, text = driver().cuGetErrorString(error)
    return error.name if int(code) else f"{error.name}, {text.decode()}"


def why_unavailable(device: torch.device | None = None) -> str | None:
    """Why the kernels cannot run on a device, in one sentence that says what to do; None if they can.

    Args:
        device: torch's current CUDA device by default.
    """
    if device is not None and device.type != "cuda":
        return f"{device} is not a CUDA device"
    if torch.version.cuda is None:
        built = "for AMD GPUs" if torch.version.hip else "without CUDA"
        return f"torch {torch.__version__} is built {built}: install a CUDA build, see pytorch.org/get-started"
    if not torch.cuda.is_available():
        return f"torch, built for CUDA {torch.version.cuda}, finds no NVIDIA GPU or driver: see what nvidia-smi says"
    return _why_unavailable(index_of(device or torch.device("cuda")))


@functools.cache
def _why_unavailable(index: int) -> str | None:
    found = capability(torch.device("cuda", index))
    if found < MIN_CAPABILITY:
        return "the GPU's compute capability is {}.{}, the kernels need 8.0 (Ampere) or later".format(*found)
    try:
        version = nvrtc_version()
        arch_of(found)
        supported = check(driver().cuDriverGetVersion(), "the driver does not tell its version") // 1000
    except KernelError as e:
        return str(e)
    if supported < version[0]:
        return (
            f"the GPU's driver is for CUDA {supported}, the installed NVRTC for CUDA {version[0]}: update the driver, or "
            f'pip install "turboquant-cache[cuda{supported}]"'
        )
    return None
