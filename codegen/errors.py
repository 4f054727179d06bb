"""Errors of code generation."""

from ridgeline.ir.errors import RidgelineError


class BackendMissing(RidgelineError):
    """A compiler or tool that the requested target needs is not installed."""


class UnknownArchitecture(RidgelineError):
    """An architecture string for which no limits and no instruction names are recorded."""


class UnsupportedProblem(RidgelineError):
    """Shapes, dtypes or devices that a kernel does not compute."""


class KernelRejected(RidgelineError):
    """Compiled code that does not keep what a kernel promises (spills, instructions, memory)."""
