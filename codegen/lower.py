"""From a rewritten graph to something that runs: kernels in place, the rest compiled.

On the machine that is here, each `ridgeline::` node becomes its kernel's op and Inductor compiles
what lies between. For a machine that is not here, its kernels are compiled and listed all the same
and the graph runs on the CPU by the ops' references, which the notes say.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ridgeline.codegen.inductor import compile_graph, run_eager
from ridgeline.codegen.kernel import Kernel, KernelReport, constant
from ridgeline.cost_model import Target
from ridgeline.ir.errors import RidgelineError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lowered:
    """run: a function of the flat inputs; kernels, notes: for the plan."""

    run: Callable[..., Any]
    kernels: tuple[KernelReport, ...]
    notes: tuple[str, ...]


def lower(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    target: Target,
    lowering: Literal["inductor", "eager"],
    training: bool,
) -> Lowered:
    """Lower `module` for `target`; it must own its graph (the kernels are put in place in it).

    inputs: the program's example inputs. lowering: "inductor" or "eager", for what is not ours.
    training: gradients must flow, through the gradients that the ops have; with "eager", and for
        a target that is not here, what comes back is the module itself.
    """
    nodes, reports, notes = compiled(module, target, training)
    elsewhere = _elsewhere(target, module, inputs)
    if elsewhere:
        note = f"{elsewhere}: the model runs where it is, by the ops' references"
        if nodes:
            note += (
                f", and the kernels listed are compiled for {target.arch or target.name}, not run"
            )
        notes.append(note)
        return Lowered(module if training else run_eager(module), reports, tuple(notes))
    for node, kernel in nodes:
        kernel.place(node, module)
    module.graph.eliminate_dead_code()
    module.recompile()
    run, refusal = _rest(module, inputs, lowering, training)
    return Lowered(run, reports, (*notes, *refusal))


def _ours(node: fx.Node) -> bool:
    overload = isinstance(node.target, torch._ops.OpOverload)
    return overload and node.target.namespace == "ridgeline"


def _kernels(target: Target) -> tuple[tuple[Kernel, ...], str]:
    """The kernels for this kind of target, or none and a sentence that says which package lacks."""
    package = "tvm" if target.kind == "cpu" else "triton"
    try:
        if target.kind == "cpu":
            from ridgeline.codegen.tvm.kernels import KERNELS
            from ridgeline.codegen.tvm.runtime import import_tvm

            import_tvm()
        else:
            from ridgeline.codegen.triton import require_triton

            require_triton()
            from ridgeline.codegen.triton.kernels import KERNELS
    except (ImportError, RidgelineError) as error:
        return (), f"without {package} no kernels: ops run by their references ({error})"
    return tuple(k for k in KERNELS if target.kind in k.kinds), ""


def compiled(
    module: fx.GraphModule, target: Target, training: bool = False
) -> tuple[list[tuple[fx.Node, Kernel]], tuple[KernelReport, ...], list[str]]:
    """Compile the kernels that a rewritten graph calls for; the device need not be here.

    training: those that have a backward; the notes name the ops that run by their references.
    Returns the nodes that have a kernel, a report per distinct kernel, and notes: why other nodes
    run by their references.
    """
    kernels, missing = _kernels(target)
    chosen = (k.training for k in kernels) if training else kernels
    by_op = {k.op: k for k in chosen if k is not None}
    nodes: list[tuple[fx.Node, Kernel]] = []
    reports: dict[str, KernelReport] = {}
    notes = [missing] if missing else []
    plain: dict[str, None] = {}
    for node in module.graph.nodes:
        if not _ours(node):
            continue
        kernel = by_op.get(node.target._schema.name)
        if kernel is None:
            plain[node.target._schema.name] = None
            continue
        try:
            report = kernel.compile(node, target)
        except RidgelineError as error:
            notes.append(f"{kernel.op} at {node.name} runs by its reference: {error}")
            continue
        nodes.append((node, kernel))
        for own in (report, *report.also):
            reports.setdefault(f"{own.op} {own.configuration}", own)
    if training and plain:
        notes.append(f"training: {', '.join(plain)} have no kernels of their own for the backward")
    return nodes, tuple(reports.values()), notes


def _elsewhere(target: Target, module: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """Why code for `target` cannot run on this program's tensors; empty where it can."""
    weights = [constant(n) for n in module.graph.find_nodes(op="get_attr")]
    kinds = {t.device.type for t in (*inputs, *weights) if isinstance(t, torch.Tensor)}
    if target.kind == "cpu":
        away = kinds - {"cpu"}
        return f"the model is on {', '.join(sorted(away))} and the target a CPU" if away else ""
    if not _device_present(target):
        return f"{target.name} is not in this machine"
    if kinds - {"cuda"}:
        return f"{target.name} is in this machine and the model is not on it (model.to('cuda'))"
    return ""


def _device_present(target: Target) -> bool:
    """Is a GPU here that runs code for the target's architecture?"""
    if not torch.cuda.is_available():
        return False
    if target.kind == "hip":
        return torch.version.hip is not None and target.arch in torch.cuda.get_arch_list()
    major, minor = torch.cuda.get_device_capability()
    return torch.version.cuda is not None and target.arch == f"sm_{major}{minor}"


def _rest(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    lowering: Literal["inductor", "eager"],
    training: bool,
) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """What is not ours, compiled, and a note where that could not be done."""
    if lowering == "eager":
        return module if training else run_eager(module), ()
    # Inductor's backward graphs cannot read free sizes off sums such as S + 1, a Llama's loss: a
    # training step is compiled for the sizes of its inputs, and others compile anew.
    dynamic = not training and _is_symbolic(module)
    try:
        return compile_graph(module, inputs, dynamic=dynamic, training=training), ()
    except Exception as error:  # whatever Inductor meets; the model must come back working
        log.warning("Inductor did not compile the graph, which runs op by op: %s", error)
        reason = str(error).strip().partition("\n")[0]
        note = f"Inductor did not compile the rest of the graph: {reason}"
        return module if training else run_eager(module), (note,)


def _is_symbolic(module: fx.GraphModule) -> bool:
    """Does the graph take free sizes?"""
    values = [n.meta.get("val") for n in module.graph.find_nodes(op="placeholder")]
    sizes = [s for v in values for s in (v.shape if isinstance(v, torch.Tensor) else (v,))]
    return any(isinstance(s, torch.SymInt) for s in sizes)
