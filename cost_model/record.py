"""Predicted against measured: a log of every benchmark on this machine, kept in the cache folder.

One JSON line per measurement in ``predictions.jsonl``: when, target, kind of kernel, what,
predicted and measured seconds. `ridgeline calibrate --show` summarises it. It holds at most LARGEST
bytes: the older half goes when it is full. ``RIDGELINE_PREDICTION_LOG=0`` keeps nothing. A log that
cannot be written costs the log, not the benchmark.
"""

import json
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ridgeline.ir.cache_dir import cache_dir

log = logging.getLogger(__name__)
SWITCH = "RIDGELINE_PREDICTION_LOG"
LARGEST = 1 << 19


@dataclass(frozen=True, slots=True)
class Entry:
    """when: seconds since 1970; kind: of the kernel that takes most of the time; what: operation,
    shape and contender; predicted, measured: seconds."""

    when: float
    target: str
    kind: str
    what: str
    predicted: float
    measured: float


def log_path() -> Path:
    """Where the log is."""
    return cache_dir() / "predictions.jsonl"


def append(target: str, kind: str, what: str, predicted: float, measured: float) -> None:
    """Add a line, unless the log is switched off."""
    if os.environ.get(SWITCH) == "0":
        return
    path = log_path()
    line = json.dumps(asdict(Entry(time.time(), target, kind, what, predicted, measured)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > LARGEST:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[len(lines) // 2 :]), encoding="utf-8")
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        log.warning("a measurement isn't logged: %s", error)


def entries() -> Iterable[Entry]:
    """The log, oldest first; lines that are none are left out and said."""
    try:
        lines = log_path().read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield Entry(**json.loads(line))
        except (ValueError, TypeError):
            log.warning("%s: not a line of this log: %.60s", log_path(), line)
