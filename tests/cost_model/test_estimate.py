"""Scaling laws, order of alternatives, bounds, and no NaN."""

import dataclasses
import itertools
import math

import pytest
import torch

from ridgeline.cost_model import (
    Attention,
    BinaryAttention,
    Collective,
    Gemm,
    InvalidTarget,
    Stream,
    Work,
    cpu_time,
    estimate,
    load_target,
    target_names,
)
from ridgeline.cost_model.cpu_attention import multiply_adds
from ridgeline.cost_model.target import FOLDER

ALL_GPUS = [n for n in target_names() if n != "cpu"]
# The kernels below compute in bf16, which older machines have no unit for.
GPUS = [n for n in ALL_GPUS if "bfloat16" in load_target(n).peaks]
BF16 = torch.bfloat16
CPU = """
name = "desk"
kind = "cpu"
arch = "x86_64"
features = ["avx2"]
cores = 8
threads = 8
memory_gb = 32
bandwidth_gb_per_s = 40
cache_kib = [256, 4096, 32768]
cache_bandwidth_gb_per_s = [1000, 400, 200]
launch_us = 2
fork_us = 3
gemm_efficiency = 0.9
bandwidth_efficiency = 1.0
attention_efficiency = 0.5
spread = 0.05
[peaks_tflops]
float32 = 0.8
bfloat16 = 1.6
[source]
"""


@pytest.fixture(scope="module")
def cpu(tmp_path_factory):
    keys = [line.split(" =")[0] for line in CPU.split("[peaks")[0].splitlines() if " = " in line]
    numbers = [k for k in keys if k not in ("name", "kind", "arch", "features")]
    text = CPU + "".join(f'{k} = "test"\n' for k in numbers)
    path = tmp_path_factory.mktemp("targets") / "desk.toml"
    path.write_text(text + '[source.peaks_tflops]\nfloat32 = "test"\nbfloat16 = "test"\n')
    return load_target(path)


def seconds(kernel, target, **options):
    return estimate(Work((kernel,)), target, **options).seconds


def w4(m, n, k):
    return Gemm(m, n, k, dtype=BF16, weight_bits=4, group_size=128)


@pytest.mark.parametrize("name", GPUS)
def test_four_bit_weights_win_for_one_row(name):
    target = load_target(name)
    for n, k in ((14336, 4096), (4096, 14336)):
        assert seconds(w4(1, n, k), target) < seconds(Gemm(1, n, k, dtype=BF16), target)


