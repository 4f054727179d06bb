"""`parallelize`: this rank's part of a model as a drop-in module, on a group of ranks that agree.

The weights are split as `plan_parallel` says; the graphs of the rank's model are captured at the
first call of each kind, rewritten (`allreduce_rms_norm` and the passes of `optimize`), compared
over the ranks and compiled.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

from torch import nn

from ridgeline.cost_model import InvalidStack, Stack, Target, load_target, stack_of
from ridgeline.passes.all import PASSES
from ridgeline.passes.base import Pass
from ridgeline.passes.drop_in import OptimizedModule, optimized_copy
from ridgeline.passes.parallel.agree import Ranks
from ridgeline.passes.parallel.compiler import ParallelCompiler, usual
from ridgeline.passes.parallel.held import Held
from ridgeline.passes.parallel.plan import ParallelPlan, plan_parallel
from ridgeline.passes.parallel.rewrite import When
from ridgeline.passes.parallel.shard import shard, split_parameters
from ridgeline.passes.parallel.signature import libraries, model_signature, settings_of, versions
from ridgeline.passes.parallel.usable import check_arguments, refuse_to_save, refuse_whole


def parallelize(
    model: nn.Module,
    mesh: Any = None,
    *,
    target: str | Target = "native",
    split: bool = True,
    whole: Sequence[str] = (),
    fuse: When | None = None,
    weave: When | None = None,
    passes: Sequence[Pass] = PASSES,
    lowering: Literal["inductor", "eager"] = "inductor",
    timeout: timedelta | None = None,
    max_graphs: int = 16,
) -> OptimizedModule:
    """Return this rank's part of `model`, rewritten for `target`; call it on every rank alike.

    model: a causal language model whose weights are equal on all ranks; it is not changed, and
        what is not split is shared with it. In eval mode: the result is for inference.
    mesh: a `DeviceMesh` of one dimension, a process group, or None for all ranks.
    split: False where the model is this rank's already, and its forward has the collectives
        (functional ones, `dist.all_reduce` in place, `torch.ops._c10d_functional`).
    whole: modules that every rank holds whole, as `plan_parallel` takes them.
    fuse: whether norms move to a shard of the tokens: where that is quicker on the example inputs,
        both forms compiled and run ("measured"), where the cost model expects it of the target, a
        GPU ("predicted"), wherever they can ("always"), or not ("never"). None: "predicted" for a
        GPU that is not here, else "measured".
    weave: whether two parts of the tokens run in turn (`token_weave`), as for fuse; of a prefill
        of a GPU's `ridgeline.cost_model.choose_schedule` predicts it.
    passes, target, lowering, max_graphs: as `ridgeline.optimize` takes them.
    timeout: how long to wait for other ranks to agree; the group's own unless given.

    Every rank gives the same inputs and gets the same, whole outputs; caches hold this rank's
    heads. The result's `plan` says what was split and rewritten, and how many bytes each rank
    holds. On one rank nothing is split, and the model is compiled. To save the model, save the one
    that was given: `save_pretrained` of a part is a DropInError.

    Raises:
        OptimizeError: for unusable arguments.
        Unparallel: no layer of the model can be split over that many ranks, or `whole` names none.
        RankMismatch: on all ranks, where they differ in code, model, options or graph.
        RankLost: another rank failed, ended, or did not answer in time; also when it is called.
        LayoutError: the model reads a value that this rank does not hold.
        InferenceOnly: on all ranks, when it is called in train mode, or on inputs that require
            gradients, and gradients are recorded.
        LeftAsItIs: on all ranks, where it sends in a form that cannot be rewritten, when called.
        RidgelineError: torch.distributed is not initialised, or the mesh cannot be used.
    """
    ranks = Ranks.of(mesh, timeout if isinstance(timeout, timedelta) else None)
    with ranks.together():
        check_arguments(model, timeout, passes, max_graphs)
        if not split:
            refuse_whole(whole)
        machine = load_target(target)
        fuse, weave = fuse or usual(machine), weave or usual(machine)
        plan = plan_parallel(model, ranks.world, whole) if split else None
        compiler = ParallelCompiler(
            machine,
            ranks=ranks,
            splits=split_parameters(plan, model) if plan else {},
            fuse=fuse,
            weave=weave,
            stack=_stack(model),
            equal=plan.equal if plan else None,
            passes=[p for p in passes if p.exactness != "approximate"],
            lowering=lowering,
        )
        facts = {"target": compiler.target.name, "fuse": fuse, "weave": weave, **versions()}
        facts |= {"lowering": lowering, "max_graphs": str(max_graphs)}
        facts["passes"] = ", ".join(p.name for p in compiler.passes) or "none"
        facts |= libraries(model)
        facts["model"] = model_signature(model) if plan else type(model).__name__
        facts["plan"] = plan.digest() if plan else "the model's own"
        number = ranks.turn
        ranks.agree("the model", facts | settings_of(model))
        compiler.meeting.model = f"number {number}, {facts['model']}, plan {facts['plan']}"
        part = model
        if plan and plan.splits:
            part = shard(model, plan, ranks.rank, ranks.name)
            if hasattr(model, "save_pretrained"):
                part.__dict__["save_pretrained"] = refuse_to_save
        for sentence in told(plan, ranks.rank) if plan else ():
            compiler.plan.note(sentence)
        made = optimized_copy(part, compiler, strict=True, max_graphs=max_graphs)
        compiler.meeting.weights = Held(made, compiler.splits) if plan else None
        return made


def _stack(model: nn.Module) -> Stack | None:
    """The model's shape, where it has a config that says it."""
    try:
        return stack_of(getattr(model, "config", None))
    except InvalidStack:
        return None


def told(plan: ParallelPlan, rank: int) -> list[str]:
    """The plan in sentences: what is split, what is not and why, and this rank's bytes."""
    head, *rest = str(plan).splitlines()
    held = [line.strip() for line in rest if line.strip().startswith("held by all")]
    return [head, *held, *(line.strip() for line in rest if f"rank {rank}:" in line)]
