"""Scores of attention as vectors: what a product, a cap and a sink come to, in a kernel's units."""

from typing import Any

from tvm.script import tirx as T

from ridgeline.codegen.tvm.attention_vectors import LOG2_E, LOWEST, Spec, fma, splat


def sink_score(spec: Spec, entry: Any) -> Any:
    """A sink in the units of `Spec.natural`, as the maximum that a row starts from."""
    score = T.Cast("float32", entry)
    if not spec.natural:
        score = score * T.float32(LOG2_E)
    return T.max(score, T.float32(LOWEST))


def sink_total(entry: Any) -> Any:
    """The sum that a row starts from: a sink of -inf is none."""
    present = T.Cast("float32", entry) >= T.float32(LOWEST)
    return T.Select(present, T.float32(1), T.float32(0))


def cap_of(spec: Spec, cap: Any) -> Any:
    """The cap in the units of `Spec.natural`."""
    return cap if spec.natural else cap * T.float32(LOG2_E)


def factor_of(spec: Spec, scale: Any) -> Any:
    """What a product is multiplied by: what a tanh reads is in natural units."""
    return scale if spec.natural or spec.capped else scale * T.float32(LOG2_E)


def scores(spec: Spec, x: Any, products: Any, bias: Any = None) -> Any:
    """factor q·k + bias, or cap tanh(factor q·k) + bias, for 16 of them."""
    if not spec.capped:
        factor = splat(x.factor)
        return products * factor if bias is None else fma(products, factor, bias)
    capped = tanh(products * splat(x.factor)) * splat(x.cap)
    return capped if bias is None else capped + bias


# Eigen's rational approximation of tanh, odd over even, with an error of a few units in the last
# place; beyond the last number tanh is 1 in fp32.
_TANH_ODD = (
    *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
    *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
)
_TANH_EVEN = (
    1.19825839466702e-06,
    1.18534705686654e-04,
    2.26843463243900e-03,
    4.89352518554385e-03,
)
_TANH_END = 7.90531110763549805


def tanh(y: Any) -> Any:
    """tanh of 16 numbers; NaN stays NaN."""
    y = T.Select(y > splat(T.float32(_TANH_END)), splat(T.float32(_TANH_END)), y)
    y = T.Select(y < splat(T.float32(-_TANH_END)), splat(T.float32(-_TANH_END)), y)
    return y * _polynomial(y * y, _TANH_ODD) / _polynomial(y * y, _TANH_EVEN)


def _polynomial(x: Any, coefficients: tuple[float, ...]) -> Any:
    """By Horner's rule, the coefficient of the highest power first."""
    value = splat(T.float32(coefficients[0]))
    for coefficient in coefficients[1:]:
        value = fma(value, x, splat(T.float32(coefficient)))
    return value
