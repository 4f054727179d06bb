"""Memory that tensors free stays with the process, if asked for."""

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
from ridgeline.tools.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def touch():
    blocks = [torch.ones(3 << 21) for _ in range(4)]  # of 24 MiB
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
