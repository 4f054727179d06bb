"""What the laws say of kernels: tiles that fill waves, sums left whole, packed queries, pages."""

import itertools

import pytest

from ridgeline.cost_model import laws, shapes
from ridgeline.cost_model.machine import machine_of

SHORT = {"batch": 32, "heads": 32, "head_dim": 128, "q_len": 16, "kv_len": 16, "window": 0}


def _seconds(name: str, op: str, dtype: str, shape: dict[str, int], **changed: float) -> float:
    group = shapes.group_of(op, dtype)
    machine = {**machine_of(name, op, dtype)[0], **changed}
    constants = list(laws.CONSTANTS[group.law].values())
    return laws.total(laws.LAWS[group.law](constants, machine, shapes.law_inputs(op, dtype, shape)))


def _product(m: int, n: int, k: int) -> dict[str, int]:
    return {"batch": 1, "m": m, "n": n, "k": k}


def test_a_tile_as_wide_as_fills_one_wave_saves_most_of_a_second_wave():
    # 14 x 10 tiles of 128 x 256 are 8 more than an H100 has cores; 7 x 16 of 256 x 160 fit.
    shape = _product(1792, 2560, 8192)
    any_width = _seconds("h100", "gemm", "bf16", shape)
    powers_of_two = _seconds("h100", "gemm", "bf16", shape, fine=0.0)
    assert 0.7 < any_width / powers_of_two < 0.95
    ideal = 2 * 1792 * 2560 * 8192 / machine_of("h100", "gemm", "bf16")[0]["boost"]
    assert any_width < 1.35 * ideal


@pytest.mark.parametrize("m", [1, 63, 500, 4097])
@pytest.mark.parametrize("n", [8, 200, 4104])
def test_more_tiles_to_choose_from_never_take_longer(m, n):
    for k in (64, 1000, 65536):
        shape = _product(m, n, k)
        fixed = _seconds("h200", "gemm", "bf16", shape, fine=0.0)
        assert _seconds("h200", "gemm", "bf16", shape) <= fixed * (1 + 1e-12)


def test_boards_without_asynchronous_matrix_units_have_fixed_tiles():
    assert machine_of("b200", "gemm", "bf16")[0]["fine"] == 1.0
    for name, dtype in (
        ("rtxpro6000", "bf16"), ("a100", "bf16"), ("h100", "fp32"), ("h100", "fp16"),
    ):  # fmt: skip
        assert machine_of(name, "gemm", dtype)[0]["fine"] == 0.0, name


def test_the_sum_of_an_fp8_product_is_never_split():
    deep = _product(16, 128, 65536)  # one tile: only splitting would give other cores work
    once, twice = (_seconds("h100", "gemm", "fp8", {**deep, "k": k}) for k in (32768, 65536))
    assert twice / once > 1.8
    split = [_seconds("h100", "gemm", "bf16", {**deep, "k": k}) for k in (32768, 65536)]
    assert split[1] < twice / 2


def test_queries_of_a_group_share_a_tile_on_hopper_only():
    def grouped(name: str) -> float:
        few, all_ = (
            _seconds(name, "attn_prefill", "bf16", {**SHORT, "kv_heads": h}) for h in (4, 32)
        )
        return few / all_

    assert grouped("h100") < 0.6
    assert grouped("a100") > 0.8


def test_writing_pages_takes_a_chain_of_loads_a_token():
    many, few = (
        _seconds(
            "a100",
            "attn_prefill",
            "bf16",
            {**SHORT, "batch": b, "heads": h, "kv_heads": h, "q_len": 512, "kv_len": 512},
        )
        for b, h in ((64, 4), (4, 64))
    )
    # As many heads, bytes and pairs; sixteen times as many tokens.
    assert many > 1.15 * few


def test_a_chunk_of_a_prompt_is_the_kernel_alone():
    whole, chunk = (
        _seconds(
            "a6000",
            "attn_prefill",
            "bf16",
            {**SHORT, "batch": 1, "kv_heads": 8, "q_len": q, "kv_len": 64},
        )
        for q in (64, 63)
    )
    assert chunk < whole - 5e-6


@pytest.mark.parametrize("name", ["a100", "l40s", "h100", "b200"])
def test_a_second_query_over_a_cache_never_takes_less(name):
    def seconds(q: int) -> float:
        shape = {**SHORT, "batch": 2, "kv_heads": 8, "q_len": q, "kv_len": 8192}
        return _seconds(name, "attn_prefill", "bf16", shape)

    times = [seconds(q) for q in (1, 2, 3, 4, 16)]
    assert all(b > a * (1 - 1e-3) for a, b in itertools.pairwise(times))
    # FlashAttention-2 splits the keys of a single query only, later kernels those of few.
    jump = times[1] / times[0]
    assert jump > 2 if name in ("a100", "l40s") else jump < 1.05


def test_a_wave_begun_is_a_wave_paid_on_fixed_tiles():
    # 2 x 54 tiles of 256 x 128 are one wave of an A100's 108 cores, 2 x 56 are two.
    one, begun = (_seconds("a100", "gemm", "bf16", _product(512, n, 5120)) for n in (6912, 7168))
    assert begun / one > 1.25
    # A board at its power's limit clocks higher while cores are idle.
    one, begun = (_seconds("l40s", "gemm", "bf16", _product(512, n, 5120)) for n in (9088, 9344))
    assert begun / one < 1.25


def test_copies_of_weights_taken_in_turns_leave_l2_before_activations_do():
    def moved(m: int, n: int, k: int) -> float:
        """Bytes/s of an L40S, whose L2 has 96 MiB, beyond its floor."""
        shape = _product(m, n, k)
        bytes_ = shapes.law_inputs("gemm", "bf16", shape)["bytes"]
        return bytes_ / (_seconds("l40s", "gemm", "bf16", shape) - 2e-6)

    dram = machine_of("l40s", "gemm", "bf16")[0]["bandwidth"]
    assert moved(8, 8192, 2048) < 1.2 * dram  # 5.5 times 34 MB
    assert moved(8, 4096, 1024) > 1.2 * dram  # 5.5 times 8 MB
    assert moved(2048, 8192, 32) > 1.2 * dram  # y of 34 MB
