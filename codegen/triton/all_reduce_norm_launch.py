"""The fused AllReduce + residual + RMSNorm on symmetric memory, and compiled for absent GPUs.

Law: `all_reduce_norm`. Partial sums, results and signal words of a group of ranks live in one
symmetric allocation, a `Workspace`, which kernels of one stream share; two streams need two, as
their barriers would take each other's signals. The grid follows from rows, ranks and the caller's
limit alone, so all ranks launch the same. Importing this module needs no triton; using it does.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.triton import require_triton
from ridgeline.codegen.triton.arch import architecture
from ridgeline.codegen.triton.config import Config
from ridgeline.codegen.triton.cross_compile import Compiled, cross_compile, first_accepted
from ridgeline.codegen.triton.ops import device_arch
from ridgeline.cost_model.all_reduce import FUSED, MOST_BLOCKS, MOST_ELEMENTS, MOST_RANKS

VARIANTS = FUSED
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_SIGNAL_BYTES = 4


def check_problem(size: int, dtype: torch.dtype, world: int, variant: str, arch: str) -> None:
    """Raises UnsupportedProblem, with what would do, where no kernel takes the problem."""
    if variant not in VARIANTS:
        raise UnsupportedProblem(f"expected a variant of {', '.join(VARIANTS)}, found {variant!r}")
    if dtype not in _POINTERS:
        raise UnsupportedProblem(
            f"all_reduce_norm takes {', '.join(map(str, _POINTERS))}, found {dtype}"
        )
    per_load = 16 // dtype.itemsize
    if not 0 < size <= MOST_ELEMENTS or size % per_load:
        raise UnsupportedProblem(
            f"all_reduce_norm takes rows of up to {MOST_ELEMENTS} elements, a multiple of"
            f" {per_load} (16 bytes) of {dtype}; found {size}: reduce and normalise in two kernels"
        )
    if not 2 <= world <= MOST_RANKS:
        raise UnsupportedProblem(f"all_reduce_norm takes 2 to {MOST_RANKS} ranks, found {world}")
    machine = architecture(arch)
    if machine.backend != "cuda":
        raise UnsupportedProblem(
            f"all_reduce_norm's signals are PTX, for NVIDIA GPUs; found {arch}: use collectives"
        )
    if variant == "multimem" and int(machine.capability) < 90:
        raise UnsupportedProblem(
            f"multimem instructions need sm_90 or later, found {arch}; use two_shot"
        )


@functools.lru_cache(maxsize=256)
def compile_all_reduce_norm(
    size: int,
    *,
    dtype: torch.dtype,
    arch: str,
    world: int,
    variant: str,
    weight: torch.dtype | None = None,
) -> Compiled:
    """The kernel for rows of `size` elements on `arch`, for any number of rows; no GPU is needed.

    weight: its dtype, None where there is none. Raises UnsupportedProblem, UnknownArchitecture,
    KernelRejected, BackendMissing.
    """
    check_problem(size, dtype, world, variant, arch)
    if weight is not None and weight not in _POINTERS:
        raise UnsupportedProblem(f"all_reduce_norm takes a floating-point weight, found {weight}")
    require_triton()
    from ridgeline.codegen.triton import all_reduce_norm as kernels

    kernel = kernels.one_shot_norm if variant == "one_shot" else kernels.two_shot_norm
    rows = _POINTERS[dtype]
    types = {
        **dict.fromkeys(("residual_ptr", "y_ptr", "sum_ptr"), rows),
        **dict.fromkeys(("buffers_ptr", "pads_ptr"), "*i64"),
        "weight_ptr": _POINTERS[weight or dtype],
        "multicast": "i64",
        **dict.fromkeys(("rank", "rows"), "i32"),
        **dict.fromkeys(("eps", "shift"), "fp32"),
    }
    arguments = {name: types[name] for name in kernel.arg_names if name in types}
    constants = {
        "WORLD": world,
        "SIZE": size,
        "WEIGHT": weight is not None,
        "MULTIMEM": variant == "multimem",
        "SIGNALS": True,
    }
    return first_accepted(
        lambda config: cross_compile(
            kernel,
            arguments,
            {name: value for name, value in constants.items() if name in kernel.arg_names},
            config,
            arch,
            aligned={name for name in arguments if name.endswith("_ptr")},
            matrix=False,
        ),
        candidates(size, dtype),
    )


def candidates(size: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """Configurations for rows of `size`, best first: 16 bytes of each rank per thread and turn,
    then more; at 1024 threads ptxas gives each 32 registers and may spill, at fewer it doesn't.
    At least one warp, so that there is a thread for each rank's signals."""
    per_warp = 32 * 16 // dtype.itemsize
    block_n = max(1 << (size - 1).bit_length(), per_warp)
    most = min(32, block_n // per_warp)
    warps = dict.fromkeys(max(1, most // factor) for factor in (1, 2, 4))
    return tuple(Config((("BLOCK_N", block_n),), w, 1) for w in warps)


def grid(rows: int, world: int, variant: str, limit: int = MOST_BLOCKS) -> int:
    """Blocks that every rank launches: one per row that a rank sums, at most `limit`."""
    return max(1, min(limit, rows if variant == "one_shot" else -(-rows // world)))


@dataclass(frozen=True)
class Workspace:
    """The symmetric memory of one group and stream, the same shapes on all ranks.

    partial [rows,N]: where the rank writes its partial sums, and finds y after two-shot and
    multimem; buffers, pads: int64 [W], addresses of each rank's `partial` and signal words;
    multicast: the address of the partial sums' multicast mapping, 0 without; handle keeps the
    mapping alive; blocks: how many the signal words serve.
    """

    partial: Tensor
    buffers: Tensor
    pads: Tensor
    multicast: int
    rank: int
    world: int
    blocks: int
    handle: object


def workspace(
    rows: int, size: int, dtype: torch.dtype, group: object, blocks: int = MOST_BLOCKS
) -> Workspace:
    """Allocates a `Workspace` for up to `rows` rows on every rank of `group`; a collective call.

    Raises UnsupportedProblem where torch has no symmetric memory for the group.
    """
    import torch.distributed as dist
    from torch.distributed import _symmetric_memory as symmetric

    if not torch.cuda.is_available() or torch.version.hip:
        raise UnsupportedProblem(
            "symmetric memory needs CUDA devices joined by NVLink, found none; the decomposed"
            " collectives run anywhere"
        )
    world = dist.get_world_size(group)
    data = -(-rows * size * dtype.itemsize // 16) * 16
    device = torch.device("cuda", torch.cuda.current_device())
    memory = symmetric.empty(
        data + blocks * world * _SIGNAL_BYTES, dtype=torch.uint8, device=device
    )
    memory.zero_()  # every signal word begins at 0
    handle = symmetric.rendezvous(memory, group)
    handle.barrier()
    # Addresses are those of the allocations, in which the tensor may begin further on.
    addresses = [address + handle.offset for address in handle.buffer_ptrs]
    buffers = torch.tensor(addresses, dtype=torch.int64, device=device)
    multicast = handle.multicast_ptr + handle.offset if handle.multicast_ptr else 0
    partial = memory[: rows * size * dtype.itemsize].view(dtype).view(rows, size)
    return Workspace(
        partial, buffers, buffers + data, multicast, handle.rank, world, blocks, handle
    )


def all_reduce_norm(
    space: Workspace,
    rows: int,
    residual: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    shift: float = 0.0,
    variant: str,
    blocks: int = MOST_BLOCKS,
) -> tuple[Tensor, Tensor]:
    """(y [rows,N], residual') from the partial sums in `space.partial[:rows]` of every rank.

    residual: [rows,N] (one_shot), else the rank's shard [ceil(rows/W),N], as residual' is; y then
    lies in `space.partial`, until partial sums are written there again. Every rank makes the same
    call, on one stream for each workspace.
    Raises UnsupportedProblem.
    """
    size, dtype = space.partial.shape[-1], space.partial.dtype
    arch, _ = device_arch(space.partial.device.index)
    expected = [rows if variant == "one_shot" else -(-rows // space.world), size]
    if list(residual.shape) != expected or residual.dtype != dtype:
        raise UnsupportedProblem(
            f"{variant} expects a residual of {dtype} {expected} for {rows} rows on"
            f" {space.world} ranks, found {residual.dtype} {list(residual.shape)}"
        )
    if not 0 < rows <= len(space.partial) or not 0 < blocks <= space.blocks:
        raise UnsupportedProblem(
            f"the workspace serves 1 to {len(space.partial)} rows and 1 to {space.blocks} blocks,"
            f" found {rows} rows, {blocks} blocks"
        )
    if variant == "multimem" and not space.multicast:
        raise UnsupportedProblem("multimem needs an NVSwitch with multicast; use two_shot")
    compiled = compile_all_reduce_norm(
        size,
        dtype=dtype,
        arch=arch,
        world=space.world,
        variant=variant,
        weight=None if weight is None else weight.dtype,
    )
    from ridgeline.codegen.triton import all_reduce_norm as kernels

    with torch.cuda.device(space.partial.device):
        y, total = kernels.all_reduce_norm(
            variant,
            space.buffers,
            space.multicast,
            space.pads,
            residual.contiguous(),
            None if weight is None else weight.contiguous(),
            space.rank,
            rows,
            eps=eps,
            shift=shift,
            blocks=grid(rows, space.world, variant, blocks),
            **compiled.config.launch(),
        )
    return (space.partial[:rows] if y is None else y), total
