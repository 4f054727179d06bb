"""The attributes of a layer of a key/value cache: tensors, counts of tokens, and plain values.

A decode step looks at every attribute of every layer. Which of them are what is settled once per
class and kinds of values (`layout_of`), so that a step only picks them out.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ridgeline.ir.errors import RidgelineError

COUNTERS = ("cumulative_length", "cumulative_length_int")
"""Attributes in which layers count the tokens that they have seen."""


class CacheError(RidgelineError):
    """A cache whose state cannot be carried by a graph."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """tensors, plain: the layer's state -> a tuple of such values. counters: names of the counts.

    One object stands for one class, its attributes and their types: it is compared by identity.
    """

    tensors: Callable[[dict[str, Any]], tuple[Any, ...]]
    plain: Callable[[dict[str, Any]], tuple[Any, ...]]
    counters: tuple[str, ...]


_LAYOUTS: dict[tuple[Any, ...], Layout] = {}


def layout_of(layer: Any) -> Layout:
    """The layout of `layer`. Raises CacheError for one that keeps its state in a container."""
    state = vars(layer)
    key = (type(layer), *state, *map(type, state.values()))
    if key not in _LAYOUTS:
        _LAYOUTS[key] = _layout(layer)
    return _LAYOUTS[key]


def _layout(layer: Any) -> Layout:
    tensors, plain, counters = [], [], []
    for name, value in vars(layer).items():
        if isinstance(value, tuple) or type(value).__hash__ is None:  # a container, or like one
            raise CacheError(
                f"{type(layer).__name__} keeps its state in a {type(value).__name__}"
                f" ({name!r}), which a graph cannot carry; caches of full attention layers"
                " (DynamicLayer, StaticLayer) can be captured"
            )
        if isinstance(value, Tensor):
            tensors.append(name)
        elif name in COUNTERS:
            counters.append(name)
        else:
            plain.append(name)
    return Layout(_picker(tensors), _picker(plain), tuple(counters))


def _picker(names: list[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    if len(names) < 2:  # itemgetter gives no tuple for one name, and takes no fewer
        return lambda state: tuple(state[name] for name in names)
    return operator.itemgetter(*names)
