"""Memory that is freed stays with the process, if asked for."""

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import ctypes, resource, sys
from ridgeline.tools.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
libc, size = ctypes.CDLL(None), 40 << 20
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def touch():
    blocks = [libc.malloc(size) for _ in range(4)]
    for block in blocks:
        libc.memset(block, 1, size)
    for block in reversed(blocks):
        libc.free(block)
for _ in range(3):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_blocks_are_not_handed_back() -> None:
    def faults(what: str) -> int:
        command = [sys.executable, "-c", _FAULTS, what]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("as it is") > 10_000
    assert faults("kept") < 1_000
