"""What quantising linear layers is worth: every form of a site with its error and its work.

A site is one layer, or several that read one input and become one product, their weights stacked.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from ridgeline.cost_model import Target, Work
from ridgeline.ir.quantized_linear import MANY_ROWS, fixed_point
from ridgeline.ir.sizes import numbers
from ridgeline.passes.base import Setting
from ridgeline.passes.quantization import Codec

Products = tuple[torch.dtype | None, ...]
"""dtypes of products, None for the input's own."""


_LINEAR = (torch.ops.aten.linear.default, torch.ops.aten.t.default)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A linear layer: its node, its weight [N,K] and that weight's name, its bias if it has one."""

    out: fx.Node
    name: str
    weight: Tensor
    bias: fx.Node | None


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """codec, and the dtype of the products where it is not the input's; error: relative, of all
    outputs together as root of the sum of squares."""

    codec: Codec
    multiply: torch.dtype | None
    error: float
    memory_bytes: int
    work: Work

    @property
    def variant(self) -> str:
        """As the plan names it."""
        how = {None: "", torch.bfloat16: ", bf16 products"}.get(self.multiply, ", fixed point")
        lookup = self.codec.scheme == "binary" and self.multiply == torch.int16
        return f"{self.codec}{', by lookup' if lookup else how}"


def forms(
    layers: Sequence[Layer], offered: Sequence[tuple[Codec, Products]], setting: Setting
) -> Iterator[Form]:
    """Each codec with each dtype of products, to the first codec that loses nothing: list them from
    the fewest bits per weight to the most."""
    x = setting.observed(source_of(layers))
    for codec, products in offered:
        memory_bytes = sum(
            _held(layer, codec, setting) - _freed(layer, setting) for layer in layers
        )
        for multiply in products:
            error = error_of(layers, codec, multiply, setting)
            work = _work(layers, codec, multiply, x.dtype)
            yield Form(codec, multiply, error, memory_bytes, work)
        if error_of(layers, codec, None, setting) == 0.0:
            return  # codecs after this one hold more bytes and gain nothing


def error_of(
    layers: Sequence[Layer],
    codec: Codec,
    multiply: torch.dtype | None,
    setting: Setting,
    *,
    refined: bool = False,
) -> float:
    """Relative errors of the layers' outputs, as root of the sum of squares: of the store's
    `sketch` of the weights, or of the `refined` ones, and of the products' dtype."""
    weights, source = setting.weights, source_of(layers)
    x, total = setting.observed(source), 0.0

    def of_weight(layer: Layer) -> float:
        if refined:
            part, coded = layer.weight, weights.refined(layer.name, layer.weight, codec)
        else:
            part, coded = weights.sketch(layer.name, layer.weight, codec)
        return _output_error(x, part, coded.dequantize())

    for layer in layers:
        known = (source, layer.name, codec, refined)
        total += weights.memo(known, functools.partial(of_weight, layer)) ** 2
        if multiply is not None:
            values = weights.values(layer.weight)
            rounding = functools.partial(_rounding_error, x, values, multiply)
            total += weights.memo((source, layer.name, multiply), rounding) ** 2
    return total**0.5


def source_of(layers: Sequence[Layer]) -> fx.Node:
    """What every one of the layers reads."""
    x = layers[0].out.args[0]
    assert isinstance(x, fx.Node)
    return x


def rows_of(layers: Sequence[Layer]) -> int:
    """Rows of the layers' input, free sizes as `ridgeline.ir.sizes` has them."""
    return rows_at(source_of(layers))


def rows_at(x: fx.Node) -> int:
    """Rows of a value that a linear layer reads, free sizes as `ridgeline.ir.sizes` has them."""
    return prod(numbers(x.meta["val"].shape[:-1]))


def floating_products(layers: Sequence[Layer], setting: Setting) -> Products:
    """The floating dtypes in which the products may be formed on this machine."""
    dtype = setting.observed(source_of(layers)).dtype
    narrower = dtype == torch.float32 and bf16_is_faster(setting.target)
    return (None, torch.bfloat16) if narrower else (None,)


def bf16_is_faster(target: Target) -> bool:
    """Is it a CPU on which products of bf16 are worth rounding to it?"""
    peaks = target.peaks
    return target.kind == "cpu" and peaks.get("bfloat16", 0) > 1.2 * peaks.get("float32", 0)


def _held(layer: Layer, codec: Codec, setting: Setting) -> int:
    """Bytes of the layer's weight in `codec`."""
    part, coded = setting.weights.sketch(layer.name, layer.weight, codec)
    if len(part) == len(layer.weight):
        return coded.nbytes
    n, k = layer.weight.shape
    return round(codec.average_bits(k, n) * n * k / 8)


def _freed(layer: Layer, setting: Setting) -> int:
    """Bytes of the layer's weight, unless something else reads it too, as an embedding that the
    head is tied to."""
    kept = "weights that are read by more than linear layers"
    if kept not in setting.proofs:
        setting.proofs[kept] = {
            str(node.target)
            for node in layer.out.graph.find_nodes(op="get_attr")
            if any(user.target not in _LINEAR for user in node.users)
        }
    return 0 if layer.name in setting.proofs[kept] else layer.weight.nbytes


def _output_error(x: Tensor, weight: Tensor, other: Tensor) -> float:
    """‖X (W-Ŵ)ᵀ‖ / ‖X Wᵀ‖ on up to 256 observed rows; exactly 0 for equal weights."""
    wide = weight.float()
    if torch.equal(wide, other):
        return 0.0
    rows = x.detach().float().flatten(0, -2)[:256]
    return _ratio(rows @ (wide - other).T, rows @ wide.T)


def _rounding_error(x: Tensor, weight: Tensor, multiply: torch.dtype) -> float:
    """What products in `multiply` do to X Wᵀ: x is rounded, and W where bf16 ones have many
    rows."""
    rows, wide = x.detach().float().flatten(0, -2)[:256], weight.float()
    whole = rows @ wide.T
    if multiply == torch.int16:
        return _ratio(fixed_point(rows) @ wide.T - whole, whole)
    rounded = wide.to(multiply).float() if len(rows) >= MANY_ROWS else wide
    return _ratio(rows.to(multiply).float() @ rounded.T - whole, whole)


def _ratio(difference: Tensor, whole: Tensor) -> float:
    return (difference.norm() / whole.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()


def _work(
    layers: Sequence[Layer], codec: Codec, multiply: torch.dtype | None, dtype: torch.dtype
) -> Work:
    n, k = sum(layer.weight.shape[0] for layer in layers), layers[0].weight.shape[1]
    stored = None if multiply is None else dtype
    return Work((codec.gemm(rows_of(layers), n, k, multiply or dtype, stored=stored),))
