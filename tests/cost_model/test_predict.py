"""predict: every name and dtype, monotone laws, exact pairs, clear errors, the interval."""

import numpy as np
import pytest

from ridgeline.cost_model import (
    InvalidShape,
    UnknownTarget,
    laws,
    load_target,
    predict,
    target_names,
)

GPUS = [n for n in target_names() if n != "cpu"]
ALIASES = ["a100_80g", "h100_sxm"]
LAYER = {"m": 64, "n": 4096, "k": 4096}
HEADS = {"batch": 8, "heads": 32, "kv_heads": 8, "head_dim": 128}
RING = {"world": 4, "per_node": 4, "bytes": 1 << 24}


@pytest.mark.parametrize("name", [*GPUS, *ALIASES])
def test_every_operator_on_every_machine(name):
    calls = [("gemm", d, LAYER) for d in ("bf16", "fp16", "fp32", "fp8", "int8", "w8a16", "w4a16")]
    calls += [("bmm", "fp32", {**LAYER, "batch": 4})]
    calls += [("attn_prefill", "bf16", {**HEADS, "q_len": 512, "kv_len": 512})]
    calls += [("attn_decode", "bf16", {**HEADS, "kv_len": 512})]
    calls += [(op, "fp16", {"rows": 64, "width": 4096}) for op in ("rmsnorm", "silu_mul", "add")]
    for op, dtype, shape in calls:
        cost = predict(name, op, dtype, **shape)
        assert 2e-7 < cost.low < cost.seconds < cost.high < 0.1, (op, dtype, cost)


def test_an_alias_is_the_same_machine():
    assert predict("a100", "gemm", "bf16", **LAYER) == predict("a100_80g", "gemm", "bf16", **LAYER)


@pytest.mark.parametrize(
    "name", ["h100_nvswitch", "a100_80g_nvswitch", "a40_pairwise", "l40s_pcie"]
)
def test_topologies(name):
    small = predict(name, "all_reduce", "fp16", **{**RING, "bytes": 1 << 12})
    assert small.seconds < predict(name, "all_reduce", "fp16", **RING).seconds
    assert predict(name, "all_reduce", "fp16", world=1, per_node=1, bytes=64).seconds == 0.0


def test_a_card_that_is_named_like_a_topology():
    nvlink = predict("h100_nvswitch", "all_reduce", "fp16", **RING)
    assert predict("h100_pcie", "all_reduce", "fp16", **RING).seconds > nvlink.seconds


@pytest.mark.parametrize("name", ["h100", "rtx4090", "a100"])
def test_twice_the_depth_of_a_large_product_takes_twice_the_time(name):
    once = predict(name, "gemm", "bf16", m=8192, n=8192, k=8192).seconds
    assert predict(name, "gemm", "bf16", m=8192, n=8192, k=16384).seconds / once == pytest.approx(
        2, rel=0.1
    )


def test_few_rows_are_bound_by_weights_so_fewer_bits_are_faster():
    shape = {"m": 1, "n": 14336, "k": 4096}
    times = [predict("h100", "gemm", d, **shape).seconds for d in ("w4a16", "w8a16", "bf16")]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("q", "kv", "window"), [(1, 1, 0), (7, 7, 0), (7, 12, 0), (7, 7, 3), (7, 12, 3), (9, 12, 6)]
)
def test_pairs_are_counted_exactly(q, kv, window):
    keys = [min(kv - q + i + 1, window or kv) for i in range(q)]
    assert laws.pairs(q, kv, window) == sum(keys)


def test_laws_take_arrays_as_they_take_numbers():
    machine = {"peak": 2e14, "cores": 108.0, "bandwidth": 1.6e12, "slow": 1.0}
    c = list(laws.CONSTANTS["gemm"].values())
    m = np.array([[1.0], [64.0], [4096.0]])
    rest = {"n": 4096.0, "k": 4096.0, "batch": 1.0}
    many = laws.gemm(c, machine, {"m": m, "bytes": 2.0 * (m + 4096) * 4096, **rest})
    one = [
        laws.gemm(c, machine, {"m": x, "bytes": 2.0 * (x + 4096) * 4096, **rest})
        for x in (1.0, 64.0, 4096.0)
    ]
    np.testing.assert_allclose(many, one, rtol=1e-12)


@pytest.mark.parametrize(
    ("op", "dtype", "shape", "said"),
    [
        ("conv", "bf16", LAYER, "op: expected one of"),
        ("gemm", "fp4", LAYER, "dtype: expected one of"),
        ("gemm", "bf16", {"m": 1, "n": 4}, "k: expected an integer >= 1, found nothing"),
        ("gemm", "bf16", {**LAYER, "m": 0}, "m: expected an integer >= 1, found 0"),
        ("gemm", "bf16", {**LAYER, "m": 1.5}, "m: expected an integer >= 1, found 1.5"),
        ("gemm", "bf16", {**LAYER, "rows": 1}, "found 'rows'"),
        ("attn_decode", "bf16", {**HEADS, "kv_heads": 5, "kv_len": 9}, "multiple of kv_heads = 5"),
        ("attn_prefill", "bf16", {**HEADS, "q_len": 9, "kv_len": 8}, "at most kv_len = 8"),
    ],
)
def test_errors_say_what_was_expected_and_found(op, dtype, shape, said):
    with pytest.raises(InvalidShape, match=said):
        predict("a100", op, dtype, **shape)


def test_an_unknown_machine_and_the_host_are_refused():
    with pytest.raises(UnknownTarget, match="nearest"):
        predict("h1000", "gemm", "bf16", **LAYER)
    with pytest.raises(InvalidShape, match="a GPU"):
        predict("cpu", "gemm", "bf16", **LAYER)


def test_a_described_machine_is_taken_as_its_name():
    assert predict(load_target("a100"), "gemm", "bf16", **LAYER) == predict(
        "a100", "gemm", "bf16", **LAYER
    )


def test_cores_that_another_kernel_holds():
    large = {"m": 8192, "n": 8192, "k": 8192}
    whole = predict("h100", "gemm", "bf16", **large).seconds
    half = predict("h100", "gemm", "bf16", reserved=66, **large).seconds
    assert half == pytest.approx(2 * whole, rel=0.05)
    assert predict("h100", "rmsnorm", "fp16", reserved=8, rows=64, width=64).seconds > 0
    for reserved in (-1, 132):
        with pytest.raises(InvalidShape, match="reserved: expected 0 to 131 cores"):
            predict("h100", "gemm", "bf16", reserved=reserved, **large)
