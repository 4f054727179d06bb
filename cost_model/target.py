"""A machine as numbers: `targets/*.toml`, one file per machine, one source per number.

Units are in the keys: tflops = 1e12 FLOP/s, gb = 1e9 bytes, mib/kib = 2**20/2**10 bytes, us =
1e-6 s.
Peaks are *dense* rates per dtype: the published figures with structured sparsity are twice as high
and no kernel here uses it. A number without a source string is an error, as is an unknown key.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from ridgeline.ir.errors import RidgelineError

FOLDER = Path(__file__).parent / "targets"
HOST = ("native", "cpu")
# The names under which published measurements know machines that are described under another.
ALIASES = {
    "a100_80g": "a100", "a100_sxm": "a100", "a100_80g_sxm": "a100", "a100_40g": "a100-40gb",
    "a100_40g_sxm": "a100-40gb", "h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200",
    "v100_sxm": "v100",
}  # fmt: skip
_KINDS = ("cuda", "hip", "cpu")
_TEXTS = ("name", "kind", "arch")
_NUMBERS = (
    "cores",
    "memory_gb",
    "bandwidth_gb_per_s",
    "launch_us",
    "gemm_efficiency",
    "bandwidth_efficiency",
    "attention_efficiency",
)
_GPU_NUMBERS = (
    "l2_mib",
    "l2_bandwidth_gb_per_s",
    "shared_kib_per_core",
    "eager_launch_us",
    "link_gb_per_s",
    "tdp_w",
)
_CPU_NUMBERS = ("threads", "fork_us", "spread")
_CPU_LISTS = ("cache_kib", "cache_bandwidth_gb_per_s")
_FRACTIONS = ("gemm_efficiency", "bandwidth_efficiency", "attention_efficiency")
_MAY_BE_ZERO = ("link_gb_per_s", "spread")


class UnknownTarget(RidgelineError):
    """No machine of that name is described."""


class InvalidTarget(RidgelineError):
    """A description of a machine that can't be trusted."""


@dataclass(frozen=True, slots=True)
class Refinement:
    """How the times of one kind of kernel differ from the law's, as factors; error: relative, of
    what is refined so (`ridgeline.cost_model.refine`)."""

    compute: float = 1.0
    memory: float = 1.0
    dispatch: float = 1.0
    fork: float = 1.0
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """One machine.

    kind: "cuda", "hip" or "cpu"; arch: "sm_80", "gfx942", "x86_64"; peaks: dtype name
    ("float32", "bfloat16", "int8", ...) -> dense operations per second; float32 is the vector
    unit of a GPU. cores: SMs, CUs or CPU cores. l2: the last-level cache.
    caches: (bytes, bytes/s) of a CPU's levels, innermost first; empty for a GPU.
    launch_s: the floor of one kernel inside a CUDA graph, or of one dispatched op on a CPU;
    eager_launch_s: host time per kernel launched one by one. fork_s: one parallel region of a CPU.
    link_bytes_per_s: to other devices, one direction; 0 where there is none.
    tdp_w: watts, the board's power limit; 0 for a CPU.
    *_efficiency: the fraction of the peak that good kernels reach on this product.
    spread: relative spread of a probe's repeats; 0 for published figures.
    sources: field as in the file -> where its number comes from.
    refined: kind of kernel -> what `ridgeline calibrate` measured of it; empty without.
    """

    name: str
    kind: str
    arch: str
    peaks: Mapping[str, float] = field(hash=False)
    bandwidth_bytes_per_s: float
    memory_bytes: int
    l2_bytes: int
    l2_bandwidth_bytes_per_s: float
    cores: int
    shared_bytes_per_core: int
    launch_s: float
    eager_launch_s: float
    fork_s: float
    threads: int
    link_bytes_per_s: float
    tdp_w: float
    gemm_efficiency: float
    bandwidth_efficiency: float
    attention_efficiency: float
    spread: float
    caches: tuple[tuple[int, float], ...]
    features: frozenset[str]
    sources: Mapping[str, str] = field(hash=False)
    refined: Mapping[str, Refinement] = field(default_factory=dict, hash=False)

    def peak(self, dtype: torch.dtype) -> float:
        """Dense FLOP/s for `dtype`; without a unit of its own it runs at float32's rate.

        float64 without a figure runs at half of float32's rate.
        """
        own = self.peaks.get(str(dtype).removeprefix("torch."))
        if own is not None:
            return own
        return self.peaks["float32"] / (2.0 if dtype == torch.float64 else 1.0)


