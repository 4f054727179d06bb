"""Coefficients of the rational function that come near a given function.

Law: over |x| <= reach, the P/Q with the least largest error, where

    P(x) = sum_{i<=m} a_i x^i,   Q(x) = 1 + sum_{i<=n, i even} b_i x^i,   b_i >= 0

With these b the three forms of `ridgeline.ir.group_rational` are one function without poles, so
the fit serves each of them. Odd powers of |x| would gain nothing for the functions listed here.

Method: Sanathanan and Koerner's iteration (least squares on (P - f Q) / Q', Q' the last Q) under
Lawson's reweighting, which turns least squares into minimax; each step is a bounded linear
least-squares problem. The error is measured on the grid of 1001 Chebyshev nodes that is fitted.
Source: Sanathanan and Koerner (1963); Lawson (1961).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.ir.errors import RidgelineError

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}

_NODES, _PLAIN_STEPS, _STEPS = 1001, 20, 200
_NOTHING = 1e-13  # the rounding of the linear problems


class FitError(RidgelineError, ValueError):
    """A function that no rational function can be fitted to as asked."""


@dataclass(frozen=True, slots=True)
class Fit:
    """a (m + 1 numbers), b (n numbers); error: the largest of |P/Q - f| over |x| <= reach."""

    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    error: float
    reach: float


@functools.lru_cache(maxsize=64)
def fit(
    function: str | Callable[[Tensor], Tensor], m: int = 5, n: int = 4, reach: float = 3.0
) -> Fit:
    """Fit a rational function of degrees m >= 0 and n >= 0 over |x| <= reach.

    function: a name in FUNCTIONS, or a function of a float64 tensor, elementwise.
    Raises FitError for an unknown name, a bad degree or reach, or values that are not finite.
    """
    if isinstance(function, str):
        if function not in FUNCTIONS:
            raise FitError(
                f"expected a function or one of {', '.join(FUNCTIONS)}; found {function!r}"
            )
        function = FUNCTIONS[function]
    if m < 0 or n < 0 or not 0 < reach < float("inf"):
        raise FitError(f"expected m, n >= 0 and a finite reach > 0; found {m}, {n} and {reach}")
    # Both in units of the reach, where powers stay within 1.
    nodes = np.cos(np.pi * (np.arange(_NODES) + 0.5) / _NODES)
    values = function(torch.from_numpy(nodes * reach)).detach().numpy()
    if values.shape != nodes.shape or not np.isfinite(values).all():
        raise FitError("expected a function that is finite and elementwise over the whole reach")
    a, b, error = _minimax(nodes, values, m, n)
    a, b = (np.where(np.abs(c) < _NOTHING, 0.0, c) for c in (a, b))
    return Fit(
        tuple(float(value / reach**i) for i, value in enumerate(a)),
        tuple(float(value / reach**i) for i, value in enumerate(b, start=1)),
        error,
        reach,
    )


def _minimax(
    x: np.ndarray, values: np.ndarray, m: int, n: int
) -> tuple[np.ndarray, np.ndarray, float]:
    from scipy.optimize import lsq_linear

    even = np.arange(2, n + 1, 2)
    top, bottom = x[:, None] ** np.arange(m + 1), x[:, None] ** even
    system = np.concatenate((top, -values[:, None] * bottom), axis=1)
    least = np.concatenate((np.full(m + 1, -np.inf), np.zeros(len(even))))
    denominators, weights = np.ones_like(x), np.full_like(x, 1 / len(x))
    best = (np.zeros(m + 1), np.zeros(n), np.inf)
    for step in range(_STEPS):
        scale = np.sqrt(weights) / denominators
        solution = lsq_linear(
            system * scale[:, None], values * scale, bounds=(least, np.inf), method="bvls"
        ).x
        denominators = 1 + bottom @ solution[m + 1 :]
        errors = np.abs(top @ solution[: m + 1] / denominators - values)
        if errors.max() < best[2]:
            b = np.zeros(n)
            b[even - 1] = solution[m + 1 :]
            best = (solution[: m + 1], b, float(errors.max()))
        if errors.max() <= 1e-14 * max(1.0, np.abs(values).max()):
            break
        if step >= _PLAIN_STEPS:
            weights = weights * np.sqrt(errors / errors.max() + 1e-12)
            weights /= weights.sum()
    return best
