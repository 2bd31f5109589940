"""Runs the CUDA kernels of ``turboquant.cuda`` on a CPU, for tests.

``get_kernel`` takes the place of ``turboquant.cuda.jit.get_kernel``: it compiles the same source with the system's C++ compiler
(``emulate.h`` supplies the primitives of ``common.cuh``) and returns an object with the same ``launch``. Every CUDA thread is a
fiber, so warp collectives and barriers mean what they mean on a GPU; broken rules (a diverged warp, a missing wait, an access
outside of shared memory or a misaligned one) raise :class:`EmulationError` with block and thread.

Environment: ``TQ_EMULATE_REVERSE=1`` runs blocks, warps and lanes in the opposite order (results of a correct kernel stay the
same unless it sums with atomics); ``TQ_EMULATE_SANITIZE=1`` adds the checks of ``-fsanitize=undefined``;
``TQ_EMULATE_CACHE`` names the folder of compiled kernels.
"""

from .runner import EmulatedKernel, EmulationError, get_kernel, why_unavailable

__all__ = ["EmulatedKernel", "EmulationError", "get_kernel", "why_unavailable"]
