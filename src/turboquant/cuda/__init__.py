"""CUDA kernels over packed pages, compiled on first use.

``jit`` compiles and launches, the modules beside it wrap one kernel source each. No compiler or driver library is loaded before
the first kernel is asked for. ``python -m turboquant.cuda`` compiles all kernels and prints the registers they use.
"""

from __future__ import annotations
