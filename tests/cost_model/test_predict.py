"""predict: every name and dtype, monotone laws, exact pairs, clear errors, the interval."""

import numpy as np
import pytest

from ridgeline.cost_model import (
    InvalidShape,
    UnknownTarget,
    laws,
    predict,
    shapes,
    target_names,
)
from ridgeline.cost_model.law_attention import pairs
from ridgeline.cost_model.machine import machine_of

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
    assert pairs(q, kv, window) == sum(keys)


@pytest.mark.parametrize(
    ("op", "dtype", "shape", "grows"),
    [
        ("gemm", "bf16", LAYER, "m"),
        ("gemm", "fp8", LAYER, "k"),
        ("attn_prefill", "bf16", {**HEADS, "q_len": 512, "kv_len": 512}, "batch"),
        ("attn_decode", "bf16", {**HEADS, "kv_len": 512}, "kv_len"),
        ("softmax", "fp32", {"rows": 64, "width": 4096}, "rows"),
        ("all_reduce", "fp16", RING, "bytes"),
    ],
)
def test_laws_take_arrays_as_they_take_numbers(op, dtype, shape, grows):
    group = shapes.group_of(op, dtype)
    machine, _ = machine_of("h100", op, dtype, shape.get("world"), shape.get("per_node"))
    c = list(laws.CONSTANTS[group.law].values())
    full = {k: v or 0 for k, v in shapes.PARAMETERS[op].items()} | shape
    each = [shapes.law_inputs(op, dtype, {**full, grows: full[grows] * f}) for f in (1, 3, 50)]
    one = [laws.total(laws.LAWS[group.law](c, machine, s)) for s in each]
    arrays = {k: np.array([float(s[k]) for s in each]) for k in each[0]}
    columns = {k: np.full(3, v) for k, v in machine.items()}
    if group.law == "gemm":
        arrays, columns = ({k: v[:, None] for k, v in d.items()} for d in (arrays, columns))
    many = laws.total(laws.LAWS[group.law](c, columns, arrays))
    np.testing.assert_allclose(many, one, rtol=1e-9)


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
