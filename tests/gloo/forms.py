"""One model whose row-parallel sums are written in every way that is in use."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import ridgeline
from gloo.work import PLAIN, Sent, error
from ridgeline.passes.parallel.agree import Ranks
from ridgeline.passes.parallel.rewrite import Account, rewrite_collectives

BLOCKS, WIDTH = 2, 32


class Norm(nn.Module):
    """RMSNorm, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    """x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.gate, self.up = (nn.Linear(WIDTH, 48, bias=False) for _ in range(2))
        self.down = nn.Linear(48, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(BLOCKS)]
    return nn.Sequential(*blocks, Norm(), nn.Linear(WIDTH, 11)).eval()


class Row(nn.Module):
    """This rank's input channels of a linear layer, summed over the ranks as `form` says."""

    def __init__(self, linear: nn.Linear, form: str) -> None:
        super().__init__()
        self.weight, self.form = part(linear.weight, 1), form

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.form == "functional":
            return funcol.all_reduce(y, "sum", dist.group.WORLD)
        if self.form == "in place":
            dist.all_reduce(y)
            return y
        functional = torch.ops._c10d_functional
        name = dist.group.WORLD.group_name
        return functional.wait_tensor(functional.all_reduce(y, "sum", name))


def part(weight: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(weight.detach().chunk(dist.get_world_size(), dim)[dist.get_rank()].clone())


def by_hand(form: str) -> nn.Sequential:
    """The rank's network, its collectives written in its layers."""
    model = network()
    for block in model[:BLOCKS]:
        for linear in (block.gate, block.up):
            linear.weight = part(linear.weight, 0)
        block.down = Row(block.down, form)
    return model


def by_dtensor(sequence: bool) -> nn.Sequential:
    """The network under `parallelize_module`; sequence: residuals are shards of the tokens."""
    model, mesh = network(), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model[:BLOCKS]:
        plan: dict[str, Any] = {n: ColwiseParallel() for n in ("gate", "up")}
        plan["down"] = RowwiseParallel()
        if sequence:
            plan = {n: ColwiseParallel(input_layouts=Shard(1)) for n in ("gate", "up")}
            plan["norm"] = SequenceParallel()
            plan["down"] = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
        parallelize_module(block, mesh, plan)
    if sequence:
        ends = {
            str(BLOCKS): SequenceParallel(),
            str(BLOCKS + 1): ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        parallelize_module(model, mesh, ends)
    return model


def rewritten(form: str, level: str) -> dict[str, Any]:
    """What is rewritten in the network of that form, seen at "export" or "aot" level."""
    warnings.simplefilter("ignore")
    x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    sequence = form == "sequence"
    model = by_dtensor(sequence) if form in ("dtensor", "sequence") else by_hand(form)
    with torch.no_grad():
        expected = network()(x)
        if level == "export":
            fast = ridgeline.parallelize(model, split=False, **PLAIN)
            fast.capture(x)
            with Sent() as sent:
                got = fast(x)
            applied, notes = fast.plan.applied, fast.plan.notes
        else:
            sent, accounts = Sent(), []
            run = torch.compile(model, backend=backend(accounts, sent), fullgraph=True)
            got = run(entered(x) if sequence else x)
            applied, notes = accounts[0].applied, accounts[0].notes
    whole = got.full_tensor() if isinstance(got, DTensor) else got
    return {
        "error": error(whole, expected),
        "applied": len(applied),
        "sent": dict(sent.count),
        "notes": notes,
    }


def backend(accounts: list[Account], sent: Sent) -> Any:
    """A backend of torch.compile that rewrites AOTAutograd's graph, and counts what it sends."""

    def compiled(module: Any, example: Any) -> Any:
        accounts.append(rewrite_collectives(module, Ranks.of(None)))

        def run(*args: Any) -> Any:
            with sent:
                return module.forward(*args)

        return make_boxed_func(run)

    return lambda module, example: aot_module_simplified(module, example, fw_compiler=compiled)


def entered(x: Tensor) -> DTensor:
    """This rank's tokens of x [B, T, WIDTH]."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return DTensor.from_local(x, mesh, [Replicate()]).redistribute(mesh, [Shard(1)])


def all_forms() -> dict[str, Any]:
    """Every form at every level that can see it, and in one process of ranks, for speed."""
    told: dict[str, Any] = {}
    for form in ("functional", "in place", "raw"):
        for level in ("export", "aot"):
            told[f"{form} {level}"] = rewritten(form, level)
    told["dtensor aot"] = rewritten("dtensor", "aot")
    told["sequence aot"] = rewritten("sequence", "aot")
    return told
