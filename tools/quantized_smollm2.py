"""SmolLM2-135M with its decoder's linear layers held as codes: the artefacts that figures are of.

Each is made by `ridgeline.reparameterize` from the fp32 model and the calibration text (State of
the Union 1981-2000), which takes 5 to 20 minutes on two cores, and kept in the cache folder, so
that accuracy and speed are quoted for the same codes.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

import ridgeline
from ridgeline.passes.quantized_model import summary
from ridgeline.tools import smollm2
from ridgeline.tools.progress import stage_bars


@dataclass(frozen=True, slots=True)
class Configuration:
    """method and options of `ridgeline.reparameterize`."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)


_VERSION = 1
"""Raise it when the way of making artefacts changes; older ones are then made anew."""

CONFIGURATIONS = {
    "4 bit, scale + minimum": Configuration("quantized_linear", {"bits": 4}),
    "3 bit, binary": Configuration("shift_add_linear", {"bits": 3}),
    "mixed 2/3/4, 3 on average": Configuration("shift_add_linear", {"average_bits": 3.0}),
    "2 bit, binary": Configuration("shift_add_linear", {"bits": 2}),
}


def quantized(name: str, model: nn.Module, tokenizer: Any, console: Console) -> nn.Module:
    """The artefact `name` of CONFIGURATIONS, from the cache or made now."""
    folder = smollm2.cache_directory() / "quantized" / _folder_name(name)
    if not (folder / "config.json").exists():
        made = reparameterized(CONFIGURATIONS[name], model, tokenizer, console, folder / "layers")
        ridgeline.save_quantized(made, folder, original=model, calibrated_on=smollm2.CALIBRATED_ON)
    return ridgeline.load_quantized(smollm2.load_model(), folder)


def reparameterized(
    configuration: Configuration,
    model: nn.Module,
    tokenizer: Any,
    console: Console,
    folder: Path | None = None,
) -> nn.Module:
    """Made now, with a bar per stage."""
    with stage_bars(console) as progress:
        made = ridgeline.reparameterize(
            model,
            configuration.method,
            calibration=smollm2.calibration_text(),
            tokenizer=tokenizer,
            folder=folder,
            progress=progress,
            **configuration.options,
        )
    console.print(f"{configuration.options}: {summary(made)}", markup=False)
    return made


def _folder_name(name: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in name).split()
    return "-".join((*words, f"v{_VERSION}"))
