"""`python -m ridgeline.tools.fit_tensor_parallel FOLDER`: constants of the tensor-parallel laws.

Least soft-L1 loss of ln(measured / law) on some of the published rows in FOLDER
(`tokenweave_kernels.csv`, `tokenweave_prefill.csv`), kernel after kernel, then the model's. Printed
as they stand in `cost_model.all_reduce` and `cost_model.tensor_parallel`; rows that aren't fitted
are what `ridgeline.tools.tensor_parallel` reports the error on.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy.optimize import least_squares

from ridgeline.cost_model import all_reduce, tensor_parallel
from ridgeline.cost_model.all_reduce import Constants, links_of
from ridgeline.cost_model.tensor_parallel import ScheduleChoice, Stack, choose_schedule

WORLD, HIDDEN, ITEMSIZE = 8, 8192, 2
ROW = HIDDEN * ITEMSIZE
TOKENS = (128, 512, 2048, 8192, 32768)
"""The rows that kernels are fitted on; 64, 256, 1024, 4096 and 16384 are left out."""
FEWEST = 16  # thread blocks from which the unfused kernels no longer depend on their number
LLAMA = Stack(80, 8192, 64, 8, 128, 28672)
MODELS = {
    "Llama-3.3-70B-Instruct": LLAMA,
    "Qwen2.5-72B-Instruct": replace(LLAMA, intermediate=29568),
    "Mixtral-8x22B-Instruct-v0.1": Stack(56, 6144, 48, 8, 128, 16384, 8, 2),
    "Qwen3-235B-A22B": Stack(94, 4096, 64, 4, 128, 1536, 128, 8),
}
"""The shapes in the models' published configurations."""
PREFILL = {
    "Llama-3.3-70B-Instruct": (2048, 16384, 32768),
    "Mixtral-8x22B-Instruct-v0.1": (2048, 16384),
}
"""The rows, on 8 ranks, that the model's constants are fitted on."""
Row = Mapping[str, float]


def read(path: Path) -> list[dict[str, float | str]]:
    """A CSV's rows, numbers as numbers."""

    def value(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    with path.open(encoding="utf-8", newline="") as lines:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(lines)]


def fit(
    names: Sequence[str],
    begin: object,
    rows: Sequence[Row],
    errors: Callable[[object, Row], Sequence[float]],
) -> dict[str, float]:
    """The fields `names` of the dataclass `begin` with the least loss of `errors` over `rows`."""

    def given(logs: np.ndarray) -> object:
        return replace(begin, **dict(zip(names, np.exp(logs), strict=True)))  # type: ignore[type-var]

    def loss(logs: np.ndarray) -> np.ndarray:
        constants = given(logs)
        return np.array([error for row in rows for error in errors(constants, row)])

    start = np.log([getattr(begin, name) for name in names])
    found = np.exp(least_squares(loss, start, loss="soft_l1", f_scale=0.05).x)
    return {name: float(f"{value:.3g}") for name, value in zip(names, found, strict=True)}


def kernels(rows: Sequence[Row]) -> Constants:
    """The constants of single kernels."""
    links = links_of("h100", WORLD)
    c = all_reduce.FITTED
    chosen = [row for row in rows if row["tokens"] in TOKENS]
    plain = [row for row in chosen if row["ctas"] == FEWEST]
    whole = [row for row in chosen if row["ctas"] == 0]  # a block per row: the norm at its best
    few = [row for row in chosen if 0 < row["ctas"] <= all_reduce.MOST_BLOCKS]

    def size(row: Row) -> float:
        return row["tokens"] * ROW

    def norm(c: Constants, row: Row) -> tuple[float, float]:
        full = all_reduce.norm_seconds(size(row), links.target, c)
        shard = all_reduce.norm_seconds(size(row) / WORLD, links.target, c)
        return _error(full, row["full_rms_norm"]), _error(shard, row["shard_rms_norm"])

    def fused(c: Constants, row: Row) -> tuple[float]:
        args = int(row["tokens"]), ROW, links, int(row["ctas"])
        return (_error(all_reduce.fused_seconds("multimem", *args, c), row["fused"]),)

    laws = (
        (("norm_us", "norm_memory"), whole, norm),
        (
            ("nccl_low_us", "nccl_low_link", "nccl_high_us", "nccl_high_link"),
            plain,
            lambda c, row: (
                _error(all_reduce.nccl_seconds(size(row), links, c), row["nccl_all_reduce"]),
            ),
        ),
        (
            ("all_reduce_us", "all_reduce_link"),
            plain,
            lambda c, row: (
                _error(
                    all_reduce.multimem_seconds(size(row), links, c), row["multimem_all_reduce"]
                ),
            ),
        ),
        (
            ("reduce_scatter_us", "reduce_scatter_link"),
            plain,
            lambda c, row: (
                _error(all_reduce.reduce_scatter_seconds(size(row), links, c), row["multimem_rs"]),
            ),
        ),
        (
            ("all_gather_us", "all_gather_link"),
            plain,
            lambda c, row: (
                _error(all_reduce.all_gather_seconds(size(row), links, c), row["multimem_ag"]),
            ),
        ),
        (("fused_us", "fused_link", "per_block_us", "row_us", "sharpness"), few, fused),
    )
    for names, used, errors in laws:
        c = replace(c, **fit(names, c, used, errors))
    return c


def published(choice: ScheduleChoice) -> dict[str, float]:
    """The schedules that were measured, by their columns in the published table; seconds."""
    unfused, woven = choice["multimem_all_reduce"].seconds, choice["weave"].seconds
    if unfused is None or woven is None:
        raise ValueError(f"expected multimem and a weave to be possible, found {choice}")
    return {"no_ar": choice.bound, "baseline_multimem": unfused, "overlap_fused": woven}


def models(rows: Sequence[Mapping[str, float | str]]) -> tensor_parallel.Constants:
    """The constants of whole models: those of dense layers from Llama, then those of experts."""

    def errors(c: tensor_parallel.Constants, row: Mapping[str, float | str]) -> list[float]:
        stack = MODELS[str(row["model"])]
        found = choose_schedule(
            stack, int(row["tokens"]), WORLD, "h100", launch="eager", constants=c
        )
        return [
            _error(seconds, float(row[column]) * 1e3)
            for column, seconds in published(found).items()
        ]

    c = tensor_parallel.FITTED
    names = ("gemm", "attention", "wire", "interference"), ("expert", "moe_host_us")
    for (model, tokens), fitted in zip(PREFILL.items(), names, strict=True):
        used = [
            row
            for row in rows
            if row["model"] == model and row["world"] == WORLD and row["tokens"] in tokens
        ]
        c = replace(c, **fit(fitted, c, used, errors))
    return c


def _error(seconds: float, microseconds: float) -> float:
    return float(np.log(seconds * 1e6 / microseconds))


def main(folder: Annotated[Path, typer.Argument(help="A folder of published measurements.")]):
    """Print the fitted constants."""
    fitted = (
        kernels(read(folder / "tokenweave_kernels.csv")),
        models(read(folder / "tokenweave_prefill.csv")),
    )
    for constants in fitted:
        print(f"{type(constants).__module__}.FITTED:")
        for name, value in asdict(constants).items():
            print(f"    {name}={value},")


if __name__ == "__main__":
    typer.run(main)
