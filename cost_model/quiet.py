"""Keeps what a C library prints off this process's standard output."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_c() -> Iterator[None]:
    """While it lasts, what C code prints is dropped. HiGHS names some of its functions as it calls
    them, whatever `disp` says, and a plan in JSON may be going to the same place."""
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    try:
        kept = os.dup(1)
    except OSError:  # no standard output to keep clean
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        libc.fflush(None)  # it buffers where the output is no terminal
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)
