"""What can go wrong with a reparameterised model."""

from ridgeline.ir.errors import RidgelineError


class ShiftAddError(RidgelineError, ValueError):
    """An option, a model or a call that ShiftAddViT's reparameterisation cannot take."""
