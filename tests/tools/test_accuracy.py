"""The fit and its accuracy on rows made here: by the laws, with constants that it must find."""

import csv
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ridgeline.cost_model import laws, shapes
from ridgeline.cost_model.calibration import Model
from ridgeline.cost_model.machine import machine_of
from ridgeline.tools import accuracy, accuracy_table
from ridgeline.tools import fit_cost_model as fits
from ridgeline.tools.cli import app
from ridgeline.tools.kernel_times import KernelTimesError, read

GPUS = ("a100_80g", "l40s", "h100_sxm")
NOISE = 0.02
# What the rows are made with, away from where fits begin.
TRUE = {"floor_us": 6.0, "memory": 0.8, "compute": 0.85, "link": 0.5, "core": 7.0}
WIDTHS = (1024, 4096, 5120, 8192, 11008, 14336)
GEMMS = [
    {"batch": 1, "m": m, "n": n, "k": k}
    for m, n, k in itertools.product((1, 64, 2048), WIDTHS, (4096, 5120))
]
ATTENTION = [
    {"batch": b, "heads": h, "kv_heads": 8, "head_dim": 128, "kv_len": kv, "window": 0}
    for b, h, kv in itertools.product((1, 16), (8, 16, 24, 32, 48, 64), (512, 8192))
]
ROWS = {
    "gemm": [("gemm", "bf16", s) for s in GEMMS],
    "gemm_quant": [("gemm", "w4a16", s) for s in GEMMS],
    "attention": [
        (op, "bf16", {**s, "q_len": s["kv_len"] if op == "attn_prefill" else 1})
        for op in ("attn_prefill", "attn_decode")
        for s in ATTENTION
    ],
    "memory": [
        ("softmax", "fp32", {"rows": rows, "width": width})
        for rows, width in itertools.product((64, 1024, 8192, 65536), WIDTHS)
    ],
    "collective": [
        ("all_reduce", "fp16", {"world": w, "per_node": w, "bytes": 2**b})
        for w, b in itertools.product((2, 4, 8), range(12, 29, 2))
    ],
}


