"""Which sizes a captured program takes.

Free dimensions are symbols; a call binds each symbol where it stands alone and must agree
everywhere else: in derived sizes such as s + 1, in the ranges found while tracing, and in every
other condition that tracing assumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.printers import PythonPrinter

from ridgeline.ir.symbolic import shape_of, size_expression


@dataclass(frozen=True, slots=True)
class ShapeGuards:
    """shapes: (input, shape) of inputs with no free dimension. fixed: (input, dimension, size) of
    the others. binds: (input, dimension, symbol). derived: (input, dimension, code over the
    symbols). conditions: code over the symbols."""

    shapes: tuple[tuple[int, torch.Size], ...]
    fixed: tuple[tuple[int, int, int], ...]
    binds: tuple[tuple[int, int, str], ...]
    derived: tuple[tuple[int, int, CodeType], ...]
    conditions: tuple[CodeType, ...]

    @classmethod
    def of(cls, module: fx.GraphModule) -> "ShapeGuards":
        """Read the guards off the placeholders and their shape environment."""
        shapes, fixed, binds, derived = [], [], [], []
        known: set[sympy.Symbol] = set()
        environment = None
        for i, node in enumerate(module.graph.find_nodes(op="placeholder")):
            value = node.meta["val"]
            if not isinstance(value, Tensor):
                continue
            sizes = shape_of(node)
            if all(s.is_Integer for s in sizes):
                shapes.append((i, torch.Size(map(int, sizes))))
                continue
            for d, size in enumerate(value.shape):
                expression = size_expression(size)
                if expression.is_Integer:
                    fixed.append((i, d, int(expression)))
                    continue
                assert isinstance(size, torch.SymInt)
                environment = size.node.shape_env
                if expression.is_Symbol:
                    known.add(expression)
                    binds.append((i, d, str(expression)))
                else:
                    derived.append((i, d, _code(expression)))
        conditions = [] if environment is None else _conditions(environment, known)
        return cls(tuple(shapes), tuple(fixed), tuple(binds), tuple(derived), tuple(conditions))

    def accept(self, flat: Sequence[Tensor]) -> bool:
        """Do the sizes of a call's flat tensors satisfy every guard?"""
        for i, shape in self.shapes:
            if flat[i].shape != shape:
                return False
        for i, d, size in self.fixed:
            if flat[i].shape[d] != size:
                return False
        sizes: dict[str, int] = {}
        for i, d, symbol in self.binds:
            size = flat[i].shape[d]
            if sizes.setdefault(symbol, size) != size:
                return False
        return all(flat[i].shape[d] == eval(c, _NAMES, sizes) for i, d, c in self.derived) and all(
            eval(c, _NAMES, sizes) for c in self.conditions
        )


# What PythonPrinter may write beside integers and operators.
_NAMES = {
    "__builtins__": {"max": max, "min": min, "abs": abs, "int": int},
    "math": __import__("math"),
}


def _code(expression: sympy.Basic) -> CodeType:
    return compile(PythonPrinter().doprint(expression), "<shape guard>", "eval")


def _conditions(environment, known: set[sympy.Symbol]) -> list[CodeType]:
    found = []
    for symbol in sorted(known, key=str):
        bounds = environment.var_to_range.get(symbol)
        if bounds is None:
            continue
        if bounds.lower.is_Integer and bounds.lower > 0:
            found.append(symbol >= bounds.lower)
        if bounds.upper.is_Integer and bounds.upper < 2**62:
            found.append(symbol <= bounds.upper)
    for guard in environment.guards:
        expression = environment.simplify(guard.expr)
        if expression not in (sympy.true, sympy.false) and expression.free_symbols <= known:
            found.append(expression)
    return [_code(e) for e in found]
