"""Fitted constants, residuals and intervals by group of operators and machine: `calibration.json`.

    ln seconds = ln total(law(constants, machine, shape)) + residual(features of the shape)

and no less than the kernel's roof where the residual is what brings it there.

groups: key -> {law, constants, interval, machines: name -> {constants, interval, residual}}, where
the group's own constants and interval hold for a machine that was not measured. An interval is one
pair of logarithms for each of the parts that may be the largest. A residual is a sum of symmetric
trees (`tools/boosted_trees.py`): features and cuts [tree, depth], values [tree, leaf], offset.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.cost_model import laws, shapes

CALIBRATION = Path(__file__).parent / "calibration.json"
_BITS = 8  # of a byte


class Model:
    """The laws with the constants of a calibration; see `calibration.json` for its layout."""

    def __init__(self, calibration: Mapping[str, Any]) -> None:
        self.groups = calibration["groups"]
        self.residuals = {
            key: {
                name: _arrays(own["residual"])
                for name, own in group["machines"].items()
                if own.get("residual")
            }
            for key, group in self.groups.items()
        }

    def nearest(self, group: shapes.Group) -> str:
        """The group's key, or, for a dtype that nobody measured, that of the same operator."""
        if group.key in self.groups:
            return group.key
        stem = group.key.split(".")[0]
        same = [k for k in self.groups if k.split(".")[0] == stem]
        return (
            same[0] if same else next(k for k in self.groups if self.groups[k]["law"] == group.law)
        )

    def constants(self, group: shapes.Group, name: str) -> Sequence[float]:
        """Of the law: the machine's own, or those of a machine that was not measured."""
        fitted = self.groups[self.nearest(group)]
        return fitted["machines"].get(name, fitted)["constants"]

    def parts(
        self, group: shapes.Group, name: str, machine: Mapping[str, Any], s: Mapping[str, Any]
    ) -> tuple[Any, Any, Any]:
        """(fixed, compute, memory) seconds of the law; arrays for arrays."""
        return laws.LAWS[group.law](self.constants(group, name), machine, s)

    def residual(
        self,
        group: shapes.Group,
        name: str,
        machine: Mapping[str, Any],
        s: Mapping[str, Any],
        parts: tuple[Any, Any, Any],
    ) -> Any:
        """What a measured machine adds to ln seconds; 0.0 for another."""
        residual = self._trees(group, name)
        if residual is None:
            return 0.0
        return of_trees(residual, features(group, machine, s, parts))

    def _trees(self, group: shapes.Group, name: str) -> Mapping[str, np.ndarray] | None:
        return self.residuals[self.nearest(group)].get(name)

    def factor(
        self,
        group: shapes.Group,
        name: str,
        machine: Mapping[str, float],
        s: Mapping[str, float],
        parts: tuple[float, float, float],
        seconds: float,
    ) -> float:
        """exp(residual), by which the law's `seconds` of one kernel are multiplied: trees know no
        physics, so they bring no kernel below its roof. seconds: the total of `parts`."""
        trees = self._trees(group, name)
        if trees is None:
            return 1.0
        log = of_trees(trees, shapes.features(group.law, s, machine, parts))
        if log >= 0.0:
            return math.exp(log)
        return max(math.exp(log), min(laws.roof(group.law, machine, s) / seconds, 1.0))

    def log_seconds(
        self, group: shapes.Group, name: str, machine: Mapping[str, Any], s: Mapping[str, Any]
    ) -> Any:
        """ln seconds; arrays for arrays."""
        parts = self.parts(group, name, machine, s)
        return np.log(laws.total(parts)) + self.residual(group, name, machine, s, parts)

    def interval(self, group: shapes.Group, name: str, bound: int) -> tuple[float, float]:
        """(5 %, 95 %) quantiles of ln(measured / predicted); bound: the largest of the parts."""
        fitted = self.groups[self.nearest(group)]
        below, above = fitted["machines"].get(name, fitted)["interval"][bound]
        return below, above


def _arrays(residual: Mapping[str, Any]) -> dict[str, np.ndarray]:
    values = np.asarray(residual["values"], float)
    trees, leaves = values.shape if values.size else (0, 1)
    # A tree's answers are the last bits of one byte: numpy packs these at once. What comes before
    # them is never answered with yes.
    before = ((0, 0), (_BITS - (leaves.bit_length() - 1), 0))
    asked = np.asarray(residual["features"], int).reshape(trees, leaves.bit_length() - 1)
    cuts = np.asarray(residual["cuts"], float).reshape(asked.shape)
    return {
        "offset": np.asarray(residual["offset"], float),
        "features": np.pad(asked, before).ravel(),
        "cuts": np.pad(cuts, before, constant_values=np.inf).ravel(),
        "values": values.ravel(),
        "begin": np.arange(trees) * leaves,
    }


def features(
    group: shapes.Group,
    machine: Mapping[str, Any],
    s: Mapping[str, Any],
    parts: tuple[Any, Any, Any],
) -> tuple[Any, ...]:
    """Those of `shapes.features`, of arrays whose last axis is for a product's candidates too."""
    return shapes.features(group.law, _flat(s), _flat(machine), parts)


def _flat(s: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v[..., 0] if np.ndim(v) > 1 else v for k, v in s.items()}


def of_trees(residual: Mapping[str, np.ndarray], at: tuple[Any, ...]) -> Any:
    """The trees' sum at features `at`, numbers or arrays of one shape."""
    if not len(residual["begin"]):
        return float(residual["offset"])
    alone = isinstance(at[0], float)
    x = np.array(at) if alone else np.stack(np.broadcast_arrays(*at), -1)
    leaf = np.packbits(x.take(residual["features"], -1) > residual["cuts"], -1)
    return residual["values"].take(leaf + residual["begin"]).sum(-1) + residual["offset"]


@functools.cache
def calibration() -> Model:
    """The constants that ridgeline ships."""
    return Model(json.loads(CALIBRATION.read_text(encoding="utf-8")))
