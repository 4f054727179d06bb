"""What compiled code takes for granted about its inputs, checked before each call.

Inductor computes addresses from the sizes and strides it saw and never looks at the tensor again;
an input laid out otherwise would be read, or written, at the wrong place. For every input

    dtype = dtype seen,  size[d] = size seen(s),  stride[d] = stride seen(s)  wherever size[d] > 1,

where s are the free sizes of the graph, each bound by the first input that shows it. The shape
conditions that the compiler assumed about s on its way are checked with them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._C._dynamo.guards import assert_size_stride
from torch.utils._sympy.printers import PythonPrinter

from ridgeline.codegen.errors import UnsupportedProblem

Check = Callable[..., None]


class InputMismatch(UnsupportedProblem):
    """Inputs that are not what the graph was compiled for; another compilation would take them."""


def input_check(values: Sequence[Any], assumed: Sequence[sympy.Basic] = ()) -> Check:
    """Return a function of the inputs that raises InputMismatch, or returns None.

    values: the fake or real tensors and SymInts that were compiled for.
    assumed: conditions on the free sizes that the compiler relied on.

    Raises UnsupportedProblem where a size cannot be read off any input.

    It is compiled from one flat Python source, because it runs at every call: 0.2 us per input.
    """
    bound = _bindings(values)
    names: dict[str, Any] = {"_same_layout": assert_size_stride, "_mismatch": _mismatch}
    lines = [f"{symbol} = {source}" for symbol, source in bound.items()]
    for position, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            continue
        names[f"dtype{position}"] = value.dtype
        lines.append(
            f"if a{position}.dtype is not dtype{position}: "
            f"_mismatch({position}, f'dtype {{dtype{position}}}', f'{{a{position}.dtype}}')"
        )
        size, stride = _source(value.shape, bound), _source(value.stride(), bound)
        lines += [
            f"try: _same_layout(a{position}, {size}, {stride})",
            "except AssertionError:",
            f"    _mismatch({position}, f'shape {{{size}}} and strides {{{stride}}}', "
            f"f'{{tuple(a{position}.shape)}} and {{a{position}.stride()}}')",
        ]
    for condition in assumed:
        text = _printed(condition, bound)
        lines.append(f"if not ({text}): _mismatch(None, {text!r}, 'sizes that break it')")
    arguments = ", ".join(f"a{i}" for i in range(len(values)))
    body = "\n    ".join(line for text in lines or ["pass"] for line in text.split("\n"))
    exec(f"def check({arguments}):\n    {body}", names)
    return names["check"]


def _bindings(values: Sequence[Any]) -> dict[sympy.Symbol, str]:
    """Where each free size can be read: a SymInt input, a dimension that is just that size, or, as
    of a slice of something longer, a stride."""
    bound: dict[sympy.Symbol, str] = {}
    candidates: list[tuple[int | torch.SymInt, str]] = []
    for position, value in enumerate(values):
        if isinstance(value, torch.SymInt):
            candidates.append((value, f"a{position}"))
        else:
            candidates += [(n, f"a{position}.size({d})") for d, n in enumerate(value.shape)]
    for position, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            candidates += [(n, f"a{position}.stride({d})") for d, n in enumerate(value.stride())]
    for size, source in candidates:
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
            bound.setdefault(size.node.expr, source)
    return bound


def _source(sizes: Sequence[int | torch.SymInt], bound: Mapping[sympy.Symbol, str]) -> str:
    """Return the source of a tuple of sizes."""
    terms = [_printed(n.node.expr, bound) if isinstance(n, torch.SymInt) else str(n) for n in sizes]
    return f"({''.join(term + ', ' for term in terms)})"


def _printed(expression: sympy.Basic, bound: Mapping[sympy.Symbol, str]) -> str:
    unreadable = expression.free_symbols - set(bound)
    if unreadable:
        raise UnsupportedProblem(
            f"the compiled graph depends on {expression}, but no input shows the size(s) "
            f"{sorted(map(str, unreadable))} as such; expected a tensor dimension or an integer "
            "input that is just that size: mark the underlying dimension dynamic, or fix it"
        )
    return PythonPrinter().doprint(expression)


def _mismatch(position: int | None, expected: str, found: str) -> None:
    where = "the sizes" if position is None else f"input {position}"
    raise InputMismatch(
        f"{where}: the graph was compiled for {expected}, found {found}; compile it again for "
        "these inputs"
    )