def target_names() -> list[str]:
    """The machines that ridgeline describes, and "cpu" for the host's probed CPU."""
    return ["cpu", *sorted(p.stem for p in FOLDER.glob("*.toml"))]


def load_target(name_or_path: str | Path | Target) -> Target:
    """The machine called so; a path ending in .toml is the user's own description.

    "native" and "cpu" probe the host. Raises UnknownTarget (with the nearest names) and
    InvalidTarget (with file, key, what was expected and what was found).
    """
    if isinstance(name_or_path, Target):
        return name_or_path
    text = str(name_or_path)
    if text in HOST:
        from ridgeline.cost_model.probe import probe_host  # the probe builds a Target

        return probe_host()
    path = Path(text) if text.endswith(".toml") else FOLDER / f"{ALIASES.get(text, text)}.toml"
    if not path.is_file():
        names = target_names()
        near = difflib.get_close_matches(text.lower(), names, n=3, cutoff=0.4)
        raise UnknownTarget(
            f"target {text!r} is not known; "
            + (f"nearest: {', '.join(near)}; " if near else "")
            + f"expected one of {', '.join(names)}, or the path of an existing .toml file"
        )
    try:
        described = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidTarget(f"{path}: expected a TOML file, found: {error}") from error
    return parse_target(described, str(path))


def parse_target(described: Mapping[str, Any], origin: str) -> Target:
    """A Target from the keys of a target file; `origin` names the file in errors."""
    check = _Checked(described, origin)
    kind = check.text("kind")
    if kind not in _KINDS:
        check.fail("kind", f"one of {_KINDS}", kind)
    cpu = kind == "cpu"
    numbers = (*_NUMBERS, *(_CPU_NUMBERS if cpu else _GPU_NUMBERS))
    lists = _CPU_LISTS if cpu else ()
    check.only({*_TEXTS, *numbers, *lists, "features", "peaks_tflops", "source"})
    n = {key: check.number(key) for key in numbers}
    if n["cores"] < 1 or n["cores"] % 1:
        check.fail("cores", "an integer of at least 1", n["cores"])
    peaks = check.peaks()
    sizes, speeds = (check.numbers(key) for key in _CPU_LISTS) if cpu else ((), ())
    if len(sizes) != len(speeds):
        check.fail("cache_bandwidth_gb_per_s", f"{len(sizes)} numbers, as cache_kib", len(speeds))
    caches = tuple((int(s * 1024), b * 1e9) for s, b in zip(sizes, speeds, strict=True))
    bandwidth = n["bandwidth_gb_per_s"] * 1e9
    l2_bytes, l2_bandwidth = caches[-1] if cpu else (0, 0.0)
    if not cpu:
        l2_bytes, l2_bandwidth = int(n["l2_mib"] * 2**20), n["l2_bandwidth_gb_per_s"] * 1e9
    launch = n["launch_us"] * 1e-6
    return Target(
        name=check.text("name"),
        kind=kind,
        arch=check.architecture(kind),
        peaks=peaks,
        bandwidth_bytes_per_s=bandwidth,
        memory_bytes=int(n["memory_gb"] * 1e9),
        l2_bytes=l2_bytes,
        l2_bandwidth_bytes_per_s=l2_bandwidth,
        cores=int(n["cores"]),
        shared_bytes_per_core=0 if cpu else int(n["shared_kib_per_core"] * 1024),
        launch_s=launch,
        eager_launch_s=launch if cpu else n["eager_launch_us"] * 1e-6,
        fork_s=n["fork_us"] * 1e-6 if cpu else 0.0,
        threads=int(n["threads"]) if cpu else 0,
        link_bytes_per_s=0.0 if cpu else n["link_gb_per_s"] * 1e9,
        tdp_w=0.0 if cpu else n["tdp_w"],
        gemm_efficiency=n["gemm_efficiency"],
        bandwidth_efficiency=n["bandwidth_efficiency"],
        attention_efficiency=n["attention_efficiency"],
        spread=n["spread"] if cpu else 0.0,
        caches=caches,
        features=check.features(),
        sources=check.sources((*numbers, *lists), peaks),
    )


