"""Work of elementwise chains: as Inductor's one fused loop runs them, and as our kernels do.

Both sides read each operand and write each result once, for Inductor fuses a chain; what differs
is the number of vector operations per element, and what a kernel of ours keeps out of the loops
around it. The operations are counts of instructions times what one costs beside an addition.
"""

import torch

from ridgeline.cost_model.work import Stream, Work

_FUSED = {"silu": 60, "sigmoid": 60, "relu": 4, "gelu": 60, "gelu_tanh": 70}
_OURS = {"silu": 24, "sigmoid": 24, "relu": 3, "gelu": 40, "gelu_tanh": 30}


def gated_before(elements: int, dtype: torch.dtype, activation: str) -> Work:
    """act(gate) * up of `elements` elements in Inductor's loop."""
    return _gated(elements, dtype, _FUSED[activation])


def gated_after(elements: int, dtype: torch.dtype, activation: str) -> Work:
    """The same in `ridgeline::gated_activation`."""
    return _gated(elements, dtype, _OURS[activation])


def _gated(elements: int, dtype: torch.dtype, each: int) -> Work:
    moved = elements * dtype.itemsize
    return Work((Stream(2 * moved, moved, each * elements, dtype),))


def rotary_before(elements: list[int], angle_bytes: int, dtype: torch.dtype) -> Work:
    """Each turned tensor a loop of its own, as Inductor runs them."""
    size = dtype.itemsize
    return Work(tuple(Stream(n * size + angle_bytes, n * size, 40 * n, dtype) for n in elements))


def rotary_after(
    elements: list[int], angle_bytes: int, dtype: torch.dtype, *, copied: int
) -> Work:
    """All in one call; `copied` elements are read once more by what stores them in a cache."""
    moved = sum(elements) * dtype.itemsize
    turned = Stream(moved + angle_bytes, moved, 4 * sum(elements), dtype)
    again = Stream(copied * dtype.itemsize, 0.0, 0, dtype)
    return Work((turned, again) if copied else (turned,))
