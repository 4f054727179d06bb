"""A captured model: a graph of pre-dispatch ATen nodes on flat inputs, weights as attributes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.stopwatch import Stopwatch
from ridgeline.ir.symbolic import shape_of

Phase = Literal["prefill", "decode", "forward", "training"]
WEIGHT = "weight"
"""Metadata of a placeholder that takes a parameter of the model."""
SHARDED = "sharded_dimension"
"""Metadata of a placeholder that takes this rank's part of a value: the dimension along which it is
split, or None where it is a part in another way, as of a sum."""


class ProgramError(RidgelineError):
    """A graph that breaks what every pass relies on."""


@dataclass(frozen=True, slots=True)
class Program:
    """One captured signature of a model.

    module: takes the flat tensor inputs and returns a flat tuple; weights are `get_attr` nodes with
        the names of the model's state dict; every node carries a fake value in ``meta["val"]``.
    inputs: the example inputs, one per placeholder; a program may update them in place (caches).
    dynamic: placeholder name -> its dimensions that are free; all others are as captured.
    phase: "prefill" and "decode" of a generating model, "forward", or "training".
    training: gradients must flow.
    results: how many of the outputs, the first, are what the model returns; the others are new
        tensors of its caches. None: all.
    spent: seconds that capturing and compiling it have taken so far, by stage.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    phase: Phase
    training: bool
    dynamic: dict[str, tuple[int, ...]] = field(default_factory=dict)
    results: int | None = None
    spent: Stopwatch = field(default_factory=Stopwatch)

    @classmethod
    def from_graph(
        cls,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        phase: Phase,
        training: bool,
        results: int | None = None,
    ) -> "Program":
        """Wrap a graph; its free dimensions are read off the placeholders. Verifies it."""
        placeholders = module.graph.find_nodes(op="placeholder")
        dynamic = {
            node.name: free
            for node in placeholders
            if isinstance(node.meta.get("val"), torch.Tensor)
            and (free := tuple(d for d, s in enumerate(shape_of(node)) if not s.is_Integer))
        }
        program = cls(module, tuple(inputs), phase, training, dynamic, results)
        verify(program)
        return program


def verify(program: Program) -> None:
    """Check the graph's structure; raises ProgramError naming the node."""
    graph = program.module.graph
    graph.lint()
    placeholders = graph.find_nodes(op="placeholder")
    if len(placeholders) != len(program.inputs):
        raise ProgramError(
            f"{len(placeholders)} placeholders for {len(program.inputs)} example inputs"
        )
    for node in graph.nodes:
        valued = node.op in ("placeholder", "get_attr") or (
            node.op == "call_function" and node.users
        )
        if valued and "val" not in node.meta:
            raise ProgramError(f"node {node.name} ({node.target}) carries no fake value")
