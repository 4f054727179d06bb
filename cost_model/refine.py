"""Measured times of kernels refine a CPU target, kind by kind of kernel.

    t = dispatch e^β + fork e^δ + smoothmax(compute e^α, memory e^γ)

minimises sum of huber(ln(measured / t)) + PRIOR (α² + β² + γ² + δ²) / 2: few measurements leave the
law as it stands, many correct it. Each kind is refined as a whole, whoever's kernel it is, so that
what is known of two kernels' ratio stays known. A call of each kind does more on the way than a
dispatch does, and wakes the threads from another amount of work on. error: median
|ln(measured / t)| with the measurement at hand left out of the fit, at least ERROR_FLOOR.
"""

import functools
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from ridgeline.cost_model.target import InvalidTarget, Refinement, Target

PRIOR = 0.02
"""A factor of e costs as much as a misfit of exp(sqrt(0.02)) of one measurement, 15 %. On two Zen 5
cores measurements left out are predicted alike from 0.005 to 0.03, and worse above."""
HUBER = 0.2
ERROR_FLOOR = 0.05
POOLED = "elementwise"
FEWEST = 4
"""Measurements of a kind below which it stays as it is."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A kernel's parts as the unrefined law has them, and what it took, in seconds."""

    kind: str
    name: str
    compute: float
    memory: float
    dispatch: float
    fork: float
    measured: float

    def predicted(self, refinement: Refinement | None = None) -> float:
        """Seconds by the law, refined or not."""
        r = refinement or Refinement()
        busy = np.array([self.compute * r.compute, self.memory * r.memory])
        top = float(busy.max())
        smooth = top * float(((busy / top) ** 4).sum() ** 0.25) if top else 0.0
        return self.dispatch * r.dispatch + self.fork * r.fork + smooth


def refine(measurements: Sequence[Measurement]) -> dict[str, Refinement]:
    """A refinement for every kind with at least FEWEST measurements, and one for all elementwise
    chains, by which those are predicted that nobody measured."""
    kinds: dict[str, list[Measurement]] = {}
    for m in measurements:
        pooled = m.kind.partition(" ")[0] == POOLED
        for kind in dict.fromkeys((m.kind, POOLED) if pooled else (m.kind,)):
            kinds.setdefault(kind, []).append(m)
    return {kind: _with_error(of) for kind, of in kinds.items() if len(of) >= FEWEST}


def left_out(of: Sequence[Measurement]) -> list[float]:
    """Seconds predicted for each measurement of one kind by what the others of it are fitted to."""
    fits = (_fitted([m for m in of if m is not out]) for out in of)
    return [m.predicted(r) for m, r in zip(of, fits, strict=True)]


def _with_error(of: Sequence[Measurement]) -> Refinement:
    errors = [
        abs(math.log(m.measured / seconds)) for m, seconds in zip(of, left_out(of), strict=True)
    ]
    fitted = _fitted(of)
    return replace(fitted, error=max(ERROR_FLOOR, statistics.median(errors)))


def _fitted(of: Sequence[Measurement]) -> Refinement:
    def residuals(x: np.ndarray) -> np.ndarray:
        r = Refinement(*(float(v) for v in np.exp(x)))
        logs = [math.log(m.measured / m.predicted(r)) for m in of]
        return np.array([*logs, *(math.sqrt(PRIOR) * x)])

    x = least_squares(residuals, np.zeros(4), loss="huber", f_scale=HUBER).x
    return Refinement(*(float(v) for v in np.exp(x)))


def to_json(refinements: Mapping[str, Refinement], base: Target) -> str:
    """A file's text; `base` is the unrefined target that was measured against."""
    return json.dumps(
        {
            "base": _figures(base),
            "laws": _laws(),
            "kinds": {k: asdict(r) for k, r in refinements.items()},
        },
        indent=1,
    )


def read(file: Path, base: Target) -> dict[str, Refinement]:
    """Refinements of `base`; {} where there is no file, or it corrects other figures or laws.

    Raises InvalidTarget for a file that is no such text.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kinds = found["kinds"].items()
        holds = found["base"] == _figures(base) and found.get("laws") == _laws()
        return {kind: Refinement(**r) for kind, r in kinds} if holds else {}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidTarget(
            f"{file}: expected what `ridgeline calibrate` wrote, found {error!r}; run it again"
        ) from error


@functools.cache
def _laws() -> str:
    """Of the code of the laws that are refined: factors on one are none on another."""
    folder = Path(__file__).parent
    code = b"".join((folder / name).read_bytes() for name in ("cpu_time.py", "cpu_attention.py"))
    return hashlib.blake2b(code, digest_size=8).hexdigest()


def _figures(base: Target) -> list[float]:
    """What a refinement corrects: it holds for these."""
    speeds = [speed for _, speed in base.caches]
    return [
        *base.peaks.values(), *speeds, base.bandwidth_bytes_per_s, base.launch_s, base.fork_s,
        float(base.threads),
    ]  # fmt: skip
