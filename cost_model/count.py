"""work_of(node): FLOPs and bytes of one node of a pre-dispatch ATen graph, from `meta["val"]`.

Matrix products, convolutions and attention have laws of their own (equal to
`torch.utils.flop_counter` where it covers the op). Views, shape arithmetic and checks cost nothing.
Any other op that returns tensors reads its operands and writes its results once; an op that PyTorch
runs as several passes over memory (layer_norm, softmax) is one kernel here, as in its fused form.
Symbolic sizes count as `ridgeline.ir.sizes` has them; no guard is added.
"""

import dataclasses
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from ridgeline.cost_model.views import COPY_UNLESS_SAME, is_free, origin_of, tensors_of
from ridgeline.cost_model.work import Attention, BinaryAttention, Gemm, Kernel, Norm, Stream, Work
from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.sizes import number, numbers

aten = torch.ops.aten
_NOTHING = Work()
# Operations per element read of the ops that do more than one.
_FLOPS_PER_ELEMENT = {
    "gated_activation": 40, "rotary": 4,
    "layer_norm": 8, "native_layer_norm": 8, "group_norm": 8, "native_group_norm": 8,
    "rms_norm": 5, "batch_norm": 4, "softmax": 5, "_softmax": 5, "log_softmax": 5,
    "_log_softmax": 5, "gelu": 8, "silu": 4, "sigmoid": 3, "tanh": 5, "mish": 6,
}  # fmt: skip
_REDUCTIONS = frozenset((
    "layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "rms_norm", "batch_norm",
    "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "topk", "sort",
    "argmax", "argmin",
))  # fmt: skip
_CHAINS = {"gated_activation": "gate", "rotary": "rotary"}
_GATHERS = frozenset(("embedding", "index", "index_select", "gather", "take", "take_along_dim"))
_IN_PLACE_WRITES = frozenset(
    ("index_put", "index_put_", "index_copy", "index_copy_", "scatter", "scatter_")
)


class Uncountable(RidgelineError):
    """A node whose cost can't be told."""


def work_of(node: fx.Node) -> Work:
    """The work of one node; `Work()` for placeholders, attributes, views and shape arithmetic.

    Raises Uncountable for a call without a fake value in `meta["val"]` and for a module or method
    call: capture the program to ATen first.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return _NOTHING
    if node.op != "call_function":
        raise Uncountable(
            f"node {node.name!r}: expected an ATen call, found {node.op} {node.target!r};"
            " capture the program first"
        )
    if isinstance(node.target, HigherOrderOperator):
        return _bodies(node)
    if not isinstance(node.target, OpOverload):
        return _NOTHING  # operator.getitem and arithmetic on sizes
    results = tensors_of([node.meta.get("val")])
    if not results:
        if "val" not in node.meta and node.target._schema.returns:
            raise Uncountable(
                f"node {node.name!r} ({node.target}): expected a fake tensor in meta['val'],"
                " found none; capture the program first"
            )
        return _NOTHING
    name = node.target._opname
    law = _LAWS.get(node.target.overloadpacket) or _NAMED.get(node.target._schema.name)
    if law is not None:
        return Work((law(node),))
    if is_free(node, name, results):
        return _NOTHING
    return Work((_stream(node, name, results),))


def work_of_graph(graph: fx.Graph) -> Work:
    """The sum over the graph's nodes."""
    return Work(tuple(kernel for node in graph.nodes for kernel in work_of(node).kernels))


def _bodies(node: fx.Node) -> Work:
    """A higher-order call counts each of its graph bodies once."""
    owner = node.graph.owning_module
    total = _NOTHING
    for argument in node.all_input_nodes:
        if argument.op != "get_attr" or owner is None:
            continue
        body = owner
        for part in argument.target.split("."):
            body = getattr(body, part)
        if isinstance(body, fx.GraphModule):
            total = total + work_of_graph(body.graph)
    return total


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return numbers(tensor.shape)


def _size_bytes(tensor: torch.Tensor) -> int:
    """Bytes really held: a dimension that is only expanded (stride 0) is read once."""
    strides = tensor.stride()
    held = (s for s, step in zip(_shape(tensor), strides, strict=True) if step != 0 or s == 0)
    return prod(held) * tensor.dtype.itemsize


def _stream(node: fx.Node, name: str, results: list[torch.Tensor]) -> Stream:
    written = sum(_size_bytes(t) for t in results)
    operands = tensors_of(node.args) + tensors_of(node.kwargs.values())
    read = sum(_size_bytes(t) for t in operands)
    elements = max((prod(_shape(t)) for t in (*operands, *results)), default=0)
    access = "elementwise"
    if name in _GATHERS:  # rows that are picked, not the table
        access, elements = "gather", 0
        read = written + sum(_size_bytes(t) for t in operands[1:])
    elif name in _IN_PLACE_WRITES:
        access, elements = "gather", 0
        updates = sum(_size_bytes(t) for t in operands[1:])
        functional = 0 if name.endswith("_") else _size_bytes(operands[0])
        read, written = updates + functional, updates + functional
    elif name in _REDUCTIONS or torch.Tag.reduction in node.target.tags:
        access = "reduction"
    flops = elements * _FLOPS_PER_ELEMENT.get(name, 1)
    if name in ("clone", "copy_", "cat", "stack", *COPY_UNLESS_SAME) or not operands:
        flops = 0
    ours = node.target.namespace == "ridgeline"
    chain, rows = _CHAINS.get(name, "") if ours else "", 0
    if node.target.overloadpacket in (aten.softmax, aten._softmax) and elements:
        chain, rows = "softmax", elements // (_shape(results[0]) or (1,))[argument(node, "dim")]
    return Stream(read, written, flops, results[0].dtype, access, chain, rows)


