"""The CPU kernel of `ridgeline::gated_activation`, as one TVMScript function.

Law: `ridgeline.ir.gated`. A vector is 16 elements of a row; activations are formed from

    e = exp(-|x|),   σ(x) = 1 / (1 + e) for x >= 0, else e / (1 + e)        (nothing overflows)
    gelu_tanh(x) = x σ(2 √(2/π) (x + 0.044715 x³))
    erfc(z) = t p(t) exp(-z²), t = 1 / (1 + 0.3275911 z), z >= 0            (absolute error 1.5e-7)

Source of the last: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
"""

import math
from typing import Any, NamedTuple

from tvm.script import tirx as T

from ridgeline.codegen.tvm.attention_vectors import (
    LANES,
    LOG2_E,
    fma,
    kernel_helpers,
    lanes,
    registers,
    splat,
    vector,
)
from ridgeline.ir.gated import TANH_CUBIC, TANH_SCALE

TASK = 4096
"""Elements of one row that one thread takes at a time."""

_ERFC = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


class Spec(NamedTuple):
    """activation: as the op's; dtype: "float32", "bfloat16", "float16"; isa: one of `isa.ISAS`;
    parallel: whether the work is spread over threads."""

    activation: str
    dtype: str
    isa: str
    parallel: bool


def _number(value: float) -> Any:
    return splat(T.float32(value))


def _exp(x: Any) -> Any:
    """exp of x <= 0."""
    return vector("rl_exp2_fine", x * _number(LOG2_E))


def _sigmoid(x: Any) -> Any:
    """σ; NaN where x is."""
    negative = x < _number(0.0)
    e = _exp(T.Select(negative, x, _number(0.0) - x))
    part = T.Select(negative, e, _number(1.0)) / (_number(1.0) + e)
    return T.Select(x == x, part, x)


def _normal_cdf(x: Any) -> Any:
    """(1 + erf(x / √2)) / 2."""
    negative = x < _number(0.0)
    z = T.Select(negative, _number(0.0) - x, x) * _number(1 / math.sqrt(2))
    t = _number(1.0) / fma(z, _number(0.3275911), _number(1.0))
    p = _number(_ERFC[0])
    for coefficient in _ERFC[1:]:
        p = fma(p, t, _number(coefficient))
    tail = _number(0.5) * p * t * _exp(_number(0.0) - z * z)
    return T.Select(negative, tail, _number(1.0) - tail)


def _activated(x: Any, activation: str) -> Any:
    if activation == "relu":
        return T.Select(x < _number(0.0), _number(0.0), x)
    if activation == "gelu":
        return x * _normal_cdf(x)
    if activation == "gelu_tanh":
        cubic = fma(x * x, _number(2 * TANH_SCALE * TANH_CUBIC), _number(2 * TANH_SCALE))
        return x * _sigmoid(x * cubic)
    return _sigmoid(x) if activation == "sigmoid" else x * _sigmoid(x)


def build(spec: Spec) -> Any:
    """main(gate, up, y): [outer, rows, n], last dimension contiguous, y wholly contiguous."""
    dtype = spec.dtype
    loop = T.parallel if spec.parallel else T.serial

    @T.inline
    def store(y, o, r, column, value):
        if dtype == "float32":
            y[o, r, lanes(column)] = value
        else:
            y[o, r, lanes(column)] = T.Cast(f"{dtype}x16", value)

    @T.inline
    def chunk(gate, up, y, o, r, column):
        x = registers((LANES,))
        u = registers((LANES,))
        x[lanes(0)] = vector(f"rl_load_{dtype}_16", T.address_of(gate[o, r, column]))
        u[lanes(0)] = vector(f"rl_load_{dtype}_16", T.address_of(up[o, r, column]))
        store(y, o, r, column, _activated(x[lanes(0)], spec.activation) * u[lanes(0)])

    @T.inline
    def rest(gate, up, y, o, r, column, count):
        """Fewer than 16 elements."""
        x = registers((LANES,))
        x[lanes(0)] = splat(T.float32(0))
        for i in T.serial(count):
            x[i] = T.Cast("float32", gate[o, r, column + i])
        x[lanes(0)] = _activated(x[lanes(0)], spec.activation)
        for i in T.serial(count):
            y[o, r, column + i] = T.Cast(dtype, x[i] * T.Cast("float32", up[o, r, column + i]))

    @T.prim_func(s_tir=True)
    def main(gate_: T.handle, up_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        outer, rows, n = T.int64(), T.int64(), T.int64()
        shape = T.meta_var((outer, rows, n))
        gate = T.match_buffer(
            gate_, shape, dtype, strides=(T.int64(), T.int64(), T.int64(1)), align=1
        )
        up = T.match_buffer(up_, shape, dtype, strides=(T.int64(), T.int64(), T.int64(1)), align=1)
        y = T.match_buffer(y_, shape, dtype, align=1)
        with T.attr(0, "pragma_import_llvm", kernel_helpers(spec.isa)):
            tasks = T.meta_var((n + TASK - 1) // TASK)
            for task in loop(outer * rows * tasks):
                o = T.meta_var(task // tasks // rows)
                r = T.meta_var(task // tasks % rows)
                first = T.meta_var(task % tasks * TASK)
                last = T.meta_var(T.min(n, task % tasks * TASK + TASK))
                for c in T.serial((last - first) // LANES):
                    chunk(gate, up, y, o, r, first + c * LANES)
                if (last - first) % LANES != 0:
                    full = T.meta_var((last - first) // LANES * LANES)
                    rest(gate, up, y, o, r, first + full, last - first - full)

    return main
