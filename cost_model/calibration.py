"""Fitted constants, residuals and intervals by group of operators and machine: `calibration.json`.

    ln seconds = ln total(law(constants, machine, shape)) + Σ wᵢ exp(-|x - cᵢ|² / 2) + w₀

groups: key -> {law, constants, interval, machines: name -> {constants, interval, residual}}, where
the group's own constants and interval hold for a machine that was not measured.
"""

import functools
import json
from collections.abc import Mapping
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
                name: {k: np.asarray(v) for k, v in own["residual"].items()}
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

    def parts(
        self, group: shapes.Group, name: str, machine: Mapping[str, Any], s: Mapping[str, Any]
    ) -> tuple[Any, Any, Any]:
        """(fixed, compute, memory) seconds of the law; arrays for arrays."""
        fitted = self.groups[self.nearest(group)]
        return laws.LAWS[group.law](fitted["machines"].get(name, fitted)["constants"], machine, s)

    def residual(
        self, group: shapes.Group, name: str, machine: Mapping[str, Any], s: Mapping[str, Any]
    ) -> Any:
        """What a measured machine adds to ln seconds; 0.0 for another."""
        residual = self.residuals[self.nearest(group)].get(name)
        if residual is None:
            return 0.0
        return smooth(residual, shapes.features(group.law, _flat(s), _flat(machine)))

    def log_seconds(
        self, group: shapes.Group, name: str, machine: Mapping[str, Any], s: Mapping[str, Any]
    ) -> Any:
        """ln seconds; arrays for arrays."""
        parts = self.parts(group, name, machine, s)
        return np.log(laws.total(parts)) + self.residual(group, name, machine, s)

    def interval(self, group: shapes.Group, name: str) -> tuple[float, float]:
        """(5 %, 95 %) quantiles of ln(measured / predicted)."""
        fitted = self.groups[self.nearest(group)]
        below, above = fitted["machines"].get(name, fitted)["interval"]
        return below, above


def _flat(s: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v[..., 0] if np.ndim(v) > 1 else v for k, v in s.items()}


def smooth(residual: Mapping[str, np.ndarray], at: tuple[Any, ...]) -> Any:
    """Σ wᵢ exp(-|x - cᵢ|² / 2) + w₀, with x in units of `scale`: ridge regression on Gaussians."""
    numbers = all(np.ndim(a) == 0 for a in at)  # the general way takes 30 us
    x = (np.array(at) if numbers else np.stack(np.broadcast_arrays(*at), -1)) / residual["scale"]
    c = residual["centres"]
    square = (x * x).sum(-1)[..., None] + residual["norms"] - 2 * (x @ c.T)
    return np.exp(-0.5 * square) @ residual["weights"] + residual["offset"]


@functools.cache
def calibration() -> Model:
    """The constants that ridgeline ships."""
    return Model(json.loads(CALIBRATION.read_text(encoding="utf-8")))
