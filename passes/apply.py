"""Rewriting: a copy of the graph with the chosen candidates in place; the original stays whole."""

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import fx

from ridgeline.ir.layout import keep_layout
from ridgeline.passes.base import Candidate


def apply(module: fx.GraphModule, chosen: Sequence[Candidate]) -> fx.GraphModule:
    """A copy of `module` (weights shared) in which each chosen candidate is rewritten."""
    rewritten, copied = copy_graph(module)
    for candidate in chosen:
        replace(candidate, copied, rewritten)
    rewritten.graph.eliminate_dead_code()
    rewritten.graph.lint()
    rewritten.recompile()
    return rewritten


def replace(
    candidate: Candidate, copied: MutableMapping[fx.Node, Any], module: fx.GraphModule
) -> None:
    """Rewrite one site, take its old nodes out, and let `copied` lead from its results to those
    that stand for them now: a later site may read them.

    Dead code elimination alone keeps some of them: attention may draw random numbers, a collective
    may have effects, so torch takes both for impure and would run them beside their replacement.
    """
    outs = candidate.site.outs
    with module.graph.inserting_before(module.graph.output_node()):
        reader = module.graph.call_function(tuple, tuple(copied[out] for out in outs))
    candidate.rewrite.apply(candidate, copied, module)
    results = reader.args
    module.graph.erase_node(reader)
    for node in reversed(candidate.site.nodes):
        if not copied[node].users:
            module.graph.erase_node(copied[node])
    for out, result in zip(outs, results, strict=True):
        copied[out] = keep_layout(result, out)


def copy_graph(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A graph module of its own graph and the same weights, and old node -> new node."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        copied[node].meta = dict(node.meta)
    new = fx.GraphModule(module, graph)
    new.meta = dict(module.meta)
    return new, copied