_LEAST, _MOST = 1e-6, 1e9
"""No machine's figure lies outside; what laws divide by and raise to powers stays a number."""
_ARCHITECTURES = {"cuda": (r"sm_\d{2,3}", "'sm_90'"), "hip": (r"gfx[0-9a-f]{3,4}", "'gfx942'")}


class _Checked:
    """Typed access to a target file, with errors that name file, key, expected and found."""

    def __init__(self, described: Mapping[str, Any], origin: str) -> None:
        self.described, self.origin = described, origin

    def fail(self, key: str, expected: str, found: object) -> NoReturn:
        shown = "nothing" if found is None else repr(found)
        raise InvalidTarget(f"{self.origin}: key {key!r}: expected {expected}, found {shown}")

    def only(self, known: set[str]) -> None:
        for key in self.described:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                self.fail(key, f"one of {', '.join(sorted(known))}{hint}", self.described[key])

    def get(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        if key not in self.described:
            self.fail(key, expected, None)
        value = self.described[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            self.fail(key, expected, value)
        return value

    def architecture(self, kind: str) -> str:
        found = self.text("arch")
        pattern, such_as = _ARCHITECTURES.get(kind, (".+", "'x86_64'"))
        if not re.fullmatch(pattern, found):
            self.fail("arch", f"a name such as {such_as}", found)
        return found

    def text(self, key: str) -> str:
        return self.get(key, str, "a string")

    def positive(self, key: str, value: Any) -> float:
        zero = key in _MAY_BE_ZERO
        low_enough = key not in _FRACTIONS or (isinstance(value, int | float) and value <= 1)
        usable = isinstance(value, int | float) and not isinstance(value, bool) and low_enough
        if not usable or not (0 < value < float("inf") or (zero and value == 0)):
            limit = " of at most 1" if key in _FRACTIONS else ""
            self.fail(key, f"a {'non-negative' if zero else 'positive'} number{limit}", value)
        if value and not _LEAST <= value <= _MOST:
            self.fail(key, f"a number from {_LEAST:g} to {_MOST:g}", value)
        return float(value)

    def number(self, key: str) -> float:
        return self.positive(key, self.get(key, (int, float), "a number"))

    def numbers(self, key: str) -> tuple[float, ...]:
        values = self.get(key, list, "a list of numbers")
        if not values:
            self.fail(key, "at least one number", values)
        return tuple(self.positive(key, v) for v in values)

    def peaks(self) -> dict[str, float]:
        table = self.get("peaks_tflops", dict, "a table of dense peaks by dtype")
        for dtype in table:
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                self.fail(f"peaks_tflops.{dtype}", "a torch dtype such as 'bfloat16'", dtype)
        if "float32" not in table:
            self.fail("peaks_tflops.float32", "the vector unit's rate", None)
        return {d: self.positive(f"peaks_tflops.{d}", v) * 1e12 for d, v in table.items()}

    def features(self) -> frozenset[str]:
        found = self.get("features", list, "a list of strings")
        if not all(isinstance(f, str) for f in found):
            self.fail("features", "a list of strings", found)
        return frozenset(found)

    def sources(self, keys: tuple[str, ...], peaks: Mapping[str, float]) -> dict[str, str]:
        given = dict(self.get("source", dict, "a table: key -> where its number comes from"))
        for dtype, text in dict(given.pop("peaks_tflops", {})).items():
            given[f"peaks_tflops.{dtype}"] = text
        needed = {*keys, *(f"peaks_tflops.{d}" for d in peaks)}
        for key in sorted(needed):
            if not (isinstance(given.get(key), str) and given[key].strip()):
                self.fail(f"source.{key}", "a string: where the number comes from", given.get(key))
        for key in given:
            if key not in needed:
                self.fail(f"source.{key}", "the key of a number in this file", given[key])
        return given
