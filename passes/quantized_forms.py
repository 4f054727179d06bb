"""What quantising linear layers is worth: every form of a site with its error and its work.

A site is one layer, or several that read one input and become one product, their weights stacked.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ridgeline.cost_model import Gemm, Work
from ridgeline.ir.quantized_linear import MANY_ROWS
from ridgeline.passes.base import Setting
from ridgeline.passes.quantization import Codec

CODECS = (
    Codec(bits=4, group_size=128, scheme="symmetric"),
    Codec(bits=4, group_size=64, scheme="zero_point"),
    Codec(bits=4, group_size=32, scheme="minimum"),
    Codec(bits=8, group_size=32, scheme="symmetric"),
)
"""From the fewest bits per weight to the most."""


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
        c, products = self.codec, "" if self.multiply is None else ", bf16 products"
        return f"{c.bits}-bit {c.scheme} g{c.group_size}{products}"


def forms(layers: Sequence[Layer], setting: Setting) -> Iterator[Form]:
    """From the fewest bits per weight to the first that loses nothing."""
    x = setting.observed(_input(layers))
    held = sum(layer.weight.nbytes for layer in layers)
    for codec in CODECS:
        coded = [setting.weights.rounded(layer.name, layer.weight, codec) for layer in layers]
        memory_bytes = sum(quantized.nbytes for quantized in coded) - held
        for multiply in _products(x.dtype, setting):
            error = error_of(layers, codec, multiply, setting)
            work = _work(layers, codec, multiply or x.dtype)
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
    """Relative errors of the layers' outputs, as root of the sum of squares: of weights rounded to
    nearest, or of the `refined` ones, and of the products' dtype."""
    weights, source = setting.weights, _input(layers)
    code = weights.refined if refined else weights.rounded
    x, total = setting.observed(source), 0.0

    def of_weight(layer: Layer) -> float:
        coded = code(layer.name, layer.weight, codec)
        return _output_error(x, layer.weight, coded.dequantize())

    for layer in layers:
        known = (source, layer.name, codec, refined)
        total += weights.memo(known, functools.partial(of_weight, layer)) ** 2
        if multiply is not None:
            rounding = functools.partial(_rounding_error, x, layer.weight)
            total += weights.memo((source, layer.name), rounding) ** 2
    return total**0.5


def _input(layers: Sequence[Layer]) -> fx.Node:
    """What every one of the layers reads."""
    x = layers[0].out.args[0]
    assert isinstance(x, fx.Node)
    return x


def _products(dtype: torch.dtype, setting: Setting) -> tuple[torch.dtype | None, ...]:
    """The dtypes in which the products may be formed on this machine."""
    peaks = setting.target.peaks
    faster = peaks.get("bfloat16", 0) > 1.2 * peaks.get("float32", 0)
    if dtype == torch.float32 and setting.target.kind == "cpu" and faster:
        return (None, torch.bfloat16)
    return (None,)


def _output_error(x: Tensor, weight: Tensor, other: Tensor) -> float:
    """‖X (W-Ŵ)ᵀ‖ / ‖X Wᵀ‖ on up to 256 observed rows; exactly 0 for equal weights."""
    wide = weight.float()
    if torch.equal(wide, other):
        return 0.0
    rows = x.detach().float().flatten(0, -2)[:256]
    return _ratio(rows @ (wide - other).T, rows @ wide.T)


def _rounding_error(x: Tensor, weight: Tensor) -> float:
    """What bf16 products do to X Wᵀ: x is rounded, and for many rows W."""
    rows, wide = x.detach().float().flatten(0, -2)[:256], weight.float()
    rounded = wide.bfloat16().float() if len(rows) >= MANY_ROWS else wide
    whole = rows @ wide.T
    return _ratio(rows.bfloat16().float() @ rounded.T - whole, whole)


def _ratio(difference: Tensor, whole: Tensor) -> float:
    return (difference.norm() / whole.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()


def _work(layers: Sequence[Layer], codec: Codec, dtype: torch.dtype) -> Work:
    rows = 1
    for size in _input(layers).meta["val"].shape[:-1]:
        rows *= size if isinstance(size, int) else size.node.hint
    product = Gemm(
        m=rows,
        n=sum(layer.weight.shape[0] for layer in layers),
        k=layers[0].weight.shape[1],
        dtype=dtype,
        weight_bits=codec.bits,
        group_size=codec.group_size,
        scheme=codec.scheme,
    )
    return Work((product,))
