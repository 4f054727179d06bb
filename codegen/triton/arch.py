"""What Triton's code needs to know of a GPU architecture: limits and instruction names.

Shared memory is what one block may opt in to, in bytes (CUDA C programming guide, table of
technical specifications; AMD CDNA3 ISA guide: 64 KiB of LDS). Multiprocessor counts are those of
the largest product sold (A100 108, RTX 3090 Ti 84, L40S 142, H100 SXM 132, B200 148, MI300X 304)
and serve only where the caller does not know the device.
"""

from dataclasses import dataclass

from ridgeline.codegen.errors import UnknownArchitecture


@dataclass(frozen=True, slots=True)
class Arch:
    """One GPU architecture.

    name: "sm_80", "gfx942", ...; backend: Triton's name, "cuda" or "hip"; capability: what
    Triton's GPUTarget takes (80, "gfx942"); shared_bytes: the limit for one block;
    multiprocessors: SMs or compute units; matrix: the mnemonic prefixes of which one must stand in
    the code of a 16-bit matrix kernel.
    """

    name: str
    backend: str
    capability: int | str
    warp_size: int
    shared_bytes: int
    multiprocessors: int
    matrix: tuple[str, ...]


ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Arch("sm_80", "cuda", 80, 32, 163 * 1024, 108, ("HMMA",)),
        Arch("sm_86", "cuda", 86, 32, 99 * 1024, 84, ("HMMA",)),
        Arch("sm_89", "cuda", 89, 32, 99 * 1024, 142, ("HMMA",)),
        Arch("sm_90", "cuda", 90, 32, 227 * 1024, 132, ("HGMMA",)),
        Arch("sm_100", "cuda", 100, 32, 227 * 1024, 148, ("UTCHMMA",)),
        Arch("gfx942", "hip", "gfx942", 64, 64 * 1024, 304, ("v_mfma",)),
    )
}


def unknown(name: str) -> str:
    """Why there are no kernels for the architecture; empty where there are."""
    if name in ARCHITECTURES:
        return ""
    known = ", ".join(ARCHITECTURES)
    return f"architecture {name!r} is not known to the Triton back end; expected one of {known}"


def architecture(name: str) -> Arch:
    """The architecture called `name`; raises UnknownArchitecture with the known names."""
    if problem := unknown(name):
        raise UnknownArchitecture(problem)
    return ARCHITECTURES[name]
