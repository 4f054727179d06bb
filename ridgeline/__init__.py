"""ridgeline: rewrite a PyTorch model for one machine, and account for every step."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ridgeline import cost_model, nn, passes
    from ridgeline.cost_model import load_target, target_names
    from ridgeline.ir.errors import RidgelineError
    from ridgeline.passes import PASSES, optimize, reparameterize
    from ridgeline.passes.parallel import parallelize, plan_parallel
    from ridgeline.passes.quantization import bits_per_weight, load_quantized, save_quantized

__version__ = "0.1.0"

__all__ = [
    "PASSES",
    "RidgelineError",
    "__version__",
    "bits_per_weight",
    "cost_model",
    "load_quantized",
    "load_target",
    "nn",
    "optimize",
    "parallelize",
    "passes",
    "plan_parallel",
    "reparameterize",
    "save_quantized",
    "target_names",
]

_MODULES = ("cost_model", "nn", "passes")

_HOMES = {
    "PASSES": "ridgeline.passes",
    "RidgelineError": "ridgeline.ir.errors",
    "bits_per_weight": "ridgeline.passes.quantization",
    "load_quantized": "ridgeline.passes.quantization",
    "load_target": "ridgeline.cost_model",
    "optimize": "ridgeline.passes",
    "parallelize": "ridgeline.passes.parallel",
    "plan_parallel": "ridgeline.passes.parallel",
    "save_quantized": "ridgeline.passes.quantization",
    "reparameterize": "ridgeline.passes",
    "target_names": "ridgeline.cost_model",
}


def __getattr__(name: str) -> Any:
    """Public names are imported at first use: what they need (sympy, scipy) takes a second."""
    if name in _MODULES:
        return importlib.import_module(f"ridgeline.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'ridgeline' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value