def test_four_bit_weights_lose_for_many_rows_and_cross_once():
    target = load_target("a100")
    wins = [
        seconds(w4(m, 11008, 4096), target) < seconds(Gemm(m, 11008, 4096, dtype=BF16), target)
        for m in (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    ]
    assert wins == sorted(wins, reverse=True)
    assert wins[0]
    assert not any(wins[-3:])


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("length", [256, 512, 1024, 4096])
def test_one_pass_attention_beats_three(name, length):
    target, heads, dim = load_target(name), 32, 128
    scores = heads * length * length * 2
    unfused = Work(
        (
            Gemm(length, length, dim, heads, BF16),
            Stream(scores, scores, heads * length * length, BF16),
            Stream(scores, scores, 5 * heads * length * length, BF16, "reduction"),
            Gemm(length, dim, length, heads, BF16),
        )
    )
    fused = Attention(1, heads, heads, length, length, dim, dim, dtype=BF16)
    assert seconds(fused, target) < estimate(unfused, target).seconds


def test_attention_of_short_rows_pays_for_whole_vectors_and_tiles(cpu):
    def over_torch(length, dim=16, machine=cpu, **fields):
        """Time of torch's kernel over ours."""
        ours, theirs = (
            seconds(
                Attention(64, 4, 4, length, length, dim, dim, library=library, **fields), machine
            )
            for library in ("ridgeline", "torch")
        )
        return theirs / ours

    assert 1 < over_torch(17, 64) < over_torch(32, 64), "17 rows are worked on as 32"
    assert 1 < over_torch(65, 64) < over_torch(64, 64)
    assert over_torch(24) > over_torch(17), "torch takes the last 8 keys one by one"
    assert over_torch(512, 64, causal=True) > over_torch(512, 64) > 1
    assert 1 < over_torch(17, backward=True) < over_torch(512, causal=True, backward=True)
    assert 1 < over_torch(65, 64, backward=True) < over_torch(64, 64, backward=True)
    assert over_torch(512, causal=True, backward=True) > 1.5
    amx = dataclasses.replace(cpu, features=cpu.features | {"amx_bf16"})
    assert over_torch(128, 64, amx, dtype=BF16) < 1 < over_torch(128, 64, dtype=BF16)


def test_attention_of_few_rows_reads_its_keys_once_for_a_group(cpu):
    ours = [
        seconds(Attention(1, 8, heads, 1, 256, 64, 64, library="ridgeline"), cpu)
        for heads in (2, 8)
    ]
    assert ours[0] < ours[1]


@pytest.mark.parametrize("name", GPUS)
def test_large_work_scales_linearly(name):
    target = load_target(name)
    gemm = [seconds(Gemm(8192, 8192, k, dtype=BF16), target) for k in (8192, 16384)]
    assert gemm[1] / gemm[0] == pytest.approx(2, rel=0.05)
    size = 8 * target.l2_bytes
    stream = [seconds(Stream(b, b), target) for b in (size, 2 * size)]
    assert stream[1] / stream[0] == pytest.approx(2, rel=0.05)
    heads = [
        seconds(Attention(b, 32, 32, 4096, 4096, 128, 128, True, BF16), target) for b in (8, 16)
    ]
    assert heads[1] / heads[0] == pytest.approx(2, rel=0.06)  # a measured machine's residual


@pytest.mark.parametrize("name", GPUS)
def test_a_large_gemm_reaches_its_product_s_efficiency(name):
    target = load_target(name)
    gemm = Gemm(16384, 16384, 16384, dtype=BF16)
    reached = gemm.flops / seconds(gemm, target) / target.peak(BF16)
    assert reached == pytest.approx(target.gemm_efficiency, rel=0.08)


@pytest.mark.parametrize("name", [*GPUS, "cpu"])
def test_monotone_in_each_dimension(name, cpu):
    target = cpu if name == "cpu" else load_target(name)
    sizes = (8, 16, 128, 1024, 8192)  # whole 16-byte rows: others take a slower path
    base = {"m": 256, "n": 1024, "k": 1024}
    for dim in base:
        grown = [seconds(Gemm(**{**base, dim: s}, dtype=BF16), target) for s in sizes]
        assert all(b >= 0.95 * a for a, b in itertools.pairwise(grown))  # tile steps
    streams = [seconds(Stream(4**e, 4**e), target) for e in range(18)]
    assert streams == sorted(streams)
    decode = [seconds(Attention(4, 32, 8, 1, s, 128, 128, True, BF16), target) for s in sizes]
    assert decode == pytest.approx(sorted(decode), rel=1e-4)


@pytest.mark.parametrize("name", [*GPUS, "cpu"])
def test_no_nan_for_empty_work(name, cpu):
    target = cpu if name == "cpu" else load_target(name)
    assert estimate(Work(), target).seconds == 0
    kernels = [Gemm(m, n, k, dtype=BF16) for m, n, k in itertools.product((0, 3), repeat=3)]
    kernels += [Attention(1, 2, 2, q, kv, 8, 8) for q, kv in itertools.product((0, 3), repeat=2)]
    kernels += [Stream(0, 0), Attention(0, 0, 0, 4, 4, 8, 8)]
    for kernel in kernels:
        cost = estimate(Work((kernel,)), target)
        for figure in (cost.seconds, cost.low, cost.high, cost.eflops, cost.energy_joules):
            assert math.isfinite(figure)
        assert cost.low <= cost.seconds <= cost.high


def test_what_bounds(cpu):
    a100 = load_target("a100")
    assert estimate(Work((Gemm(8192, 8192, 8192, dtype=BF16),)), a100).bound == "compute"
    assert estimate(Work((Gemm(1, 16384, 16384, dtype=BF16),)), a100).bound == "memory"
    assert estimate(Work((Stream(64, 64),)), a100).bound == "launch"
    reduce = Work((Collective("all_reduce", 2**28, 8),))
    assert estimate(reduce, a100).bound == "communication"
    with pytest.raises(InvalidTarget, match="link_gb_per_s"):
        estimate(reduce, cpu)


def test_sums_add():
    a100 = load_target("a100")
    parts = Work((Gemm(64, 64, 64),)), Work((Stream(1e6, 1e6, 7),))
    total, one, two = (estimate(w, a100) for w in (parts[0] + parts[1], *parts))
    for field in ("seconds", "low", "high", "bytes", "flops", "eflops", "energy_joules"):
        assert getattr(total, field) == pytest.approx(getattr(one, field) + getattr(two, field))


def test_eager_launch_is_bound_by_the_host():
    a100 = load_target("a100")
    small = Work((Stream(64, 64),) * 100)
    graph, eager = (estimate(small, a100, launch=mode) for mode in ("graph", "eager"))
    assert eager.seconds == pytest.approx(100 * a100.eager_launch_s + graph.seconds / 100)
    assert graph.seconds < eager.seconds
    with pytest.raises(ValueError, match="'graph' or 'eager'"):
        estimate(small, a100, launch="lazy")


def test_eflops_charge_memory_at_the_unit_s_intensity():
    a100 = load_target("a100")
    gemm = Gemm(16, 256, 256, dtype=BF16)
    cost = estimate(Work((gemm,)), a100)
    assert cost.eflops == pytest.approx(gemm.flops + 312e12 / 2.039e12 * cost.bytes)


def test_integer_weights_save_energy_and_time_on_a_cpu(cpu):
    plain, packed = Gemm(1, 4096, 4096, dtype=BF16), w4(1, 4096, 4096)
    dense, four = (estimate(Work((k,)), cpu) for k in (plain, packed))
    assert four.seconds < dense.seconds
    assert four.energy_joules < dense.energy_joules


@pytest.fixture(scope="module")
def slow(cpu):
    """It has no instruction for bf16, which torch's loop takes 10 times as long for as for fp32, as
    on Zen 3; our kernels widen there."""
    return dataclasses.replace(cpu, peaks={**cpu.peaks, "bfloat16": 0.08e12})


@pytest.mark.parametrize("scheme", ["symmetric", "shift", "binary"])
@pytest.mark.parametrize("m", [63, 64, 256])
def test_coded_weights_are_multiplied_in_fp32_where_the_cpu_is_slow_at_bf16(slow, m, scheme):
    def compute(dtype, **weights):
        return cpu_time._gemm_compute(Gemm(m, 4096, 4096, dtype=dtype, **weights), slow)

    coded = {"weight_bits": 3, "scheme": scheme}
    assert compute(BF16, **coded) == compute(torch.float32, **coded)
    assert compute(BF16) > 9 * compute(torch.float32)


@pytest.mark.parametrize(("q", "kv"), [(1, 1024), (256, 256)])
@pytest.mark.parametrize("backward", [False, True])
def test_attention_is_multiplied_in_fp32_where_the_cpu_is_slow_at_bf16(slow, q, kv, backward):
    def taken(dtype):
        shape = (1, 8, 8, q, kv, 64, 64)
        kernel = Attention(*shape, dtype=dtype, backward=backward, library="ridgeline")
        return multiply_adds(kernel, slow)

    assert taken(BF16) == taken(torch.float32)


def test_cpu_reads_at_the_speed_of_the_cache_that_holds_the_data(cpu):
    for bytes_moved, speed in ((2**17, 1000e9), (2**21, 400e9), (2**28, 40e9)):
        fork = cpu.fork_s if bytes_moved > 2**17 else 0.0
        expected = cpu.launch_s + fork + bytes_moved / speed
        assert seconds(Stream(bytes_moved / 2, bytes_moved / 2), cpu) == pytest.approx(expected)


def test_shipped_folder_is_what_names_list():
    assert sorted(p.stem for p in FOLDER.glob("*.toml")) == sorted(ALL_GPUS)


def coded(bits, scheme, dtype, m=1, n=4096, k=11008, **options):
    return Gemm(
        m, n, k, dtype=dtype, weight_bits=bits, group_size=128, scheme=scheme,
        stored=torch.float32, **options,
    )  # fmt: skip


@pytest.mark.parametrize("size", [2048, (4096, 11008)], ids=str)
def test_lookups_win_at_two_bits_and_lose_at_four_on_a_cpu(cpu, size):
    n, k = size if isinstance(size, tuple) else (size, size)
    plain = seconds(coded(4, "symmetric", BF16, n=n, k=k), cpu)
    lookup = {q: seconds(coded(q, "binary", torch.int16, n=n, k=k), cpu) for q in (2, 3, 4)}
    assert lookup[2] < plain < lookup[4]
    assert lookup[2] < lookup[3] < lookup[4]


def test_two_bits_from_memory_are_bound_by_it(cpu):
    model = {"resident_bytes": 1e9}
    cost = estimate(Work((coded(2, "binary", torch.int16),)), cpu, **model)
    assert cost.bound == "memory"
    assert cost.seconds < seconds(coded(4, "symmetric", BF16), cpu, **model) / 1.5


def test_many_rows_lose_by_lookup_and_win_decoded_first(cpu):
    many = {"m": 256, "n": 1024, "k": 1024}
    lookup = seconds(coded(2, "binary", torch.int16, **many), cpu)
    assert lookup > 1.2 * seconds(coded(2, "binary", BF16, **many), cpu)


@pytest.mark.parametrize("name", ["a100", "h100", "l4"])
def test_planes_cost_a_gpu_arithmetic_and_save_it_bytes(name):
    target = load_target(name)
    binary = {q: seconds(coded(q, "binary", BF16), target) for q in (2, 4)}
    assert binary[2] < seconds(coded(4, "symmetric", BF16), target) < binary[4]
    assert seconds(coded(5, "shift", BF16, terms=1), target) < seconds(
        coded(8, "shift", BF16, terms=2), target
    )


def test_binary_attention_is_additions(cpu):
    attention = BinaryAttention(1, 8, 1024, 1024, 64, 64)
    softmax = Attention(1, 8, 8, 1024, 1024, 64, 64)
    for target in (cpu, load_target("a100")):
        assert 0 < seconds(attention, target) < 2 * seconds(softmax, target)
    assert seconds(attention, cpu) < seconds(softmax, cpu)
