"""One model whose row-parallel sums are written in every way that is in use."""

import contextlib
import io
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
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
from ridgeline.passes.plan import Plan
from ridgeline.tools.plugin import backend

BLOCKS, WIDTH, VOCABULARY = 2, 32, 53
FORMS = ("functional", "in place", "raw", "raw in place")
WAYS = ("parallelize", "optimize", "plugin")
OPTIMIZE = {k: v for k, v in PLAIN.items() if k != "weave"}


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
        if self.form == "raw in place":
            return functional.wait_tensor(functional.all_reduce_(y, "sum", name))
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
    """What is rewritten in the network of that form, by `parallelize`, `optimize` or the plugin."""
    warnings.simplefilter("ignore")
    x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    sequence = form == "sequence"
    model = by_dtensor(sequence) if form in ("dtensor", "sequence") else by_hand(form)
    with torch.no_grad():
        expected = network()(x)
        sent = Sent()
        if level == "plugin":
            got, plan = plugged(model, entered(x) if sequence else x, sent)
        else:
            make = ridgeline.parallelize if level == "parallelize" else ridgeline.optimize
            options = PLAIN | {"split": False} if level == "parallelize" else OPTIMIZE
            fast = make(model, **options)
            fast.capture(x)
            with sent:
                got = fast(x)
            plan = fast.plan
    return told(got, expected, sent, plan)


def told(got: Tensor, expected: Tensor, sent: Sent, plan: Plan) -> dict[str, Any]:
    return {
        "error": error(whole(got), expected),
        "applied": [d.rewrite for d in plan.applied],
        "refused": [d.reason for d in plan.refused],
        "sent": dict(sent.count),
        "notes": plan.notes,
    }


def plugged(model: nn.Module, x: Tensor, sent: Sent, **options: Any) -> tuple[Any, Plan]:
    """A call through `torch.compile(backend="ridgeline")`; `sent` counts what the graph sends."""
    plans: list[Plan] = []
    options = {"target": "a100", "fuse": "always", "on_plan": plans.append} | options

    def counting(module: Any, example: Any) -> Any:
        run = backend(module, example, options=options)

        def counted(*args: Any) -> Any:
            with sent:
                return run(*args)

        return counted

    torch._dynamo.reset()
    got = torch.compile(model, backend=counting, fullgraph=True)(x)
    return got, plans[-1]


def entered(x: Tensor) -> DTensor:
    """This rank's tokens of x [B, T, WIDTH]."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return DTensor.from_local(x, mesh, [Replicate()]).redistribute(mesh, [Shard(1)])


def all_forms() -> dict[str, Any]:
    """Every form by every way that can see it, in one process of ranks, for speed."""
    ways = [(f, w) for f in FORMS for w in WAYS]
    ways += [("dtensor", "plugin"), ("sequence", "plugin")]
    told = {f"{form} {way}": rewritten(form, way) for form, way in ways}
    with torch.no_grad():
        x = torch.randn(2, 6, WIDTH, generator=seeded())
        lossy = plugged(by_hand("raw"), x, Sent(), tolerance=0.02, fuse="measured")[1]
    return told | {"lossy": lossy.notes}


class Biased(nn.Module):
    """An embedding, attention, an MLP with biases, norms of torch, a head, and as many ids as no
    number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.q, self.k, self.v, self.o, self.up = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.down, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.norms[0](x)
        q, k, v = (f(y).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1)
        x = x + self.o((scores @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x))


