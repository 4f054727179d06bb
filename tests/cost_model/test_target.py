"""Every shipped machine loads; a bad description names file, key, expected and found."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

from ridgeline.cost_model import (
    InvalidTarget,
    UnknownTarget,
    load_target,
    predict,
    target_names,
)
from ridgeline.cost_model.target import FOLDER

SHIPPED = [n for n in target_names() if n != "cpu"]


def test_the_machines_described():
    expected = {"a100", "a100-40gb", "h100", "h200", "l4", "rtx4090", "b200", "mi300x"}
    assert expected <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_loads_with_a_source_for_each_number(name):
    target = load_target(name)
    assert target.name == name
    assert load_target(target) is target
    assert load_target(FOLDER / f"{name}.toml") == target
    # Dense peaks: a 16-bit matrix unit is below twice its sparse marketing figure's half.
    half = target.peaks["float16"]
    assert half > target.peaks["float32"]
    assert target.peaks.get("bfloat16", half) == (half / 2 if name == "mi100" else half)
    assert half <= target.peaks.get("int8", half)
    assert target.l2_bandwidth_bytes_per_s > target.bandwidth_bytes_per_s
    assert {"cores", "bandwidth_gb_per_s", "peaks_tflops.float16"} <= target.sources.keys()


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("a100", "bfloat16", 312),
        ("h100", "bfloat16", 989.4),
        ("h100", "float8_e4m3fn", 1979),
        ("l4", "bfloat16", 121),
        ("rtx4090", "bfloat16", 165.2),
    ],
)
def test_peaks_are_dense(name, dtype, tflops):
    assert load_target(name).peaks[dtype] == pytest.approx(tflops * 1e12)


def test_units():
    a100 = load_target("a100")
    assert a100.memory_bytes == 80 * 10**9
    assert a100.bandwidth_bytes_per_s == pytest.approx(2.039e12)
    assert a100.shared_bytes_per_core == 164 * 1024
    assert a100.launch_s == pytest.approx(2.4e-6)


def test_dtype_without_a_unit_runs_at_the_vector_rate():
    a100 = load_target("a100")
    assert a100.peak(torch.float8_e4m3fn) == a100.peaks["float32"]
    assert a100.peak(torch.bfloat16) == a100.peaks["bfloat16"]


def test_unknown_name_is_told_the_nearest():
    with pytest.raises(UnknownTarget, match=r"'a101'.*nearest: .*a100"):
        load_target("a101")
    with pytest.raises(UnknownTarget, match=r"missing\.toml"):
        load_target("missing.toml")


def _edited(tmp_path, old, new):
    text = (FOLDER / "a100.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cores = 108", "cores = 'many'", r"mine.toml.*'cores'.*expected a number.*'many'"),
        ("cores = 108", "cores = -1", r"'cores'.*positive.*-1"),
        ("cores = 108", "cores = true", r"'cores'.*a number.*True"),
        ("cores = 108", "cores = nan", r"'cores'.*positive number.*nan"),
        ("cores = 108", "", r"'cores'.*expected a number, found nothing"),
        ("cores = 108", "cores = 1.5", r"'cores'.*an integer of at least 1.*1.5"),
        ("cores = 108", "cores = 1e10", r"'cores'.*from 1e-06 to 1e\+09"),
        ("memory_gb = 80", "memory_gb = 1e-300", r"'memory_gb'.*from 1e-06 to 1e\+09"),
        ("cores = 108", "cores = 108\nsm_count = 3", r"'sm_count'.*expected one of.*found 3"),
        ("memory_gb = 80", "memory_bg = 80", r"memory_bg.*did you mean 'memory_gb'"),
        ('kind = "cuda"', 'kind = "tpu"', r"'kind'.*cuda.*'tpu'"),
        ('arch = "sm_80"', 'arch = "sm_90a"', r"'arch'.*'sm_90'.*'sm_90a'"),
        ('arch = "sm_80"', 'arch = "gfx942"', r"'arch'.*'sm_90'.*'gfx942'"),
        ("gemm_efficiency = 0.8", "gemm_efficiency = 1.2", r"gemm_efficiency.*at most 1"),
        ("bfloat16 = 312.0", "bf16 = 312.0", r"peaks_tflops.bf16.*torch dtype"),
        ("float32 = 19.5", "", r"peaks_tflops.float32"),
        ("cores = 108", "cores = = 108", "expected a TOML file"),
    ],
)
def test_bad_description(tmp_path, old, new, message):
    with pytest.raises(InvalidTarget, match=message):
        load_target(_edited(tmp_path, old, new))


def test_gpus_without_a_link_send_nothing(tmp_path):
    alone = load_target(_edited(tmp_path, "link_gb_per_s = 300", "link_gb_per_s = 0"))
    assert predict(alone, "gemm", "bf16", m=8, n=8, k=8).seconds > 0
    with pytest.raises(InvalidTarget, match=r"'link_gb_per_s'.*all_reduce over 2 ranks"):
        predict(alone, "all_reduce", "fp16", world=2, per_node=2, bytes=1024)


def test_number_without_source(tmp_path):
    described = tomllib.loads((FOLDER / "a100.toml").read_text())
    line = f'cores = "{described["source"]["cores"]}"\n'
    with pytest.raises(InvalidTarget, match=r"source.cores.*where the number comes from"):
        load_target(_edited(tmp_path, line, ""))
    with pytest.raises(InvalidTarget, match=r"source.corez.*the key of a number in this file"):
        load_target(_edited(tmp_path, line, line + line.replace("cores", "corez")))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_gpu_has_a_power_limit_with_a_source(name):
    target = load_target(name)
    assert 50 < target.tdp_w <= 1200
    assert target.sources["tdp_w"]


def test_the_docs_name_every_key_of_a_file():
    page = (Path(__file__).parents[2] / "docs" / "whatif.md").read_text(encoding="utf-8")
    table = page.partition("## A machine of your own")[2].partition("\n## ")[0]
    named = set(re.findall(r"`\[?(\w+)\]?`", table))
    keys = set()
    for name in SHIPPED:
        keys |= tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8")).keys()
    assert keys | {"threads", "fork_us", "spread", "cache_kib", "cache_bandwidth_gb_per_s"} <= named
