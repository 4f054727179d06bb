"""`ridgeline bench`: interleaved rounds on this machine, named baselines, ratios, spread."""

import torch
from rich.console import Console
from rich.text import Text

from ridgeline.cost_model import load_target
from ridgeline.tools import (
    bench_attention,
    bench_choose,
    bench_group_rational,
    bench_linear,
    bench_lookup,
    bench_norm,
    bench_pointwise,
    bench_tensor_parallel,
)
from ridgeline.tools.allocator import keep_freed_memory
from ridgeline.tools.timing import dram_read_bandwidth

PROMPT, NEW, TOLERANCE = 256, 64, 0.02


def linear(rounds: int, console: Console) -> None:
    """The 4-bit linear layer 4096 -> 11008, weights cold, against torch's own kernels."""
    with torch.inference_mode():
        ceiling = dram_read_bandwidth()
        for m in (1, 4, 16, 64):
            timings, bytes_read = bench_linear.rounds(m, samples=rounds)
            console.print(timings.table(f"{m} x 4096 -> 11008, cold", bytes_read, ceiling))


def lookup(rounds: int, console: Console) -> None:
    """Binary-coded linear layers by table lookup, weights cold, against 4-bit kernels."""
    with torch.inference_mode():
        ceiling = dram_read_bandwidth()
        for n, k in bench_lookup.SHAPES:
            timings, bytes_read, errors = bench_lookup.rounds(n, k, samples=rounds)
            console.print(timings.table(f"1 x {k} -> {n}, cold", bytes_read, ceiling))
            for name, error in errors.items():
                console.print(Text(f"{name:20s} error {error:.1e}"))


def attention(rounds: int, console: Console) -> None:
    """Attention against scaled_dot_product_attention: causal prefill, training and decoding."""
    for title, timings in bench_attention.cases(rounds):
        console.print(timings.table(title))


def training(rounds: int, console: Console) -> None:
    """A training step of a small Llama: eager, torch.compile, ridgeline's two doors."""
    from ridgeline.tools import bench_training

    title = f"a training step, {bench_training.BATCH} x {bench_training.LENGTH} tokens"
    console.print(bench_training.run(rounds).table(title))


def group_rational(rounds: int, console: Console) -> None:
    """The rational function of KAT against eager PyTorch and Inductor, with gradient errors."""
    keep_freed_memory()  # for all alike: results come and go, and faults would outweigh the kernels
    for title, timings in bench_group_rational.cases(rounds):
        console.print(timings.table(title))
    for title, timings in bench_group_rational.norms(rounds):
        console.print(timings.table(title))
    for title, timings in bench_group_rational.activations(rounds):
        console.print(timings.table(title))
    for name, (dx, da, db) in bench_group_rational.errors().items():
        console.print(Text(f"{name:16s} error of dx {dx:.1e}, da {da:.1e}, db {db:.1e}"))


def norm(rounds: int, console: Console) -> None:
    """RMSNorm and LayerNorm of a residual sum, against Inductor's kernels and eager torch."""
    with torch.inference_mode(False), torch.no_grad():
        for title, timings in bench_norm.cases(rounds, load_target("cpu")):
            console.print(timings.table(title))


def gated(rounds: int, console: Console) -> None:
    """SwiGLU's gate, against Inductor's loops and eager torch."""
    with torch.inference_mode(False), torch.no_grad():
        for title, timings in bench_pointwise.gates(rounds, load_target("cpu")):
            console.print(timings.table(title))


def rotary(rounds: int, console: Console) -> None:
    """The rotary embedding of queries and keys, against Inductor's loops and eager torch."""
    with torch.inference_mode(False), torch.no_grad():
        for title, timings in bench_pointwise.rotations(rounds, load_target("cpu")):
            console.print(timings.table(title))


def choose(rounds: int, console: Console) -> None:
    """The joint choice among 100 to 10,000 options."""
    for count, seconds, taken in bench_choose.cases(rounds):
        console.print(Text(f"{count:6d} options: {seconds * 1e3:8.1f} ms, {taken} taken"))


def decode(rounds: int, console: Console) -> None:
    """SmolLM2-135M: tokens per second of prefill and decode at batch 1."""
    from ridgeline.tools import bench_decode

    names = ["compile-fp32", "compile-bf16", "ridgeline-fp32"]
    if bench_decode.has_llama_cpp():
        names.append("llama.cpp")
    else:
        console.print("llama.cpp: not measured (pip install llama-cpp-python)")
    ids = bench_decode.prompt_ids(PROMPT)
    sessions = {
        name: bench_decode.build(name, ids, NEW, "static", tolerance=TOLERANCE) for name in names
    }
    prefill, steps = bench_decode.compare(sessions, baseline="compile-bf16", rounds=rounds)
    for what, timings, tokens in (("prefill", prefill, PROMPT), ("decode", steps, NEW)):
        console.print(timings.table(f"SmolLM2-135M {what}, {tokens} tokens, batch 1"))
        print_rates(bench_decode.rates(timings, tokens), what, console)


def perplexity(rounds: int, console: Console) -> None:
    """SmolLM2-135M after 4-bit quantisation by each method; `rounds` is not used."""
    from ridgeline.tools import bench_perplexity
    from ridgeline.tools.perplexity import table

    for line in table(bench_perplexity.results(), "fp32"):
        console.print(Text(line))


def shift_add(rounds: int, console: Console) -> None:
    """SmolLM2-135M in 2 to 4 bits, on two texts; `rounds` is not used."""
    from ridgeline.tools import bench_shift_add

    console.print(bench_shift_add.table(bench_shift_add.results(console)))


def shift_add_decode(rounds: int, console: Console) -> None:
    """Tokens per second of the same artefacts, beside fp32, bf16 and lossless 4 bits."""
    from ridgeline.tools import bench_shift_add_decode

    bench_shift_add_decode.run(rounds, console)


def tensor_parallel(rounds: int, console: Console) -> None:
    """Residual adds and norms of a split model, on 2 and 4 gloo ranks that this starts."""
    for world in bench_tensor_parallel.WORLDS:
        rows = bench_tensor_parallel.measure(world, rounds=rounds)
        console.print(bench_tensor_parallel.table(world, rows))
        console.print(Text(bench_tensor_parallel.verdict(rows)))


def print_rates(rates, what: str, console: Console) -> None:
    """Tokens per second of each contender, with quartiles."""
    for name, rate in rates.items():
        spread = f"[{rate.lower:.1f}, {rate.upper:.1f}]"
        console.print(Text(f"{what:8s} {name:16s} {rate.median:8.1f} {spread} tokens/s"))


def predict(rounds: int, console: Console) -> None:
    """The cost model's prediction of one kernel, by kind of kernel."""
    from ridgeline.tools import bench_predict

    console.print(bench_predict.table(rounds))
