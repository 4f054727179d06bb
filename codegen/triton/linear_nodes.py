"""Nodes of `ridgeline::quantized_linear` as Triton kernels: which, compiled, and put in place.

Codec "uniform" runs by `triton_quantized_linear`, which knows one scale per row and group: shared
scales are repeated for their rows, and a row scale is multiplied into them (and into a minimum), in
fp32. Codecs "binary" and "shift" run by `triton_coded_linear`, which takes both as they are.
A permutation becomes an index_select of x in the graph, where it fuses with what made x.
Fixed-point products are the CPU's: here they raise UnsupportedProblem.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.kernel import argument, constant, folded, hints, scheme_of
from ridgeline.codegen.triton.coded_linear_launch import compile_coded_linear
from ridgeline.codegen.triton.coded_storage import arranged, lift_of, shared_run
from ridgeline.codegen.triton.coded_storage import pack as pack_coded
from ridgeline.codegen.triton.cross_compile import Compiled
from ridgeline.codegen.triton.problems import compile_quantized_linear
from ridgeline.cost_model import Target
from ridgeline.ir.quantized_linear import unpack_codes

_DEFAULTS = {"codec": "uniform", "group_rows": 1, "terms": 1, "multiply": None}


def _settings(node: fx.Node) -> dict[str, Any]:
    return {**_DEFAULTS, **node.kwargs}


def _dtype(node: fx.Node | None) -> torch.dtype | None:
    return None if node is None else node.meta["val"].dtype


def compile_linear_node(node: fx.Node, target: Target) -> Compiled:
    """The kernel of a node on a target, built with no device; raises as `compile_coded_linear`."""
    x, packed, scale, offset, bias, row_scale = (argument(node, i) for i in range(6))
    settings = _settings(node)
    codec, bits, multiply = settings["codec"], settings["bits"], settings["multiply"]
    if multiply == torch.int16:
        raise UnsupportedProblem(
            "fixed-point products (multiply=torch.int16) are for CPU kernels; the Triton kernels"
            " multiply in floating point, leave multiply out"
        )
    rows, n, k = math.prod(hints(x)[:-1]), hints(packed)[0], hints(x)[-1]
    options = {
        "bits": bits,
        "group_size": settings["group_size"],
        "dtype": _dtype(x),
        "arch": target.arch,
        "multiply": multiply,
        "offset_dtype": _dtype(offset),
        "bias_dtype": _dtype(bias),
        "multiprocessors": target.cores,
    }
    if codec == "uniform":
        scheme = scheme_of(offset)
        if row_scale is not None and scheme == "minimum":
            options["offset_dtype"] = torch.float32
        return compile_quantized_linear(
            rows,
            n,
            k,
            scheme=scheme,
            scale_dtype=_dtype(scale) if row_scale is None else torch.float32,
            bias=bias is not None,
            **options,
        )
    return compile_coded_linear(
        rows,
        n,
        k,
        codec=codec,
        terms=_powers(scale) if codec == "binary" else settings["terms"],
        group_rows=settings["group_rows"],
        scale_dtype=_dtype(scale),
        row_scale_dtype=_dtype(row_scale),
        **options,
    )


def _powers(scale: fx.Node) -> int:
    """Powers of two per α, 0 where α is floating."""
    return 0 if scale.meta["val"].is_floating_point() else hints(scale)[3]


def place_linear_node(node: fx.Node, module: fx.GraphModule) -> None:
    """Repack the weight as the kernel reads it, once per weight, and call the kernel's op."""
    x, packed, scale, offset, bias, row_scale, permutation = (argument(node, i) for i in range(7))
    settings = _settings(node)
    k, codec = x.meta["val"].shape[-1], settings.pop("codec")

    def held(part: str, make: Callable[[], Tensor]) -> fx.Node:
        return folded(module, packed, f"triton_{part}", make)

    with node.graph.inserting_before(node):
        if permutation is not None:
            order = held("permutation", lambda: constant(permutation).long())
            read = node.graph.call_function(torch.ops.aten.index_select.default, (x, -1, order))
            read.meta["val"] = x.meta["val"].index_select(-1, order.meta["val"])
            x = read
        if codec == "uniform":
            words = held("words", lambda: _uniform_words(constant(packed), settings, k))
            scale, offset = _own_scales(held, scale, offset, row_scale, packed, settings)
            node.args = (x, words, scale, offset, bias)
            kept = ("bits", "group_size", "multiply")
            node.kwargs = {name: settings[name] for name in kept}
            node.target = torch.ops.ridgeline.triton_quantized_linear.default
            return
        narrow = not shared_run(settings["group_size"], k)
        codes = (constant(packed), settings["bits"], k)
        words = held(
            "words", lambda: pack_coded(unpack_codes(*codes), codec=codec, bits=settings["bits"])
        )
        lift = 1.0
        if codec == "binary":
            lift = lift_of(constant(scale), None if offset is None else constant(offset))
        own = held("scale", lambda: arranged(constant(scale), narrow=narrow))
        if offset is not None:
            source = offset
            offset = held("offset", lambda: arranged(constant(source), narrow=narrow))
        node.args = (x, words, own, offset, bias, row_scale)
        node.kwargs = {"codec": codec, **settings, "lift": lift}
        node.target = torch.ops.ridgeline.triton_coded_linear.default


def _uniform_words(packed: Tensor, settings: dict[str, Any], in_features: int) -> Tensor:
    from ridgeline.codegen.triton.quantized_linear import pack  # the module needs triton

    return pack(
        packed,
        bits=settings["bits"],
        group_size=settings["group_size"],
        in_features=in_features,
    )


def _own_scales(
    held: Callable[[str, Callable[[], Tensor]], fx.Node],
    scale: fx.Node,
    offset: fx.Node | None,
    row_scale: fx.Node | None,
    packed: fx.Node,
    settings: dict[str, Any],
) -> tuple[fx.Node, fx.Node | None]:
    """Scale and offset with a row of their own per row of the weight, row scale included."""
    rows, n = settings["group_rows"], hints(packed)[0]

    def own(part: fx.Node, scaled: bool) -> Tensor:
        tensor = constant(part).repeat_interleave(rows, dim=0)[:n]
        if scaled and row_scale is not None:
            tensor = tensor.float() * constant(row_scale).float().unsqueeze(1)
        return tensor

    if rows == 1 and row_scale is None:
        return scale, offset
    wide = held("scale", lambda: own(scale, True))
    if offset is None:
        return wide, None
    floating = offset.meta["val"].is_floating_point()
    return wide, held("offset", lambda: own(offset, floating))