def _val(node: fx.Node, index: int) -> torch.Tensor:
    return node.args[index].meta["val"]


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument called `name`, given by position or keyword, else its schema's default."""
    for i, parameter in enumerate(node.target._schema.arguments):
        if parameter.name == name:
            if i < len(node.args):
                return node.args[i]
            return node.kwargs.get(name, parameter.default_value)
    return default


def _linear(node: fx.Node) -> Gemm:
    x, weight = _shape(_val(node, 0)), _shape(_val(node, 1))
    dtype = _val(node, 0).dtype
    n = weight[0] if len(weight) == 2 else 1
    biased = argument(node, "bias") is not None
    return Gemm(prod(x[:-1]), n, x[-1], dtype=dtype, bias=biased, weight=_weight(node))


def _matmul(node: fx.Node, left: int = 0, bias: bool = False) -> Kernel:
    a, b = _val(node, left), _val(node, left + 1)
    x, w = _shape(a), _shape(b)
    m = x[-2] if len(x) > 1 else 1
    n = w[-1] if len(w) > 1 else 1
    weight = _weight(node, left)
    if len(w) <= 2:  # one right operand: the batch folds into the rows
        return Gemm(prod(x[:-1]), n, x[-1], dtype=a.dtype, bias=bias, weight=weight)
    batch = prod(torch.broadcast_shapes(x[:-2], w[:-2]))
    expanded = b.stride()[:-2]
    shared = all(s == 1 or step == 0 for s, step in zip(w[:-2], expanded, strict=True))
    return Gemm(m, n, x[-1], batch, a.dtype, shared_weight=shared, bias=bias, weight=weight)


def _weight(node: fx.Node, left: int = 0) -> str:
    """The operand of a product that is a weight (`Gemm.weight`), be it through views and casts; of
    an input of the graph, which may be one, the right."""
    first, second = (origin_of(node.args[i]).op for i in (left, left + 1))
    if first == "get_attr" != second:
        return "left"
    return "none" if second == "call_function" else "right"


def _grouped(node: fx.Node) -> Kernel:
    """Rows [M, K] that are sorted by expert, times weights [E, K, N]: an expert that gets no row is
    not read, and rows are taken to be spread over all. A weight's gradient: one product."""
    x, w = _shape(_val(node, 0)), _shape(_val(node, 1))
    experts = min(w[0], prod(x[:-1])) if len(w) > 2 else 1
    weight = _weight(node)
    return Gemm(
        prod(x[:-1]), w[-1], x[-1], dtype=_val(node, 0).dtype, experts=experts, weight=weight
    )


def _addmm(node: fx.Node) -> Kernel:
    return _matmul(node, left=1, bias=True)


def _sdpa(node: fx.Node) -> Kernel:
    query, key, value = (_val(node, i) for i in range(3))
    causal = bool(argument(node, "is_causal", False))
    q, kv = _shape(query)[-2], _shape(key)[-2]
    # is_causal starts at the top left: keys beyond the last query are never read.
    return _attention(query, key, value, causal, min(q, kv) if causal else kv, node)


def _ridgeline_attention(node: fx.Node) -> Kernel:
    query, key, value = (_val(node, i) for i in range(3))
    diagonal = argument(node, "diagonal")
    kv = _shape(key)[-2]
    if isinstance(diagonal, fx.Node):
        diagonal = diagonal.meta["val"]
    if diagonal is not None:  # keys that the last query keeps
        kv = max(0, min(kv, _shape(query)[-2] + number(diagonal)))
    return _attention(query, key, value, diagonal is not None, kv, node)


def _attention(query, key, value, causal: bool, kv: int, node: fx.Node) -> Attention:
    shape, keys = _shape(query), _shape(key)
    mask = argument(node, "mask", argument(node, "attn_mask"))
    return Attention(
        batch=prod(shape[:-3]) if len(shape) > 3 else 1,
        heads=shape[-3] if len(shape) > 2 else 1,
        kv_heads=keys[-3] if len(keys) > 2 else 1,
        q=shape[-2],
        kv=kv,
        head_dim=shape[-1],
        value_dim=_shape(value)[-1],
        causal=causal,
        dtype=query.dtype,
        masked=mask is not None,
        sinks=argument(node, "sinks") is not None,
        library="ridgeline" if node.target.namespace == "ridgeline" else "torch",
    )


