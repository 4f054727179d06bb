"""Work of elementwise chains: in Inductor's loops, and in our kernels.

Inductor fuses a chain, so both sides read each operand and write each result once. On a CPU they
differ in vector operations per element and in calls: ours is called from Python, which costs what
a further launch or two cost. On a GPU the loops that Triton compiles are alike; ours is one call
for q and k, and no gain is claimed that no device has shown.

The operations were fitted on one core of a Zen 4 (fp32, in cache, interleaved with Inductor's code
for the same graph): 8 calls in one graph, SwiGLU of 64 x 1536 0.54 ns per element against 0.38, and
rotary of 64 positions, 12 heads of 64, 0.60 ns against 0.31. For one row of 1536 SwiGLU takes 5.3
us against 6.1: a call of ours costs one launch more. One position is turned in 12.3 us, by two
loops, against 7.6.

Activations alone stand in the ratio to a rational function that `ridgeline bench group-rational`
prints: torch's tanh, which GELU by tanh calls too, takes four times as long, its erf twice, and
what is one exponential little more; ReLU is bound by memory and gains nothing.
"""

import functools
from collections.abc import Sequence

import torch

from ridgeline.cost_model.work import Stream, Work

_INDUCTOR = {"silu": 54, "sigmoid": 54, "relu": 4, "gelu": 54, "gelu_tanh": 60}
_OURS = {"silu": 38, "sigmoid": 38, "relu": 4, "gelu": 46, "gelu_tanh": 42}
_ALONE = {"silu": 35, "sigmoid": 35, "relu": 4, "gelu": 46, "gelu_tanh": 115, "tanh": 108}
_RATIONAL = 27
_INDUCTOR_TURN, _OUR_TURN = 48, 20
_GATED_CALLS, _ROTARY_CALLS = 1, {"cpu": 1, "cuda": 2, "hip": 2}
_COMPLEX_CALLS = 2  # a view as complex and the product, both called from Inductor's code


def _calls(number: int, chain: str) -> tuple[Stream, ...]:
    """Of Python, or of code between kernels: they cost a launch each."""
    return (Stream(0.0, 0.0, chain=chain),) * number


def gated_work(
    elements: int, dtype: torch.dtype, activation: str, *, kind: str, ours: bool
) -> Work:
    """act(gate) * up of `elements` elements on a target of this kind, by our kernel or Inductor."""
    moved = elements * dtype.itemsize
    each = (_OURS if ours and kind == "cpu" else _INDUCTOR)[activation]
    calls = _calls(_GATED_CALLS if ours else 0, "gate")
    return Work((Stream(2 * moved, moved, each * elements, dtype, chain="gate"), *calls))


def activation_work(
    elements: int, dtype: torch.dtype, activation: str, *, kind: str, rational: bool
) -> Work:
    """An activation of `elements` elements on a target of this kind, as Inductor's loop or as a
    rational function of ours with degrees 5 and 4."""
    moved = elements * dtype.itemsize
    each = _RATIONAL if rational and kind == "cpu" else _ALONE[activation]
    made = Stream(moved, moved, each * elements, dtype, chain="rational")
    return Work((made, *_calls(int(rational), "rational")))


def rotary_work(
    elements: Sequence[int],
    angle_bytes: int,
    dtype: torch.dtype,
    *,
    kind: str,
    ours: bool,
    stored: int = 0,
    complex_product: bool = False,
) -> Work:
    """Turning tensors of `elements` elements by cos and sin of `angle_bytes` together.

    Inductor runs one loop per tensor, ours is one call. stored: elements that go on into a cache,
    which Inductor turns in the very loop that stores them and ours leaves to be read again.
    complex_product: Inductor calls torch's complex product, between casts of a tensor that is not
    float32.
    """
    size = dtype.itemsize
    if not ours and complex_product:
        casts = 0 if size == 4 else 2
        return Work(
            tuple(
                stream
                for n in elements
                for stream in (
                    _turn(4 * n + angle_bytes, 4 * n, _INDUCTOR_TURN * n, torch.float32),
                    *((_turn(size * n, 4 * n, 0, torch.float32),) * casts),
                    *_calls(_COMPLEX_CALLS, "rotary"),
                )
            )
        )
    if not ours:
        loops = (_turn(n * size + angle_bytes, n * size, _INDUCTOR_TURN * n, dtype)
                 for n in elements)  # fmt: skip
        return Work(tuple(loops))
    moved = sum(elements) * size
    each = _OUR_TURN if kind == "cpu" else _INDUCTOR_TURN
    turned = _turn(
        moved + angle_bytes + stored * size, moved + stored * size, each * sum(elements), dtype
    )
    return Work((turned, *_calls(_ROTARY_CALLS[kind], "rotary")))


_turn = functools.partial(Stream, chain="rotary")
