"""Exact preparation for low bits: rotations and scales folded into neighbouring weights."""

from ridgeline.passes.preparation.prove import UnprovenError
from ridgeline.passes.preparation.rotation import Prepared, rotation

__all__ = ["Prepared", "UnprovenError", "rotation"]
