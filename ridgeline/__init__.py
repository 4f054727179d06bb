"""ridgeline: rewrite a PyTorch model for one machine, and account for every step."""

from ridgeline import nn
from ridgeline.cost_model import load_target, target_names
from ridgeline.ir.errors import RidgelineError
from ridgeline.passes import PASSES, optimize

__version__ = "0.1.0"

__all__ = [
    "PASSES",
    "RidgelineError",
    "__version__",
    "load_target",
    "nn",
    "optimize",
    "target_names",
]
