"""How a value lies over two parts of the tokens, and what is known of a graph's values so far.

The law, and which operations keep tokens apart: `parts`, `part_rules`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import sympy
from torch import Tensor, fx

from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.parallel.rows import same_size


@dataclass(frozen=True, slots=True)
class Along:
    """One dimension. base: keys that lie before the tokens'. state, of scores: whether keys beyond
    the part are closed by a mask, and whether a softmax made weights of them."""

    kind: Literal["rows", "keys"]
    base: sympy.Expr = sympy.S.Zero
    state: Literal["open", "closed", "weights"] = "open"


ROWS = Along("rows")
Dims = dict[int, Along]


class Known:
    """dims: node -> its dimensions that are of tokens, for all that each part computes for itself;
    open: scores, and why keys beyond the part are not closed; symbol: the size that is split."""

    def __init__(self, symbol: sympy.Symbol) -> None:
        self.symbol = symbol
        self.dims: dict[fx.Node, Dims] = {}
        self.open: dict[fx.Node, str] = {}

    def own(self, value: Any) -> Dims | None:
        """The dimensions of a value that is computed in parts; None of every other."""
        return self.dims.get(value) if isinstance(value, fx.Node) else None

    def of_none(self, value: Any) -> bool:
        """Has the value nothing of the tokens, such as a weight?"""
        if not isinstance(value, fx.Node):
            return True
        return self.own(value) is None and self.symbol not in shape_of(value)

    def from_right(self, value: fx.Node) -> Dims:
        rank = len(shape_of(value))
        return {d - rank: along for d, along in (self.own(value) or {}).items()}

    def labels(self, operands: list[fx.Node], rank: int) -> Iterator[tuple[int, Along]]:
        for operand in operands:
            lead = rank - len(shape_of(operand))
            for d, along in (self.own(operand) or {}).items():
                yield d + lead, along

    def fits(self, operand: fx.Node, sizes: list[sympy.Expr], dims: Dims) -> bool:
        """Is each dimension that is of tokens one of the operand's, or 1, or cut from it?"""
        shape, own = shape_of(operand), self.own(operand)
        lead = len(sizes) - len(shape)
        for d in dims:
            if d < lead or shape[d - lead] == 1 or (own is not None and d - lead in own):
                continue
            if own is not None or not same_size(shape[d - lead], sizes[d]):
                return False
        return True


def tensors(node: fx.Node) -> list[Tensor]:
    """What the node gives that is no size."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else (value,)
    return [v for v in values if isinstance(v, Tensor)]
