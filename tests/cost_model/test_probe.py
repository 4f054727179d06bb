"""The probe yields a usable description, keeps it, and doesn't keep what it can't trust."""

import inspect
import logging

import pytest
import torch

from ridgeline.cost_model import host_times, load_target, probe
from ridgeline.cost_model.host_times import ProbeSizes
from ridgeline.cost_model.target import parse_target

LIGHT = ProbeSizes(gemm=64, dram_bytes=2**16, rounds=2, repeats=1, seconds=1e-4)


@pytest.fixture(scope="module")
def described():
    return probe.probe(LIGHT)


def _is_cached(function):
    return hasattr(function, "cache_clear")


@pytest.fixture
def clean(tmp_path, monkeypatch):
    monkeypatch.setenv("RIDGELINE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "probe_host", inspect.unwrap(probe.probe_host, stop=_is_cached))
    probe.probe_host.cache_clear()
    probe.unrefined_host.cache_clear()
    yield tmp_path / "cache"
    probe.probe_host.cache_clear()
    probe.unrefined_host.cache_clear()


def _probing(monkeypatch, described, spread):
    runs = []

    def run(sizes):
        runs.append(sizes)
        return {**described, "spread": spread}

    monkeypatch.setattr(probe, "probe", run)
    return runs


def test_description_is_a_target(described):
    target = parse_target(described, "test")
    assert target.kind == "cpu"
    assert target.threads >= 1
    assert {"float32", "bfloat16", "int8"} <= target.peaks.keys()
    speeds = [speed for _, speed in target.caches]
    assert speeds == sorted(speeds, reverse=True)
    assert target.bandwidth_bytes_per_s <= speeds[-1]


def test_steady_probe_is_kept(clean, monkeypatch, described):
    runs = _probing(monkeypatch, described, spread=0.05)
    first = load_target("native")
    probe.probe_host.cache_clear()
    probe.unrefined_host.cache_clear()
    assert load_target("cpu") == first
    assert len(runs) == 1
    assert [p.suffix for p in clean.iterdir()] == [".json"]


def test_noisy_probe_serves_this_process_alone(clean, monkeypatch, caplog, described):
    runs = _probing(monkeypatch, described, spread=0.4)
    with caplog.at_level(logging.WARNING):
        assert load_target("native") is load_target("native")
    assert len(runs) == 1
    assert not clean.exists()
    assert "40 %" in caplog.text


def test_damaged_file_is_probed_again(clean, monkeypatch, caplog, described):
    clean.mkdir()
    probe.cache_path().write_text("{")
    _probing(monkeypatch, described, spread=0.05)
    with caplog.at_level(logging.WARNING):
        assert load_target("native").name == "cpu"
    assert "probing again" in caplog.text
    assert probe.cache_path().read_text().startswith("{\n")


@pytest.mark.parametrize(("limit", "rows"), [(0.0, 4), (1e9, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_products_that_take_too_long_are_timed_on_fewer_rows(monkeypatch, limit, rows, dtype):
    monkeypatch.setattr(host_times, "SLOW_PRODUCT_S", limit)
    assert host_times._rows(dtype, 128) == rows
    assert host_times._product(dtype, rows, 128)().shape == (rows, 128)


def test_a_burst_that_slows_some_rounds_costs_neither_the_figures_nor_the_trust():
    clock = host_times._Clock(ProbeSizes(rounds=4, repeats=2))
    clock.times["quick"] = [3.0, 3.1, 3.0, 3.2, 1.0, 1.1, 1.02, 1.1]
    assert clock.best("quick") == 1.0
    assert clock.spread() == pytest.approx(0.02)
    clock.times["quick"] = [3.0, 3.1, 1.0, 1.1, 3.0, 3.1, 1.0, 1.1]  # no two rounds agree
    assert clock.spread() == pytest.approx(2.0)


def test_waiting_for_a_core_counts_where_it_slowed_the_best_sample():
    clock = host_times._Clock(ProbeSizes(rounds=2, repeats=2))
    clock.times["product"], clock.waited["product"] = [2.0, 1.0, 1.0, 1.5], [0.6, 0.0, 0.02, 0.4]
    assert clock.spread() == pytest.approx(0.0)
    clock.waited["product"] = [0.0, 0.5, 0.5, 0.5]  # a neighbour that is always there
    assert clock.spread() == pytest.approx(0.5)


@pytest.mark.parametrize(("patience", "taken", "spread"), [(60.0, 3, 0.05), (0.0, 1, 0.4)])
def test_a_disturbed_probe_is_taken_again_while_there_is_patience(
    clean, monkeypatch, described, patience, taken, spread
):
    spreads = [0.4, 0.3, 0.05]
    runs = []
    monkeypatch.setattr(
        probe,
        "probe",
        lambda sizes: runs.append(1) or {**described, "spread": spreads[len(runs) - 1]},
    )
    host = probe.steady_host(patience)
    assert (len(runs), host.spread) == (taken, spread)
    assert probe.cache_path().exists() == (spread < 0.15)
    assert probe.unrefined_host().spread == spread
