"""Decoding speed of SmolLM2-135M in few bits, of the artefacts that `bench shift-add` measures.

Contenders decode greedily at batch 1 from one prompt, interleaved: torch.compile in fp32 and bf16,
the lossless 4-bit form that `optimize(model, tolerance=0.02)` finds, and each artefact compiled by
`optimize(artefact, tolerance=0.02)`, whose head is held in 4 bits too.
"""

import torch
from rich.console import Console

import ridgeline
from ridgeline.tools import bench_decode, smollm2
from ridgeline.tools.quantized_smollm2 import CONFIGURATIONS, quantized

PROMPT, NEW, TOLERANCE = 64, 64, 0.02
BASELINES = ("compile-fp32", "compile-bf16", "ridgeline-fp32")


def run(rounds: int, console: Console) -> None:
    """Print a table of times and the rates."""
    from ridgeline.tools.bench import print_rates

    model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
    ids = bench_decode.prompt_ids(PROMPT)
    sessions = {}
    for name in BASELINES:
        console.print(f"compiling {name}")
        sessions[name] = bench_decode.build(name, ids, NEW, "static", tolerance=TOLERANCE)
    for name in CONFIGURATIONS:
        console.print(f"compiling {name}")
        fast = ridgeline.optimize(
            quantized(name, model, tokenizer, console), target="cpu", tolerance=TOLERANCE
        )
        sessions[name] = bench_decode.TorchSession(
            fast, model.config, ids, NEW, cache="static", dtype=torch.float32
        )
    console.print("timing")
    _, decode = bench_decode.compare(sessions, baseline="compile-fp32", rounds=rounds)
    console.print(decode.table(f"SmolLM2-135M decode, {NEW} tokens after {PROMPT}, batch 1"))
    print_rates(bench_decode.rates(decode, NEW), "decode", console)
