"""Free sizes as numbers: at their captured values, or at those that a question asks for.

A size of a captured program is an integer or an expression of free symbols, each with the value
that it had when the program was captured. What counts work reads a size through `number`, so that
the work of a graph is a function of its symbols:

    with sizes_at({batch: 64, context: 32768}):
        work_of_graph(graph)                      # of that batch and context; nothing is captured

The assignment belongs to the thread, or task, that asks (a context variable): how a pass counts is
spread over many functions, which all count for the same sizes. No guard is added to a program.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import sympy
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.symbolic import size_expression


class UnknownSize(RidgelineError):
    """A size that the values of an assignment do not give."""


class _Assignment:
    """Values of symbols, and what the expressions seen so far come to."""

    def __init__(self, values: Mapping[sympy.Symbol, int]) -> None:
        self.values = dict(values)
        self.known: dict[sympy.Expr, int] = {}

    def __call__(self, size: torch.SymInt) -> int:
        expression = size_expression(size)
        if expression not in self.known:
            value = expression.subs(self.values)
            if value.free_symbols:
                hints = ", ".join(sorted(map(str, value.free_symbols)))
                raise UnknownSize(
                    f"the size {expression} needs a value for {hints}; found values for"
                    f" {', '.join(map(str, self.values)) or 'nothing'}"
                )
            self.known[expression] = int(value)
        return self.known[expression]


_ASKED: ContextVar[_Assignment | None] = ContextVar("sizes asked for", default=None)


def number(size: int | torch.SymInt) -> int:
    """A size as an integer: as captured, or as `sizes_at` has it.

    Raises UnknownSize where an assignment leaves a symbol open.
    """
    if isinstance(size, int):
        return size
    asked = _ASKED.get()
    return int(size.node.hint) if asked is None else asked(size)


def numbers(sizes: Iterable[int | torch.SymInt]) -> tuple[int, ...]:
    """Sizes, or strides, as integers."""
    return tuple(map(number, sizes))


def captured_sizes(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """Every free symbol of the sizes and strides in a graph -> its value when it was captured.

    A symbol may be no input's size by itself: of a length that is split over ranks there is
    (s + 1) // 2, and the compiler of another graph may hand over sizes as integers of their own.
    """
    found: dict[sympy.Symbol, int] = {}
    for node in graph.nodes:
        for value in tree_leaves(node.meta.get("val")):
            sizes = (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    for symbol in size.node.expr.free_symbols - found.keys():
                        alone = size.node.shape_env.create_symintnode(symbol, hint=None).node.hint
                        if alone is not None:  # what only the data says has no value
                            found[symbol] = int(alone)
    return found


@contextmanager
def sizes_at(values: Mapping[sympy.Symbol, int]) -> Iterator[None]:
    """Within it, free sizes count at these values; every symbol that is read needs one."""
    token = _ASKED.set(_Assignment(values))
    try:
        yield
    finally:
        _ASKED.reset(token)
