"""What do we know about models? One file per rewrite, the order in `PASSES`, and `optimize`."""

from ridgeline.passes.all import PASSES
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.optimize import optimize
from ridgeline.passes.rational_activation import RATIONAL_ACTIVATION
from ridgeline.passes.reparameterize import reparameterize

__all__ = [
    "PASSES",
    "RATIONAL_ACTIVATION",
    "Candidate",
    "Pass",
    "Setting",
    "optimize",
    "reparameterize",
]