def _quantized_linear(node: fx.Node) -> Kernel:
    x, scale, offset = _val(node, 0), _val(node, 2), argument(node, "offset")
    scheme = argument(node, "codec", "uniform")
    if scheme == "uniform":
        scheme = "symmetric"
        if offset is not None:
            scheme = "minimum" if offset.meta["val"].is_floating_point() else "zero_point"
    powers = scheme == "binary" and not scale.is_floating_point()
    shape, multiply = _shape(x), argument(node, "multiply")
    beside = tensors_of([argument(node, "row_scale"), argument(node, "permutation")])
    return Gemm(
        m=prod(shape[:-1]),
        n=_shape(_val(node, 1))[0],
        k=shape[-1],
        dtype=multiply or x.dtype,
        weight_bits=argument(node, "bits"),
        group_size=argument(node, "group_size"),
        scheme=scheme,
        bias=argument(node, "bias") is not None,
        stored=None if multiply is None else x.dtype,
        group_rows=argument(node, "group_rows"),
        terms=_shape(scale)[-1] if powers else argument(node, "terms") * (scheme == "shift"),
        centred=scheme != "binary" or offset is None,
        scale_bytes=scale.dtype.itemsize if scale.is_floating_point() else 2,
        beside_bytes=sum(map(_size_bytes, beside)),
    )


def _binary_attention(node: fx.Node) -> Kernel:
    query, key, value = (_val(node, i) for i in range(3))
    batch, heads, q, head_dim = _shape(query)
    return BinaryAttention(
        batch,
        heads,
        q,
        kv=_shape(key)[-2],
        head_dim=head_dim,
        value_dim=_shape(value)[-1],
        dtype=value.dtype,
        input_bytes=_size_bytes(query) + _size_bytes(key),
    )


def _group_rational(node: fx.Node) -> Kernel:
    """One pass over memory either way; the backward evaluates about three times as much."""
    operands, results = tensors_of(node.args), tensors_of([node.meta["val"]])
    x, numerator, denominator = operands[-3:]
    times = 1 if len(results) == 1 else 3
    flops = 2 * times * (_shape(numerator)[1] + _shape(denominator)[1]) * prod(_shape(x))
    read, written = (float(sum(map(_size_bytes, tensors))) for tensors in (operands, results))
    return Stream(read, written, flops, x.dtype, chain="rational")


def _norm(node: fx.Node) -> Kernel:
    x = _val(node, 0)
    *rows, size = _shape(x)
    center, residual = "layer" in node.target._opname, node.target._opname.startswith("add_")
    return Norm(prod(rows), size, x.dtype, center, residual, library="ridgeline")


def _norm_rational(node: fx.Node) -> Kernel:
    numerator, denominator = (_shape(_val(node, i)) for i in (3, 4))
    norm = _norm(node)
    return dataclasses.replace(norm, terms=numerator[1] + denominator[1])


def _linear_rational(node: fx.Node) -> Kernel:
    terms = sum(_shape(_val(node, i))[1] for i in (3, 4))
    side = f"{argument(node, 'side')}_terms"
    return dataclasses.replace(_linear(node), library="ridgeline", **{side: terms})


def _convolution(node: fx.Node) -> Kernel:
    """An implicit GEMM: rows are output positions (input positions when transposed)."""
    image, weight = _val(node, 0), _val(node, 1)
    x, w, y = _shape(image), _shape(weight), _shape(node.meta["val"])
    transposed = "transpose" in node.target._opname or bool(argument(node, "transposed", False))
    groups = argument(node, "groups", 1)
    spatial = len(w) - 2
    rows = prod((x if transposed else y)[-spatial:]) * (x[0] if len(x) == len(w) else 1)
    n = w[1] if transposed else w[0] // groups
    depth = (w[0] // groups if transposed else w[1]) * prod(w[2:])
    if transposed:
        n, depth = n * prod(w[2:]), w[0] // groups
    return Gemm(
        rows,
        n,
        depth,
        batch=groups,
        dtype=image.dtype,
        left_elements=prod(x),
        bias=argument(node, "bias") is not None,
    )


_LAWS: dict[Any, Callable[[fx.Node], Kernel]] = {
    aten.linear: _linear,
    aten.matmul: _matmul,
    aten.mm: _matmul,
    aten.bmm: _matmul,
    aten.mv: _matmul,
    aten.addmm: _addmm,
    aten.baddbmm: _addmm,
    aten.scaled_dot_product_attention: _sdpa,
    aten.convolution: _convolution,
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
    aten.conv_transpose1d: _convolution,
    aten.conv_transpose2d: _convolution,
    aten.conv_transpose3d: _convolution,
}
_OWN: dict[str, Callable[[fx.Node], Kernel]] = {
    "attention": _ridgeline_attention,
    "quantized_linear": _quantized_linear,
    "binary_attention": _binary_attention,
    "group_rational": _group_rational,
    "group_rational_backward": _group_rational,
    "layer_norm_rational": _norm_rational,
    "linear_rational": _linear_rational,
    **dict.fromkeys(("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"), _norm),
}
_NAMED = {
    **{f"ridgeline::{name}": law for name, law in _OWN.items()},
    **dict.fromkeys(("aten::_grouped_mm", "transformers::grouped_mm_fallback"), _grouped),
}
