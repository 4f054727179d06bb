"""What of an ATen graph is a view, or a copy, of another value."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ridgeline.ir.sizes import number, numbers

COPY_UNLESS_SAME = frozenset(
    ("to", "_to_copy", "contiguous", "reshape", "flatten", "type_as", "float", "half")
)
"""Operations that copy only where their result would have another dtype or layout."""
_COPIES = COPY_UNLESS_SAME | {"clone"}


def tensors_of(values: Iterable[Any]) -> list[torch.Tensor]:
    """Every tensor among values, those of nodes included."""
    found = []
    for value in values:
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_of(value)
    return found


def _is_contiguous(tensor: torch.Tensor) -> bool:
    expected = 1
    for size, stride in zip(
        reversed(numbers(tensor.shape)), reversed(tensor.stride()), strict=True
    ):
        if size > 1:
            if number(stride) != expected:
                return False
            expected *= size
    return True


def is_free(node: fx.Node, name: str, results: list[torch.Tensor]) -> bool:
    """Is the result of an ATen call, `name`, a view: is nothing read or written?"""
    if name in ("dropout", "feature_dropout", "alpha_dropout"):
        return not node.args[2]
    if name in ("lift_fresh_copy", "alias", "detach_", "_assert_tensor_metadata"):
        return True
    if name in COPY_UNLESS_SAME:
        source = tensors_of(node.args[:1])
        if not source or source[0].dtype != results[0].dtype:
            return False
        # A view keeps the strides of a source with gaps; a copy closes them.
        return _is_contiguous(source[0]) or not _is_contiguous(results[0])
    schema = node.target._schema
    return not schema.is_mutable and all(r.alias_info is not None for r in schema.returns)


def origin_of(node: fx.Node) -> fx.Node:
    """What a value is a view, or a copy, of."""
    while node.op == "call_function":
        if isinstance(node.target, OpOverload):
            name = node.target._opname
            same = name in _COPIES or is_free(node, name, tensors_of([node]))
        else:
            same = node.target is operator.getitem
        if not same:
            break
        node = node.all_input_nodes[0]
    return node
