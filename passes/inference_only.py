"""Results of code that was compiled for inference, called where gradients are recorded.

A model in eval mode is compiled for inference: without what a backward needs, with folded and
quantised weights. PyTorch would give its results gradients all the same, where gradients are
enabled and a parameter requires one. Such results are marked as they would be, and whoever asks for
their gradients gets an error that says what to do, never a gradient that lacks a part.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ridgeline.ir.call import Call
from ridgeline.ir.errors import RidgelineError


class GradientError(RidgelineError, RuntimeError):
    """Gradients of results that were computed for inference."""


class _ForInference(torch.autograd.Function):
    """The identity, for results without history."""

    @staticmethod
    def forward(ctx: Any, results: Sequence[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise GradientError(
            "gradients are asked for through an optimised model in eval mode, whose code is for"
            " inference; to have code with a backward, call train() before the forward, or give it"
            " an input that requires gradients; if the model's parameters are to get none, wrap the"
            " call in torch.no_grad(), or call requires_grad_(False) on the model"
        )


def trainable(modules: Sequence[nn.Module]) -> list[Tensor]:
    """The modules' own parameters that require gradients."""
    held = (p for module in modules for p in module._parameters.values())
    return [p for p in held if p is not None and p.requires_grad]


def marked(
    outputs: Sequence[Any], results: int, call: Call, modules: Sequence[nn.Module]
) -> Sequence[Any]:
    """`outputs`, the first `results` of which are what the model returns, marked where gradients
    are recorded: those that hold floating numbers and are neither the call's own nor a cache's."""
    if not torch.is_grad_enabled():
        return outputs
    given = {id(x) for x in (*call.flat, *outputs[results:])}
    at = [
        i
        for i, x in enumerate(outputs[:results])
        if isinstance(x, Tensor)
        and (x.is_floating_point() or x.is_complex())
        and not (x.requires_grad or id(x) in given)
    ]
    if not at or not (parameters := trainable(modules)):
        return outputs
    whole = list(outputs)
    distinct = {id(outputs[i]): outputs[i] for i in at}  # one tensor may be returned twice
    made = _ForInference.apply(list(distinct.values()), *parameters)
    known = dict(zip(distinct, made, strict=True))
    for i in at:
        whole[i] = known[id(outputs[i])]
    return whole
