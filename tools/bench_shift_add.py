"""What few bits do to SmolLM2-135M: ShiftAdd and 4-bit layers beside rounding to nearest and GPTQ.

Decoder linears are quantised; embedding, head and norms keep their dtype (distillation tunes the
norms' weights). Figures against the fp32 model on eight windows of 512 tokens each of

    text A   State of the Union 2009-2021, by which methods were chosen
    text B   Moby-Dick, chapters 1-20, by which nothing was

Calibration, for all methods: State of the Union 1981-2000, 32 windows for Hessians, all of it for
distillation. Bits per weight count scales, offsets and what else stands beside the codes.
"""

import copy
from collections.abc import Iterator, Mapping

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ridgeline
from ridgeline.passes.quantization import (
    Codec,
    QuantizedWeight,
    collect_hessians,
    gptq,
    round_to_nearest,
)
from ridgeline.tools import perplexity, smollm2
from ridgeline.tools.perplexity import Perplexity
from ridgeline.tools.quantized_smollm2 import CONFIGURATIONS, quantized

WINDOW, EVALUATION, CALIBRATION = 512, 8, 32
BASELINES = {
    "round to nearest, zero point, group 64": Codec(4, 64, "zero_point"),
    "GPTQ, 4 bit, zero point, group 128": Codec(4, 128, "zero_point"),
    "GPTQ, 3 bit, zero point, group 64": Codec(3, 64, "zero_point"),
}

Row = tuple[float, Perplexity, Perplexity]
"""Bits per weight, and the figures on texts A and B."""


def results(console: Console) -> dict[str, Row]:
    """The rows by name. Takes an hour on two cores the first time, minutes later."""
    model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()

    def windows(text: str, count: int) -> Tensor:
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
        return perplexity.windows(ids, count, WINDOW)

    texts = [windows(t(), EVALUATION) for t in (smollm2.evaluation_text, smollm2.second_text)]
    held = {name: (bits, m) for name, bits, m in _models(model, tokenizer, windows, console)}
    models = {name: m for name, (_, m) in held.items()}
    first, second = (perplexity.compare(models, text, model) for text in texts)
    return {name: (bits, first[name], second[name]) for name, (bits, _) in held.items()}


def table(rows: Mapping[str, Row]) -> Table:
    """All figures side by side."""
    shown = Table("", "bits/weight", title="SmolLM2-135M: text A | text B")
    for column in ("perplexity", "KL to fp32", "agreement"):
        shown.add_column(column, justify="right")
    for name, (bits, *texts) in rows.items():
        shown.add_row(
            name,
            f"{bits:.2f}",
            " | ".join(f"{t.ppl:.2f}" for t in texts),
            " | ".join(f"{t.kl or 0.0:.3f}" for t in texts),
            " | ".join(f"{t.agreement or 0.0:.1%}" for t in texts),
        )
    return shown


def _models(
    model: nn.Module, tokenizer, windows, console: Console
) -> Iterator[tuple[str, float, nn.Module]]:
    yield "fp32", 32.0, model
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    lossless = Codec(4, 32, "minimum")
    yield _rounded(model, names, "4 bit, scale + minimum per 32", lossless, {})
    seen = list(windows(smollm2.calibration_text(), CALIBRATION)[:, None])
    hessians = collect_hessians(model, names, seen)
    for title, codec in BASELINES.items():
        yield _rounded(model, names, title, codec, hessians if "GPTQ" in title else {})
    hessians.clear()
    for name in CONFIGURATIONS:
        made = quantized(name, model, tokenizer, console)
        yield name, ridgeline.bits_per_weight(made), made


@torch.no_grad()
def _rounded(
    model: nn.Module, names: list[str], title: str, codec: Codec, hessians: dict[str, Tensor]
) -> tuple[str, float, nn.Module]:
    """A copy of the model whose layers hold what a baseline makes of their weights."""
    changed, held, weights = copy.deepcopy(model), 0, 0
    for name in names:
        weight = changed.get_submodule(name).weight
        coded: QuantizedWeight = (
            gptq(weight, codec, hessians[name]) if hessians else round_to_nearest(weight, codec)
        )
        weight.copy_(coded.dequantize())
        held, weights = held + coded.nbytes, weights + weight.numel()
    return title, 8 * held / weights, changed
