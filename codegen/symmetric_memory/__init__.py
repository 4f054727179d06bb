"""Symmetric memory without devices: the signal protocol of the fused AllReduce + norm kernels as
steps (`protocol`), every interleaving of them (`check`), and their arithmetic on tensors
(`emulate`)."""

from ridgeline.codegen.symmetric_memory.check import Exploration, StateLimit, explore
from ridgeline.codegen.symmetric_memory.emulate import Deadlock, Launch, Result, emulate
from ridgeline.codegen.symmetric_memory.protocol import (
    DivergentGrids,
    InvalidRun,
    Protocol,
    Run,
    Step,
)

__all__ = [
    "Deadlock",
    "DivergentGrids",
    "Exploration",
    "InvalidRun",
    "Launch",
    "Protocol",
    "Result",
    "Run",
    "StateLimit",
    "Step",
    "emulate",
    "explore",
]
