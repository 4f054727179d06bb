"""Refinement: a known distortion of the law is found again; few measurements change little."""

import dataclasses
import json
import math

import pytest
import torch

from ridgeline.cost_model import (
    Gemm,
    InvalidTarget,
    Norm,
    Stream,
    Work,
    estimate,
    probe,
    refine,
)
from ridgeline.cost_model.estimate import interval, kind_of, measured_error
from ridgeline.cost_model.pointwise import gated_work, rotary_work
from ridgeline.cost_model.refine import Measurement
from ridgeline.cost_model.target import Refinement

TRUTH = Refinement(compute=1.8, memory=0.6, dispatch=5.0, fork=2.0)
PARTS = [(1e-6, 1e-7), (1e-5, 1e-6), (1e-6, 4e-5), (1e-4, 1e-5), (1e-5, 1e-3), (1e-3, 1e-5),
         (1e-7, 1e-7), (3e-6, 2e-6)]  # fmt: skip


def measured(truth=TRUTH, noise=0.0):
    found = []
    for i, (compute, memory) in enumerate(PARTS):
        m = Measurement("norm", str(i), compute, memory, 2e-6, (i % 3 == 0) * 1e-5, 0.0)
        seconds = m.predicted(truth) * (1 + noise * (-1) ** (i // 2))
        found.append(dataclasses.replace(m, measured=seconds))
    return found


def test_a_known_distortion_is_found():
    found = refine.refine(measured())["norm"]
    for name in ("compute", "memory", "dispatch", "fork"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=0.1)
    assert found.error < 0.25


def test_measurements_as_predicted_change_nothing():
    found = refine.refine(measured(Refinement()))["norm"]
    factors = found.compute, found.memory, found.dispatch, found.fork
    assert factors == pytest.approx((1,) * 4, rel=1e-3)
    assert found.error == refine.ERROR_FLOOR


def test_noise_is_in_the_error():
    assert refine.refine(measured(noise=0.4))["norm"].error > 0.2


def test_a_kind_of_few_measurements_stays():
    assert refine.refine(measured()[: refine.FEWEST - 1]) == {}


@pytest.fixture
def host():
    return probe.probe_host()


def test_an_estimate_is_refined_by_kind(host):
    norm, gemm = Norm(64, 576), Gemm(8, 576, 576)
    refined = dataclasses.replace(host, refined={"norm": Refinement(2.0, 2.0, 2.0, 2.0, 0.07)})
    assert kind_of(norm) == "norm"
    plain, twice = (estimate(Work((norm,)), t).seconds for t in (host, refined))
    assert twice == pytest.approx(2 * plain)
    assert estimate(Work((gemm,)), host) == estimate(Work((gemm,)), refined)
    assert measured_error(norm, refined) == pytest.approx(0.07 + host.spread)
    assert measured_error(gemm, refined) == measured_error(gemm, host)
    assert interval(norm, refined)[1] == pytest.approx(math.log(1.07 + host.spread))
    assert interval(gemm, refined) == interval(gemm, host)


def test_a_chain_is_a_kind_of_its_own_and_the_others_go_by_all_of_them(host):
    """A rotary embedding and a rational function spend their time on different things."""
    slow, quick = Refinement(*[2.0] * 4), Refinement(*[0.5] * 4)
    found = [
        dataclasses.replace(m, kind=f"elementwise {chain}", measured=m.predicted(truth))
        for chain, truth in (("gate", slow), ("rotary", quick))
        for m in measured(Refinement())
    ]
    refined = refine.refine(found)
    assert refined.keys() == {"elementwise", "elementwise gate", "elementwise rotary"}
    assert refined["elementwise gate"].error < 0.25 < refined["elementwise"].error
    target = dataclasses.replace(host, refined=refined)

    def factor(work):
        return estimate(work, target).seconds / estimate(work, host).seconds

    sizes = {"kind": "cpu", "ours": True}
    gate = gated_work(100_000, torch.float32, "silu", **sizes)
    theirs = gated_work(100_000, torch.float32, "silu", kind="cpu", ours=False)
    turn = rotary_work([100_000], 1000, torch.float32, **sizes)
    other = Work((Stream(8e5, 4e5, 100_000),))
    assert factor(gate) == pytest.approx(2, rel=0.15) == factor(theirs)
    assert factor(turn) == pytest.approx(0.5, rel=0.15)
    assert factor(turn) < 0.8 < factor(other) < 1.3 < factor(gate)
    assert [kind_of(k) for k in (*turn.kernels, *other.kernels)] == [
        *["elementwise rotary"] * len(turn.kernels), "elementwise",
    ]  # fmt: skip


def test_a_file_comes_back_for_the_same_probe_and_laws_only(host, tmp_path, monkeypatch):
    file = tmp_path / "refined.json"
    assert refine.read(file, host) == {}
    file.write_text(refine.to_json({"norm": TRUTH}, host))
    assert refine.read(file, host) == {"norm": TRUTH}
    other = dataclasses.replace(host, bandwidth_bytes_per_s=1e9)
    assert refine.read(file, other) == {}
    monkeypatch.setattr(refine, "_laws", lambda: "of another version")
    assert refine.read(file, host) == {}
    file.write_text(file.read_text().replace("dispatch", "a factor of an older version"))
    assert refine.read(file, host) == {}


@pytest.mark.parametrize("text", ["no json", "[]", json.dumps({"base": []}), "null"])
def test_a_broken_file_is_named(host, tmp_path, text):
    file = tmp_path / "refined.json"
    file.write_text(text)
    with pytest.raises(InvalidTarget, match=r"refined\.json: expected what `ridgeline calibrate`"):
        refine.read(file, host)


def test_fp32_and_bf16_products_are_different_kinds():
    assert kind_of(Gemm(1, 8, 8)) != kind_of(Gemm(1, 8, 8, dtype=torch.bfloat16))
