"""One implementation of one operation on one kind of target, and what it leaves in the plan."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, fx

from ridgeline.cost_model import Target
from ridgeline.ir.sizes import numbers


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One kernel of a plan: what it is, for which machine, and what its code looks like.

    source: gives the kernel's source, to read or to take away.
    audit: figures read off the compiled code (registers, shared bytes, matrix instructions, ...).
    also: other code for the same node, listed beside this one and not run by the plan.
    """

    op: str
    backend: str
    target: str
    configuration: str
    source: Callable[[], str] = field(repr=False, compare=False)
    audit: dict[str, Any] = field(default_factory=dict)
    also: "tuple[KernelReport, ...]" = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the source and other reports."""
        kept = (f.name for f in fields(self) if f.name not in ("source", "also"))
        return {name: getattr(self, name) for name in kept}


@dataclass(frozen=True, slots=True)
class Kernel:
    """How nodes of `op` become code of `backend` on targets of the given kinds.

    place: puts the kernel's own op where the node stands (the device is here).
    training: what is placed instead where gradients flow; None without a backward kernel.
    compile: the kernel for the node's shapes on a target, built with no device; raises a
        RidgelineError that says why where there is none.
    """

    op: str
    backend: str
    kinds: frozenset[str]
    place: Callable[[fx.Node, fx.GraphModule], None]
    compile: Callable[[fx.Node, Target], KernelReport]
    training: "Kernel | None" = None


def argument(node: fx.Node, position: int, default: Any = None) -> Any:
    """The positional argument of a node, or its default where the call leaves it out."""
    return node.args[position] if len(node.args) > position else default


def keyword(node: fx.Node, name: str) -> Any:
    """The keyword argument of a node, None where the call leaves it out."""
    return node.kwargs.get(name)


def scheme_of(offset: fx.Node | None) -> str:
    """The scheme of a quantised weight, read off its offset as the op does."""
    if offset is None:
        return "symmetric"
    return "minimum" if offset.meta["val"].is_floating_point() else "zero_point"


def norm_arguments(
    node: fx.Node,
) -> tuple[tuple[fx.Node, ...], tuple[fx.Node | None, fx.Node | None], bool]:
    """(x, and the residual where there is one), (weight, bias), is it LayerNorm: of a norm node."""
    name = node.target._opname  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    count = 2 if name.startswith("add_") else 1
    weight, bias = (*node.args[count:], None, None)[:2]
    return node.args[:count], (weight, bias), "layer" in name  # pyright: ignore[reportReturnType]


def constant(node: fx.Node) -> Any:
    """The tensor that a get_attr node stands for."""
    return operator.attrgetter(str(node.target))(node.graph.owning_module)


def attribute(module: fx.GraphModule, name: str, like: fx.Node) -> fx.Node:
    """A get_attr node for the tensor `name` of `module`, inserted at the graph's current point."""
    node = module.graph.get_attr(name)
    fake = like.meta["val"].fake_mode
    tensor = operator.attrgetter(name)(module)
    node.meta["val"] = fake.from_tensor(tensor, static_shapes=True)
    return node


def buffer(module: fx.GraphModule, name: str, tensor: Tensor, like: fx.Node) -> fx.Node:
    """`attribute` of a new buffer, under `name` or, where that is another tensor's, one like it."""
    stem, tries = name, 0
    while getattr(module, name, tensor) is not tensor:
        tries += 1
        name = f"{stem}_{tries}"
    if not hasattr(module, name):
        module.register_buffer(name, tensor, persistent=False)
    return attribute(module, name, like)


def folded(
    module: fx.GraphModule, source: fx.Node, part: str, make: Callable[[], Tensor]
) -> fx.Node:
    """`buffer` of what `make` makes of the constant `source` for the kernel's operand `part`: made
    once per tensor, however many nodes read it, and under a name of its own."""
    made: dict[tuple[int, str], tuple[Tensor, Tensor]]
    made = module.__dict__.setdefault("_ridgeline_folded", {})
    tensor = constant(source)
    if (id(tensor), part) not in made:  # the tensor is kept, so that its id stays its own
        made[id(tensor), part] = tensor, make()
    name = re.sub(r"\W", "_", f"{source.target}_{part}")
    return buffer(module, name, made[id(tensor), part][1], source)


def hints(node: fx.Node) -> tuple[int, ...]:
    """The sizes of a node's tensor, symbolic ones at their captured value."""
    return numbers(node.meta["val"].shape)
