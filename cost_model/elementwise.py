"""Functions of numbers or arrays: a law is written once, and one shape costs no array's overhead.

numpy takes about 1 us for a function of one number, `math` a tenth of it.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Numbers = Any  # a float or an array that broadcasts with the others
_NUMBER = (float, int)  # a union of types would be made anew in every call


def functions(x: Numbers) -> tuple[Callable[[Numbers], Numbers], Callable[[Numbers], Numbers]]:
    """(ceil, log2) for arguments of the kind of `x`, which many calls then need not ask for."""
    return (math.ceil, math.log2) if isinstance(x, _NUMBER) else (np.ceil, np.log2)


def ceil(x: Numbers) -> Numbers:
    return math.ceil(x) if isinstance(x, _NUMBER) else np.ceil(x)


def floor(x: Numbers) -> Numbers:
    return math.floor(x) if isinstance(x, _NUMBER) else np.floor(x)


def log2(x: Numbers) -> Numbers:
    return math.log2(x) if isinstance(x, _NUMBER) else np.log2(x)


def largest(a: Numbers, b: Numbers) -> Numbers:
    if isinstance(a, _NUMBER) and isinstance(b, _NUMBER):
        return a if a > b else b
    return np.maximum(a, b)


def least(a: Numbers, b: Numbers) -> Numbers:
    if isinstance(a, _NUMBER) and isinstance(b, _NUMBER):
        return a if a < b else b
    return np.minimum(a, b)


def choose(condition: Numbers, a: Numbers, b: Numbers) -> Numbers:
    """`a` where the condition holds, else `b`."""
    if isinstance(condition, bool | np.bool_):
        return a if condition else b
    return np.where(condition, a, b)


def root4(a: Numbers, b: Numbers) -> Numbers:
    """(a⁴ + b⁴)^¼: nearly the larger of the two."""
    a, b = a * a, b * b
    return (a * a + b * b) ** 0.25


def sharp(a: Numbers, b: Numbers) -> Numbers:
    """(a⁸ + b⁸)^⅛: the larger of the two but for a narrow passage, as where a board's clock sinks
    once its power is reached."""
    a, b = (a * a) ** 2, (b * b) ** 2
    if isinstance(a, _NUMBER) and isinstance(b, _NUMBER):
        return (a * a + b * b) ** 0.125
    # numpy's powers take five times as long, and a Python number is converted in each operation.
    return np.sqrt(np.sqrt(np.hypot(a, np.asarray(b))))
