"""What the C library does with memory that tensors free, where that is glibc.

It hands what lies at the end of its heap back to the system, depending on what else happens to be
allocated there, and maps large blocks anew each time; a page that is touched again then costs a
fault, which on virtual machines takes a microsecond and more: 10 ms for a tensor of 25 MB that is
read and written in 2. A compiled model keeps its buffers, and servers that care run under tcmalloc
or jemalloc, which keep what is freed.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """From here on keep freed blocks for later ones, in this whole process; they are found again
    once the heap has settled, after a few rounds.

    Returns whether that could be asked for: False where the C library is not glibc, or refuses.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))
