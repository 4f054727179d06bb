"""Capture: one call of an `nn.Module` -> a `Program` on flat tensors, and the way back.

`torch.export.export(strict=False)`, before decompositions: `linear`, `softmax`, `silu`,
`scaled_dot_product_attention` are single nodes with module path and source line. Batch, sequence
and cache-length dimensions are free where the model allows it; a dimension of size 1 stays 1.
"""

import logging
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ridgeline.ir import caches, idle_masks
from ridgeline.ir.aliases import writes
from ridgeline.ir.autocast import active, make_explicit
from ridgeline.ir.call import PLAIN, Call, flatten
from ridgeline.ir.capture_errors import NO_GENERATOR, CaptureError, explain, quiet
from ridgeline.ir.gradient_sources import Sources, gradient_sources
from ridgeline.ir.guards import ShapeGuards
from ridgeline.ir.module_state import ModuleState, plain_tensors_kept
from ridgeline.ir.program import Phase, Program

log = logging.getLogger(__name__)

__all__ = ["CaptureError", "Captured", "OverlapError", "capture"]


class OverlapError(CaptureError):
    """A call whose arguments share memory that the model writes."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A program with the way from a call to its inputs and from its outputs to the result.

    guards: which sizes the program takes. finish: (call, flat outputs) -> what the model returns;
    puts new tensors into the caller's caches. written: the inputs, caches aside, that the program
    may write. sources: of inference code, what its results would have gradients from.
    """

    program: Program
    guards: ShapeGuards
    finish: Callable[[Call, Sequence[Any]], Any]
    written: tuple[int, ...] = ()
    sources: Sources = ()

    def refuse_overlap(self, call: Call) -> None:
        """Raise OverlapError where an input that the program writes shares another's memory."""
        for i in self.written:
            memory = call.flat[i].untyped_storage().data_ptr()
            others = (x for j, x in enumerate(call.flat) if j != i and x is not call.flat[i])
            if any(x.untyped_storage().data_ptr() == memory for x in others):
                raise OverlapError(
                    f"argument {i} shares memory with another, and the model writes into it, which"
                    " compiled code may do in another order; pass a copy"
                )


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic: bool = True,
) -> Captured:
    """Capture one call of `model` in its current train/eval mode; parameters are shared.

    dynamic: leave batch, sequence and cache-length dimensions free where the model allows it; what
        stayed fixed is not in the program's `dynamic`. What the caller's torch.autocast casts, the
        program casts by itself. Raises `CaptureError` naming the construct that cannot be captured
        and the way out, and `CacheError` for unsupported caches.
    """
    start = time.perf_counter()
    call = flatten(args, kwargs or {})
    training = call.trains(model)
    traces: list[_Trace] = []
    wrapper = _Flat(model, call, traces.append)
    wrapper.training = model.training  # not train(): submodules keep their own modes
    grad = torch.set_grad_enabled(training)
    with grad, idle_masks.left_out(), plain_tensors_kept(model) as changed:
        exported = _export(wrapper, call, dynamic)
    _refuse_state(changed)
    module = _unlifted(exported, wrapper)
    _refuse_sizes_from_values(module)
    trace = traces[-1]
    for node in module.graph.find_nodes(op="get_attr"):
        if node.target in trace.assigned and node.users:
            raise CaptureError(
                f"the model reads buffer {node.target!r} and assigns it anew, which no graph can"
                f" carry to the next call; write self.{node.target}.copy_(...)"
            )
    program = Program.from_graph(
        module,
        call.flat,
        phase=_phase(call, trace, training),
        training=training,
        results=trace.results,
    )
    program.spent["capture"] = time.perf_counter() - start
    log.info("captured %s: free dimensions %s", program.phase, program.dynamic)
    own = {i for i, x in enumerate(call.flat) if any(x is leaf for leaf in call.leaves)}
    placeholders = enumerate(module.graph.find_nodes(op="placeholder"))
    written = tuple(i for i, node in placeholders if i in own and writes(node))
    sources = () if training else gradient_sources(program)
    return Captured(program, ShapeGuards.of(module), trace.finish, written, sources)


