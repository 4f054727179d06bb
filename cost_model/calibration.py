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
        self, group: shapes.Group, name: str, machine: Mapping[str, Any], s: Mapping[str, Any]
    ) -> Any:
        """What a measured machine adds to ln seconds; 0.0 for another."""
        residual = self._trees(group, name)
        if residual is None:
            return 0.0
        if any(isinstance(v, np.ndarray) for v in s.values()):
            s, machine = _flat(s), _flat(machine)
        return of_trees(residual, shapes.features(group.law, s, machine))

    def _trees(self, group: shapes.Group, name: str) -> Mapping[str, np.ndarray] | None:
        return self.residuals[self.nearest(group)].get(name)

    def factor(
        self,
        group: shapes.Group,
        name: str,
        machine: Mapping[str, float],
        s: Mapping[str, float],
        seconds: float,
    ) -> float:
        """exp(residual), by which the law's `seconds` of one kernel are multiplied: trees know no
        physics, so they bring no kernel below its roof."""
        trees = self._trees(group, name)
        if trees is None:
            return 1.0
        log = of_trees(trees, shapes.features(group.law, s, machine))
        if log >= 0.0:
            return math.exp(log)
        return max(math.exp(log), min(laws.roof(group.law, machine, s) / seconds, 1.0))

    def log_seconds(
        self, group: shapes.Group, name: str, machine: Mapping[str, Any], s: Mapping[str, Any]
    ) -> Any:
        """ln seconds; arrays for arrays."""
        parts = self.parts(group, name, machine, s)
        return np.log(laws.total(parts)) + self.residual(group, name, machine, s)

    def interval(self, group: shapes.Group, name: str, bound: int) -> tuple[float, float]:
        """(5 %, 95 %) quantiles of ln(measured / predicted); bound: the largest of the parts."""
        fitted = self.groups[self.nearest(group)]
        below, above = fitted["machines"].get(name, fitted)["interval"][bound]
        return below, above


def _arrays(residual: Mapping[str, Any]) -> dict[str, np.ndarray]:
    found = {k: np.asarray(v) for k, v in residual.items()}
    trees, leaves = found["values"].shape if found["values"].size else (0, 1)
    # Leaves of all trees in one row: where each tree's begin, and what an answer adds to that.
    found["begin"] = np.arange(trees) * leaves
    found["weights"] = leaves >> np.arange(1, leaves.bit_length())
    found["values"] = found["values"].ravel()
    return found


def _flat(s: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v[..., 0] if np.ndim(v) > 1 else v for k, v in s.items()}


def of_trees(residual: Mapping[str, np.ndarray], at: tuple[Any, ...]) -> Any:
    """The trees' sum at features `at`, numbers or arrays of one shape."""
    if not len(residual["begin"]):
        return float(residual["offset"])
    alone = isinstance(at[0], float)
    x = np.array(at) if alone else np.stack(np.broadcast_arrays(*at), -1)
    answers = x[..., residual["features"]] > residual["cuts"]
    leaf = answers @ residual["weights"] + residual["begin"]
    return residual["values"][leaf].sum(-1) + residual["offset"]


@functools.cache
def calibration() -> Model:
    """The constants that ridgeline ships."""
    return Model(json.loads(CALIBRATION.read_text(encoding="utf-8")))
