"""The fused kernels with their signals on one GPU: each rank a stream, all memories on one device.

What it can't show is NVLink: the switch's sums, and memory ordering between devices.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from ridgeline.codegen.symmetric_memory import Launch, emulate
from ridgeline.codegen.triton.all_reduce_norm_launch import compile_all_reduce_norm, grid
from ridgeline.codegen.triton.ops import device_arch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
EPS = 1e-5
BARS = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 5e-7}


class Loader:
    """In a kernel's place: loads its code onto the device and launches nothing."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **options: self.kernel.warmup(
            *args, grid=grid, **options
        )._init_handles()


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("variant", ["one_shot", "two_shot"])
@pytest.mark.parametrize(("world", "rows"), [(2, 5), (4, 37), (8, 64), (8, 3)])
def test_ranks_on_streams_of_one_gpu(
    variant: str, world: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ridgeline.codegen.triton import all_reduce_norm as kernels

    size, generator = 1024, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    blocks = grid(rows, world, variant, 4)
    arch, _ = device_arch(0)
    config = compile_all_reduce_norm(
        size, dtype=dtype, arch=arch, world=world, variant=variant, weight=dtype
    ).config.launch()
    shard = -(-rows // world)
    pads = torch.zeros(world, blocks * world, dtype=torch.int32, device="cuda")
    buffers = torch.empty(world, rows, size, dtype=dtype, device="cuda")
    tables = [
        torch.tensor([t[r].data_ptr() for r in range(world)], dtype=torch.int64, device="cuda")
        for t in (buffers, pads)
    ]
    streams = [torch.cuda.Stream() for _ in range(world)]
    for launch in range(3):  # signal words must be ready again each time
        weight, residual = normal(size), normal(rows, size)
        given = Launch([normal(rows, size) for _ in range(world)], residual, weight, EPS)
        expected = emulate(variant, [given], blocks=blocks, seed=launch)[0]
        for rank in range(world):
            buffers[rank].copy_(given.partials[rank])
        padded = torch.zeros(shard * world, size, dtype=dtype, device="cuda")
        padded[:rows] = residual.cuda()
        own = padded.view(world, shard, size)
        on_device = weight.cuda()
        torch.cuda.synchronize()

        def run(rank: int, own=own, padded=padded, on_device=on_device):
            return kernels.all_reduce_norm(
                variant, tables[0], 0, tables[1],
                padded[:rows] if variant == "one_shot" else own[rank],
                on_device, rank, rows, eps=EPS, shift=0.0, blocks=blocks, **config,
            )  # fmt: skip

        with monkeypatch.context() as patch:  # code loaded while a kernel spins would wait for it
            for name in ("one_shot_norm", "two_shot_norm"):
                patch.setattr(kernels, name, Loader(getattr(kernels, name)))
            for rank in range(world):
                run(rank)
        torch.cuda.synchronize()
        results = []
        for rank in range(world):
            with torch.cuda.stream(streams[rank]):
                results.append(run(rank))
        torch.cuda.synchronize()
        assert not pads.any()
        for rank, (y, total) in enumerate(results):
            wanted = expected[rank]
            live = rows if variant == "one_shot" else max(0, min(shard, rows - rank * shard))
            found = buffers[rank] if y is None else y
            for a, b in ((found, wanted.y), (total[:live], wanted.residual[:live])):
                error = (a.cpu().double() - b.double()).norm()
                assert error <= BARS[dtype] * b.double().norm()