class _Flat(nn.Module):
    """The model as a function of flat tensors to flat tensors.

    record: receives each run's trace (export undoes what a module does to its own attributes).
    """

    def __init__(self, model: nn.Module, call: Call, record: Callable[["_Trace"], None]) -> None:
        super().__init__()
        self.model = model
        self.call = call
        self.record = record

    def forward(self, *flat: Tensor) -> tuple[Any, ...]:
        args, kwargs, made = self.call.rebuild(flat)
        for cache in made:
            caches.tie_lengths(cache)
        before = list(map(caches.snapshot, made))
        buffers = dict(self.model.named_buffers())
        leaves = tree_flatten((args, kwargs), is_leaf=caches.is_cache)
        state = ModuleState(self.model)
        try:
            result = self.model(*args, **kwargs)
        finally:
            changed = state.restore()
        _refuse_state(changed)
        if not _same(leaves, tree_flatten((args, kwargs), is_leaf=caches.is_cache)):
            raise CaptureError(
                "the model puts something into a container among its arguments, which no graph can"
                " do; return it instead"
            )
        trace = _Trace.of(result, before, made)
        trace.assigned = {n for n, b in self.model.named_buffers() if buffers.get(n) is not b}
        self.record(trace)
        return trace.outputs


def _refuse_state(changed: Sequence[str]) -> None:
    if changed:
        raise CaptureError(
            f"forward changes {', '.join(changed[:3])}, plain attributes of the model, which no"
            " graph can carry to the next call; keep such state in buffers, changed in place, as"
            " self.count.add_(1)"
        )


def _same(before: tuple[list[Any], TreeSpec], after: tuple[list[Any], TreeSpec]) -> bool:
    """The same objects in the same structure?"""
    return before[1] == after[1] and all(map(operator.is_, before[0], after[0]))


