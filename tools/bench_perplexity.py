"""What 4 bits do to SmolLM2-135M: round to nearest, data-free search, GPTQ, and the lossless form.

Every decoder linear is replaced by its dequantised weight; embedding, head and norms stay. Eight
windows of 512 tokens of State of the Union 2009-2021; GPTQ sees 32 windows of 1981-2000.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ridgeline.passes.quantization import (
    Codec,
    QuantizedWeight,
    calibration_free,
    collect_hessians,
    gptq,
    round_to_nearest,
)
from ridgeline.tools import perplexity, smollm2

Quantizer = Callable[[str, Tensor], QuantizedWeight]
WINDOW, EVALUATION, CALIBRATION = 512, 8, 32


def results() -> dict[str, perplexity.Perplexity]:
    """Perplexity, agreement and KL by method, against the fp32 model. Takes several minutes."""
    model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()

    def tokens(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, verbose=False).input_ids)

    text = perplexity.windows(tokens(smollm2.evaluation_text()), EVALUATION, WINDOW)
    seen = perplexity.windows(tokens(smollm2.calibration_text()), CALIBRATION, WINDOW)
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    hessians = collect_hessians(model, layers, list(seen[:, None]))
    zero, symmetric = (Codec(4, 64, scheme) for scheme in ("zero_point", "symmetric"))
    methods: dict[str, Quantizer] = {
        "scale + minimum, group 32": lambda name, w: round_to_nearest(w, Codec(4, 32, "minimum")),
        "round to nearest, zero point, group 64": lambda name, w: round_to_nearest(w, zero),
        "data-free search, zero point, group 64": lambda name, w: calibration_free(w, zero),
        "GPTQ, zero point, group 64": lambda name, w: gptq(w, zero, hessians[name]),
        "GPTQ, symmetric, group 64": lambda name, w: gptq(w, symmetric, hessians[name]),
    }
    figures = {"fp32": perplexity.evaluate(model, text, model)}
    for title, method in methods.items():
        figures[title] = perplexity.evaluate(_quantized(model, layers, method), text, model)
    return figures


@torch.no_grad()
def _quantized(model: nn.Module, layers: list[str], method: Quantizer) -> nn.Module:
    """A copy of the model whose `layers` hold what `method` makes of their weights."""
    changed = copy.deepcopy(model)
    for name in layers:
        weight = changed.get_submodule(name).weight
        weight.copy_(method(name, weight.detach()).dequantize())
    return changed