def biased(split: bool = True) -> Biased:
    torch.manual_seed(0)
    model = Biased().eval()
    if split:
        columns = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
        ends = {
            "embed": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        rows = {name: RowwiseParallel() for name in ("o", "down")}
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(model, mesh, columns | ends | rows)
    return model


def dtensors() -> dict[str, Any]:
    """`Biased` through the plugin, with its passes; what `optimize` says of it."""
    warnings.simplefilter("ignore")
    ids = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    model, sent = biased(), Sent()
    with torch.no_grad():
        expected, eager = biased(split=False)(ids), model(ids)
        got, plan = plugged(model, ids, sent)
        fast = ridgeline.optimize(model, target="a100")
        fallback = error(fast(ids), expected)
    return told(got, expected, sent, plan) | {
        "eager": error(got, eager),
        "fallback": fallback,
        "why": list(fast.fallbacks.values()),
    }


def trained() -> dict[str, Any]:
    """Gradients of two products, split by DTensor or by hand, through the plugin against eager
    ones, and of `optimize` where it can capture them."""
    warnings.simplefilter("ignore")
    plans: list[Plan] = []
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))
    options = {"target": "a100", "on_plan": plans.append}
    answers: dict[str, Any] = {}
    for form in ("dtensor", "functional"):
        torch.manual_seed(0)
        pair = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)))
        if form == "dtensor":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            parallelize_module(pair, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
        else:
            pair[0].weight, pair[1] = part(pair[0].weight, 0), Row(pair[1], form)
        torch._dynamo.reset()
        runs = {"eager": pair, "plugin": torch.compile(pair, backend=backend, options=options)}
        if form == "functional":
            runs["optimize"] = ridgeline.optimize(pair, target="a100", lowering="eager")
        gradients = {way: gradients_of(run, pair, x) for way, run in runs.items()}
        eager = gradients.pop("eager")
        for way, found in gradients.items():
            answers[f"{form} {way}"] = [error(a, b) for a, b in zip(found, eager, strict=True)]
    answers["said"] = [printed(plan) for plan in (*plans, runs["optimize"].plan)]
    return answers


def printed(plan: Plan) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        plan.print()
    return " ".join(text.getvalue().split())


def gradients_of(run: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    given = x.clone().requires_grad_()
    run(given).square().sum().backward()
    return [whole(t.grad) for t in (given, *model.parameters())]


def whole(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def plugged_apart(odd: int) -> list[str]:
    """What is said where rank `odd` compiles for another target; then where it has another norm
    weight than the others."""
    model, x = by_dtensor(False), torch.randn(2, 6, WIDTH)
    said = []
    for odd_one, options in ((False, {"target": "h100"}), (True, {})):
        mine = dist.get_rank() == odd
        if mine and odd_one:
            model[BLOCKS].weight.data[0] += 1
        with torch.no_grad():
            try:
                _, plan = plugged(model, x, Sent(), **(options if mine else {}))
                said += [d.reason for d in plan.refused]
            except Exception as error:  # Dynamo wraps it
                said.append(str(error))
    return said


class Sums(nn.Module):
    """A product, summed over the ranks and normalised as `way` does it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = Norm(), nn.Linear(WIDTH, WIDTH, bias=False)
        self.way = way
        self.own = nn.Parameter(torch.ones(WIDTH) + dist.get_rank())
        self.eps = 0.5 * dist.get_rank() if way == "epsilon" else 0.0

    def forward(self, x: Tensor) -> Any:
        group, y = dist.group.WORLD, self.linear(x)
        if self.way == "view in place":
            rows = y.view(-1, WIDTH)
            dist.all_reduce(rows)
            return self.norm(y + x)
        if self.way == "view of an input in place":
            dist.all_reduce(x.view(-1, WIDTH))
            return self.norm(x)
        if self.way == "two at once":
            first, second = funcol.all_reduce_coalesced([y, 2 * y], "sum", group)
            return self.norm(first + second + x)
        z = x + funcol.all_reduce(y, "sum", group)
        if self.way == "own weight":
            return funcol.all_reduce(self.norm(z) * self.own, "sum", group)
        return self.norm(z + self.eps) if self.way == "epsilon" else self.norm(z)


def left_as_they_came() -> dict[str, Any]:
    """Each way, and inputs of each rank's own, through the plugin and `optimize` against eager."""
    warnings.simplefilter("ignore")
    told: dict[str, Any] = {}
    ways = ("view in place", "view of an input in place", "two at once", "own weight", "epsilon")
    cases = [(way, 0, "always") for way in ways]
    cases += [("own inputs", 1, "always"), ("own inputs", 0, None)]
    with torch.no_grad():
        for way, apart, fuse in cases:
            for level in ("plugin", "optimize"):
                model, given = Sums(way).eval(), torch.randn(2, 6, WIDTH, generator=seeded())
                given = given + apart * dist.get_rank()
                x, again = given.clone(), given.clone() + dist.get_rank()
                plans: list[Plan] = []
                options = {"target": "a100", "fuse": fuse}
                torch._dynamo.reset()
                if level == "plugin":
                    options["on_plan"] = plans.append
                    fast: Any = torch.compile(model, backend="ridgeline", options=options)
                else:
                    fast = ridgeline.optimize(model, passes=(), lowering="eager", **options)
                    plans.append(fast.plan)
                calls = [x] if fuse else [x, again]
                errors = []
                for call in calls:
                    eager = call.clone()
                    pairs = [(fast(call), model(eager)), (call, eager)]
                    errors += [
                        error(a, b) for p in pairs for a, b in zip(*map(listed, p), strict=True)
                    ]
                told[f"{way}, {fuse}, {level}"] = {
                    "error": max(errors),
                    "applied": [d.rewrite for d in plans[0].applied],
                    "refused": " ".join(d.reason for d in plans[0].refused),
                    "notes": " ".join(plans[0].notes),
                }
    return told


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def listed(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
