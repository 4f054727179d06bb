"""Compiles a Triton kernel for a GPU that need not be present, and audits the code.

A configuration is accepted when its code spills no register, stays within the architecture's
shared memory, uses its matrix instruction where the problem has 16-bit products, and contains no
atomics. Otherwise the next candidate is tried; if none is left, `KernelRejected` lists why.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ridgeline.codegen.errors import KernelRejected
from ridgeline.codegen.triton import cache, require_triton
from ridgeline.codegen.triton.arch import Arch, architecture
from ridgeline.codegen.triton.audit import Audit, audit_amdgcn, audit_cubin
from ridgeline.codegen.triton.config import Config


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel in one configuration for one architecture.

    binary: cubin (NVIDIA) or hsaco (AMD), loadable by the driver; then: the kernel that is
    launched after it to add the parts of a split, None where one pass does it.
    """

    kernel: str
    arch: str
    config: Config
    audit: Audit
    binary: bytes
    then: "Compiled | None" = None

    def __str__(self) -> str:
        matrix = ", ".join(f"{n} {name}" for name, n in self.audit.matrix) or "no matrix unit"
        line = (
            f"{self.kernel} for {self.arch} ({self.config}): {self.audit.registers} registers,"
            f" {self.audit.shared_bytes} B shared, {matrix},"
            f" {self.audit.vector_loads} 16-byte loads, {len(self.binary)} B of code"
        )
        return line if self.then is None else f"{line}; then {self.then}"


def cross_compile(
    kernel: Any,
    arguments: Mapping[str, str],
    constexprs: Mapping[str, Any],
    config: Config,
    arch: str,
    *,
    aligned: Iterable[str] = (),
    matrix: bool = True,
    small: bool = False,
) -> Compiled:
    """Compiles and audits `kernel` (a `triton.jit` function) in one configuration.

    arguments: Triton type ("*fp16", "i32", "fp32") of each argument that is no constexpr;
    constexprs: values of the others, tile sizes of `config` excluded; aligned: arguments that are
    multiples of 16; matrix: whether a matrix instruction is promised; small: whether the tile has
    fewer rows than the family's newest instruction takes, so that HMMA does as well.
    Raises KernelRejected when the code breaks a promise, BackendMissing without Triton.
    """
    machine = architecture(arch)
    constants = {**constexprs, **config.constexprs()}
    record = {
        "source": kernel.cache_key,
        "kernel": kernel.__name__,
        "arguments": dict(arguments),
        "constexprs": constants,
        "aligned": sorted(aligned),
        "config": asdict(replace(config, splits=1)),
        "arch": arch,
        "triton": require_triton().__version__,
    }
    name = cache.key(**record)
    found = cache.load(name)
    if found is None:
        audit, binary = _compile(kernel, arguments, constants, set(aligned), config, machine)
        cache.store(name, {**record, "constexprs": str(constants), "audit": asdict(audit)}, binary)
    else:
        fields = found[0]["audit"]
        fields["matrix"] = tuple((mnemonic, n) for mnemonic, n in fields["matrix"])
        audit, binary = Audit(**fields), found[1]
    if small and machine.backend == "cuda":
        machine = replace(machine, matrix=(*machine.matrix, "HMMA"))
    faults = audit.faults(machine, matrix=matrix)
    if faults:
        raise KernelRejected(f"{kernel.__name__} for {arch} ({config}): {'; '.join(faults)}")
    return Compiled(kernel.__name__, arch, config, audit, binary)


def first_accepted(build: Callable[[Config], Compiled], candidates: Iterable[Config]) -> Compiled:
    """The first candidate that `build` accepts; raises KernelRejected with every reason."""
    reasons = []
    for config in candidates:
        try:
            return build(config)
        except KernelRejected as rejected:
            reasons.append(str(rejected))
    raise KernelRejected(
        "no configuration was accepted:\n  " + ("\n  ".join(reasons) or "none fits shared memory")
    )


def _compile(
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: set[str],
    config: Config,
    arch: Arch,
) -> tuple[Audit, bytes]:
    triton = require_triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: arguments.get(name, "constexpr") for name in names},
        constexprs={name: constants[name] for name in names if name not in arguments},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget(arch.backend, arch.capability, arch.warp_size),
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        },
    )
    shared = compiled.metadata.shared
    if arch.backend == "hip":
        return audit_amdgcn(compiled.asm["amdgcn"], shared), compiled.asm["hsaco"]
    return audit_cubin(compiled.asm["cubin"], shared), compiled.asm["cubin"]