def _seconds(gpu: str, op: str, dtype: str, shape: dict[str, int]) -> float:
    group = shapes.group_of(op, dtype)
    machine, _ = machine_of(gpu, op, dtype, shape.get("world"), shape.get("per_node"))
    c = [TRUE.get(k, v) for k, v in laws.CONSTANTS[group.law].items()]
    return laws.total(laws.LAWS[group.law](c, machine, shapes.law_inputs(op, dtype, shape)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    where = tmp_path_factory.mktemp("times")
    bf16: dict[tuple, dict] = {}
    for file, rows in ROWS.items():
        keys = ["source", "variant", "gpu", "op", "dtype", *rows[0][2], "median_us"]
        with (where / f"{file}.csv").open("w", newline="") as stream:
            out = csv.DictWriter(stream, keys)
            out.writeheader()
            for gpu, (op, dtype, shape) in itertools.product(GPUS, rows):
                name = f"{gpu}_nvswitch" if file == "collective" else gpu
                us = _seconds(name, op, dtype, shape) * 1e6 * float(np.exp(rng.normal(0, NOISE)))
                who = {"source": "made", "variant": "here", "gpu": name, "op": op, "dtype": dtype}
                out.writerow({**who, **shape, "median_us": us})
                if op == "gemm":
                    key = (gpu, shape["m"], shape["n"], shape["k"])
                    bf16.setdefault(key, {})[dtype] = us
    with (where / "dtype_choice.csv").open("w", newline="") as stream:
        out = csv.writer(stream)
        out.writerow(["source", "gpu", "m", "n", "k", "bf16", "w4a16"])
        out.writerows(["made", *key, t["bf16"], t["w4a16"]] for key, t in bf16.items())
    return where


@pytest.fixture(scope="module")
def found(folder):
    return accuracy.run(folder, folder)


def test_a_fit_finds_the_constants_that_made_the_rows(folder):
    entry = fits.fit_group(read(folder)["softmax.fp32"], machines=False)
    constants = dict(zip(laws.CONSTANTS["stream"], entry["constants"], strict=True))
    assert constants["memory"] == pytest.approx(TRUE["memory"], rel=0.05)
    assert constants["floor_us"] == pytest.approx(TRUE["floor_us"], rel=0.1)


@pytest.mark.parametrize("name", accuracy.CLASSES)
def test_every_class_is_scored_where_it_has_rows(found, name):
    if name not in ("GEMM, fp32", "elementwise", "norm"):
        unseen, apart = found["classes"][name]
        for score in (unseen, apart):
            assert score.rows > 0
            assert score.median < 3 * NOISE, name
        assert apart.pairs > 0.8, name
    else:
        assert name not in found["classes"]


def test_intervals_hold_most_of_machines_left_out(found):
    covered = [apart.covered for _, apart in found["classes"].values()]
    assert all(0.6 < c <= 1 for c in covered)


def test_the_fastest_dtype_is_chosen_on_machines_left_out(found):
    rows, top, regret = found["choice"][1]
    assert rows > 20
    assert top > 0.8
    assert regret < 0.05


def test_products_of_the_choice_that_no_file_has_are_for_residuals_alone(folder, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(folder, more)
    once = read(folder)["gemm.bf16"]
    assert not once.beside.any()  # all of its products are in gemm.csv
    with (more / "dtype_choice.csv").open("a", newline="") as stream:
        csv.writer(stream).writerow(["made", "l40s", 3, 96, 4096, 7.5, ""])
    found = read(more)
    assert not found["gemm.w4a16"].beside.any()
    t = found["gemm.bf16"]
    assert len(t) == len(once) + 1
    added = t.where(t.beside)
    assert added.name.tolist() == ["l40s"]
    assert added.log_s == pytest.approx(np.log(7.5e-6))
    assert (added.s["m"].item(), added.s["n"].item()) == (3, 96)
    begin = list(laws.CONSTANTS["gemm"].values())
    assert fits.constants(t, begin, fits.PRIOR) == fits.constants(once, begin, fits.PRIOR)
    assert len(fits.of_board(t, "l40s")) == len(fits.of_board(once, "l40s"))


def test_a_wrong_prediction_is_scored_as_wrong(folder):
    t = read(folder)["softmax.fp32"]
    twice = np.full(len(t), np.log(0.5))  # predicted twice as long as measured
    score = accuracy.score([(t, twice, np.zeros(len(t)))])
    assert score is not None
    assert score.median == pytest.approx(1.0)
    assert score.mean == pytest.approx(1.0)
    assert score.pairs == 1.0  # all by one factor: the order is right
    assert score.covered == 0.0
    reverse = 2 * t.log_s
    assert accuracy.score([(t, reverse, np.zeros(len(t)))]).pairs < 0.05  # pyright: ignore


def test_residual_and_interval_of_a_measured_machine_are_read_back(folder):
    calibrated = fits.fit(folder)
    model = Model(calibrated)
    group = shapes.group_of("softmax", "fp32")
    assert set(calibrated["groups"][group.key]["machines"]) == {"a100", "h100", "l40s"}
    for bound in range(3):
        low, high = model.interval(group, "a100", bound)
        assert -1 < low < 0 < high < 1


def test_the_command_prints_tables_and_writes_them(folder, tmp_path):
    page = tmp_path / "page.md"
    result = CliRunner().invoke(app, ["accuracy", str(folder), "-o", str(page)])
    assert result.exit_code == 0, result.output
    text = page.read_text()
    for said in ("softmax", "goal", "Choice of the fastest dtype", "machines left out"):
        assert said in text
    assert "By class" in result.output


def test_a_class_without_a_second_machine_is_shown_as_unknown():
    grid = accuracy_table.grids({"classes": {"softmax": (None, None)}, "groups": {}})
    goals = "5% / 9% / 0.95 / 90%", "15% / 22% / 0.90 / 90%"
    assert grid[0][2] == [["softmax", "0 / 0", "-", goals[0], "-", goals[1]]]


def test_a_folder_without_its_files_is_an_error(tmp_path):
    result = CliRunner().invoke(app, ["accuracy", str(tmp_path)])
    assert result.exit_code == 1
    assert "gemm.csv" in result.output


def test_a_folder_without_measured_times_is_told_what_is_missing(tmp_path):
    with pytest.raises(KernelTimesError, match=r"expected a folder with gemm\.csv"):
        read(tmp_path)
    (tmp_path / "gemm.csv").write_text("gpu,op\n")
    with pytest.raises(KernelTimesError, match=r"gemm.csv: expected a column 'dtype'"):
        read(tmp_path)
    for written in ("nan", "-1.5", "fast", ""):
        header = "source,variant,gpu,op,dtype,batch,m,n,k,median_us\n"
        (tmp_path / "gemm.csv").write_text(f"{header}s,v,a100_80g,gemm,bf16,1,1,1,1,{written}\n")
        with pytest.raises(KernelTimesError, match=r"gemm.csv:2: median_us: expected microsec"):
            read(tmp_path)
    row = {"op": "gemm", "dtype": "bf16", "batch": "1", "m": "1", "n": "1", "k": "1"}
    for change in ({"op": "gimm"}, {"dtype": "bf61"}, {"m": "13.5"}, {"k": "0"}, {"n": ""}):
        cells = ",".join((row | change).values())
        (tmp_path / "gemm.csv").write_text(
            f"source,variant,gpu,{','.join(row)},median_us\ns,v,a100_80g,{cells},2.5\n"
        )
        ((name, found),) = change.items()
        with pytest.raises(KernelTimesError, match=rf"gemm.csv:2: {name}: .*found '{found}'"):
            read(tmp_path)