@dataclass(slots=True)
class _Trace:
    """How the outputs of one traced call make up its result.

    values: the traced outputs, in flat order. leaves: for each leaf of the result its position
    among them, or the plain value, or which cache. assigned: the buffers that were replaced.
    """

    spec: TreeSpec
    leaves: list[tuple[str, Any]]
    changes: list[list[caches.Place]]
    templates: list[Any]
    outputs: tuple[Any, ...]
    assigned: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, result: Any, before: Sequence[Any], after: Sequence[Any]) -> "_Trace":
        found, spec = tree_flatten(result, is_leaf=caches.is_cache)
        outputs: list[Any] = []
        leaves: list[tuple[str, Any]] = []
        known = list(after)
        for leaf in found:
            if isinstance(leaf, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
                leaves.append(("output", len(outputs)))
                outputs.append(leaf)
            elif caches.is_cache(leaf):
                if not any(leaf is c for c in known):
                    known.append(leaf)
                leaves.append(("cache", next(i for i, c in enumerate(known) if c is leaf)))
            elif isinstance(leaf, PLAIN):
                leaves.append(("plain", leaf))
            else:
                raise CaptureError(
                    f"the model returns a {type(leaf).__name__}, whose tensors torch.export cannot"
                    " see; return tensors, numbers, strings, caches, and containers of them, or"
                    " register the class with torch.utils._pytree.register_pytree_node"
                )
        changes = []
        for i, cache in enumerate(known):
            replaced = caches.replaced(before[i] if i < len(before) else None, cache)
            changes.append([place for place, _ in replaced])
            outputs += [tensor for _, tensor in replaced]
        return cls(spec, leaves, changes, known, tuple(outputs))

    @property
    def results(self) -> int:
        """How many flat outputs, the first, are leaves of the result; the others go into caches."""
        return sum(kind == "output" for kind, _ in self.leaves)

    def finish(self, call: Call, outputs: Sequence[Any]) -> Any:
        """Flat outputs -> the model's result; the call's caches receive their new tensors."""
        position = self.results
        given, final = call.caches, []
        for i, changes in enumerate(self.changes):
            values = outputs[position : position + len(changes)]
            position += len(changes)
            if i < len(given):
                caches.install(given[i], self.templates[i], changes, values)
                final.append(given[i])
            else:
                final.append(caches.rebuilt(self.templates[i], changes, values))
        pick = {
            "output": lambda at: outputs[at],
            "cache": lambda at: final[at],
            "plain": lambda value: value,
        }
        return tree_unflatten([pick[kind](what) for kind, what in self.leaves], self.spec)


def _export(wrapper: _Flat, call: Call, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = {"flat": tuple(_free(call))} if dynamic and call.flat else None
    try:
        with quiet():
            return torch.export.export(
                wrapper, tuple(call.flat), dynamic_shapes=shapes, strict=False
            )
    except (caches.CacheError, CaptureError):
        raise
    except Exception as error:  # whatever the model's code meets under tracing
        if shapes is not None:
            log.info("capture with free dimensions failed, trying fixed ones: %s", error)
            return _export(wrapper, call, dynamic=False)
        raise explain(error, wrapper.model) from error


def _free(call: Call) -> list[dict[int, Any] | None]:
    """Which dimensions may vary: batch and length, never features.

    Index and mask tensors: all. Floating tensors: the batch, and the length of [B,S,H]. Caches that
    grow: batch and length; static caches: none.
    """
    shapes: list[dict[int, Any] | None] = []
    for leaf in call.leaves:
        if isinstance(leaf, Tensor):
            free = range(leaf.dim())
            if leaf.is_floating_point():
                free = range(min(leaf.dim(), 2 if leaf.dim() == 3 else 1))
            shapes.append(_auto(leaf, free))
        elif caches.is_cache(leaf):
            for layer in caches.layers(leaf):
                grows = not hasattr(layer, "max_cache_len")
                for value in vars(layer).values():
                    if isinstance(value, Tensor):
                        shapes.append(_auto(value, (0, 2) if grows and value.dim() == 4 else ()))
            shapes += [{0: Dim.AUTO}] * caches.counts(leaf)
    return shapes


def _auto(x: Tensor, dims: Sequence[int]) -> dict[int, Any]:
    return {d: Dim.AUTO for d in dims if x.shape[d] > 1}


def _unlifted(exported: torch.export.ExportedProgram, wrapper: _Flat) -> fx.GraphModule:
    """The exported graph with its weights as attributes named as in the model's state dict."""
    root = nn.Module()
    graph = exported.graph_module.graph
    make_explicit(exported.graph_module, active())
    if regions := list(graph.find_nodes(op="get_attr")):  # graphs of their own inside the graph
        raise CaptureError(
            f"the model runs code under {next(iter(regions[0].users)).target}; set grad mode"
            " outside of the model, and write torch.cond as torch.where"
        )
    placeholders = graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if spec.target is None:
            continue
        tensor = exported.constants.get(spec.target)
        if spec.target in exported.state_dict or tensor is None:
            tensor = operator.attrgetter(spec.target)(wrapper)
        if not isinstance(tensor, Tensor):
            raise CaptureError(
                f"the model uses a {type(tensor).__name__}, which no graph can carry;"
                f" {NO_GENERATOR}"
            )
        name = spec.target.removeprefix("model.")
        _assign(root, name, tensor)
        with graph.inserting_before(node):
            attribute = graph.create_node("get_attr", name)
        attribute.meta = dict(node.meta)
        attribute.meta["lifted"] = spec.kind is InputKind.CONSTANT_TENSOR
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    root.train(wrapper.training)
    module = fx.GraphModule(root, graph)
    for node in graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {
                key: (path.removeprefix("model").removeprefix("."), cls)
                for key, (path, cls) in stack.items()
                if path
            }
    return module


def _refuse_sizes_from_values(module: fx.GraphModule) -> None:
    """No cost, certificate or guard can be stated for a size that only the run will tell."""
    for node in module.graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            raise CaptureError(
                f"the size of {node.name} ({node.target}) depends on the values of a tensor; keep"
                " sizes fixed, as with torch.where or a mask in place of selecting rows"
            )


def _assign(root: nn.Module, path: str, tensor: Tensor) -> None:
    *parents, last = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(last, tensor)
    else:
        root.register_buffer(last, tensor, persistent=False)


def _phase(call: Call, trace: _Trace, training: bool) -> Phase:
    if training:
        return "training"
    if not trace.templates:
        return "forward"
    ids = next((x for x in call.flat if not x.is_floating_point() and x.dim() == 2), None)
    one_token = ids is None or ids.shape[1] == 1
    filled = any(caches.is_filled(c) for c in call.caches)
    return "decode" if one_token and filled else "prefill"
