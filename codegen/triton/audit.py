"""What compiled GPU code shows without a GPU: registers, spills, shared memory, instructions.

NVIDIA: `cuobjdump -res-usage` for resources and `nvdisasm` for SASS, both shipped with Triton.
AMD: the assembly that LLVM prints carries resources and instructions.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ridgeline.codegen.errors import BackendMissing, KernelRejected
from ridgeline.codegen.triton import require_triton
from ridgeline.codegen.triton.arch import Arch

_SASS = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_AMDGCN = re.compile(r"^\s+([a-z]\w+)(?:\s|$)", re.MULTILINE)
_NVIDIA_MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "IMMA", "IGMMA", "QGMMA")
# Global memory only: Blackwell code takes its tensor memory with an atomic on shared memory.
_NVIDIA_ATOMIC = ("ATOM", "ATOMG", "RED", "REDG")
_AMD_ATOMIC = ("global_atomic", "buffer_atomic", "flat_atomic")


@dataclass(frozen=True, slots=True)
class Audit:
    """Counts over one compiled kernel (static: instructions in the code, not executed).

    registers: per thread (vector registers on AMD); stack_bytes: local memory per thread, where
    spilled registers go; shared_bytes: per block; matrix: matrix instructions by mnemonic;
    vector_loads: global loads of 16 bytes, asynchronous ones included; atomics: on global memory,
    without signals: compare-and-swaps of system scope, which order blocks of several devices and
    add nothing up; multicast: loads that a switch sums.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix: tuple[tuple[str, int], ...]
    vector_loads: int
    atomics: int
    signals: int = 0
    multicast: int = 0

    def faults(self, arch: Arch, *, matrix: bool) -> list[str]:
        """What breaks the promises: no spill, shared memory within the limit, no atomics and,
        where `matrix` is set, the architecture's matrix instruction. Empty when accepted."""
        faults = []
        if self.stack_bytes:
            faults.append(f"expected no spilled registers, found {self.stack_bytes} B of stack")
        if self.shared_bytes > arch.shared_bytes:
            faults.append(
                f"expected at most {arch.shared_bytes} B of shared memory,"
                f" found {self.shared_bytes} B"
            )
        if self.atomics:
            faults.append(f"expected no atomics (determinism), found {self.atomics}")
        if matrix and not any(name.startswith(arch.matrix) for name, _ in self.matrix):
            found = ", ".join(name for name, _ in self.matrix) or "none"
            faults.append(f"expected {' or '.join(arch.matrix)} instructions, found {found}")
        return faults


def nvidia_tool(name: str) -> Path:
    """The path of `cuobjdump` or `nvdisasm` inside the Triton wheel; raises BackendMissing."""
    path = Path(str(require_triton().__file__)).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise BackendMissing(
            f"the audit of NVIDIA code needs {name}, expected at {path}, found nothing there."
            " Install a Triton wheel from PyPI, which ships it."
        )
    return path


def audit_cubin(cubin: bytes, shared_bytes: int) -> Audit:
    """Audit of an NVIDIA binary; `shared_bytes` is the dynamic shared memory of its launch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass = _output(nvidia_tool("nvdisasm"), "-c", path)
        usage = _output(nvidia_tool("cuobjdump"), "-res-usage", path)
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", usage)
    if found is None:
        raise KernelRejected(f"expected REG and STACK in cuobjdump's output, found {usage!r}")
    counts = Counter(_SASS.findall(sass))
    wide = sum(
        n
        for name, n in counts.items()
        if name.startswith(("LDG", "LDGSTS", "UTMALDG")) and ("128" in name or "UTMA" in name)
    )
    return Audit(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=shared_bytes,
        matrix=_by_family(counts, _NVIDIA_MATRIX),
        vector_loads=wide,
        atomics=sum(
            n
            for name, n in counts.items()
            if name.split(".")[0] in _NVIDIA_ATOMIC and not _is_signal(name)
        ),
        signals=sum(n for name, n in counts.items() if _is_signal(name)),
        multicast=sum(n for name, n in counts.items() if name.startswith("LDGMC")),
    )


def audit_amdgcn(assembly: str, shared_bytes: int) -> Audit:
    """Audit of AMD code from LLVM's assembly text."""

    def resource(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise KernelRejected(f"expected .{name} in the AMD assembly's metadata, found none")
        return int(found[1])

    counts = Counter(_AMDGCN.findall(assembly))
    spilled = resource("vgpr_spill_count") + resource("sgpr_spill_count")
    return Audit(
        registers=resource("vgpr_count"),
        stack_bytes=max(resource("private_segment_fixed_size"), 4 * spilled),
        shared_bytes=shared_bytes,
        matrix=_by_family(counts, ("v_mfma",)),
        vector_loads=sum(
            n for name, n in counts.items() if re.match(r"(global|buffer)_load_\w*x4", name)
        ),
        atomics=sum(n for name, n in counts.items() if name.startswith(_AMD_ATOMIC)),
    )


def _is_signal(name: str) -> bool:
    return name.startswith("ATOM") and ".CAS" in name and name.endswith(".SYS")


def _by_family(counts: Counter[str], families: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    found: Counter[str] = Counter()
    for name, n in counts.items():
        # SASS: HMMA.16816.F32 -> HMMA; amdgcn: the whole mnemonic names the shape.
        if name.split(".")[0] in families:
            found[name.split(".")[0]] += n
        elif name.startswith("v_mfma") and "v_mfma" in families:
            found[name] += n
    return tuple(sorted(found.items()))


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelRejected(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr
