"""Memory of results kept by the process, for timings of kernels that allocate them.

A fresh page from the system costs several times what a kernel does with it, and glibc gives large
blocks back as soon as they are freed. A compiled model keeps its buffers.
"""

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def keep_pages() -> None:
    """Let malloc keep what is freed (glibc; elsewhere results are allocated as they are)."""
    mallopt: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_max, 0)
