"""Results of code that was compiled for inference, called where gradients are recorded.

A model in eval mode is compiled for inference: without what a backward needs, with folded and
quantised weights. PyTorch would give its results gradients all the same, where gradients are
enabled and a parameter that they depend on requires one. Such results are marked as they would be,
and whoever asks for their gradients gets an error that says what to do, never a gradient that lacks
a part.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.gradient_sources import Sources

HAS_BACKWARD = (
    "a kind of call in eval mode has code with a backward, and its weights are not quantised, since"
    " an input requires gradients, as a state does that an earlier call returned; if none are"
    " wanted, make the calls in torch.no_grad()"
)
"""What a plan says where an input turns a call of a model in eval mode into one that trains."""


class GradientError(RidgelineError, RuntimeError):
    """Gradients of results that were computed for inference."""


class _ForInference(torch.autograd.Function):
    """The results as new tensors on the same memory, with a history that ends at `parameter`: what
    came may be a view or the caller's own, which must not be given one."""

    @staticmethod
    def forward(ctx: Any, results: Sequence[Tensor], parameter: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise GradientError(
            "gradients are asked for through an optimised model in eval mode, whose code is for"
            " inference; to have code with a backward, call train() before the forward, or give it"
            " an input that requires gradients; if the model's parameters are to get none, wrap the"
            " call in torch.no_grad(), or call requires_grad_(False) on the model"
        )


def marked(outputs: Sequence[Any], sources: Sources) -> Sequence[Any]:
    """`outputs` of inference code, marked where gradients are recorded: those of which one of the
    `sources` requires a gradient now."""
    if not sources or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return outputs
    history: dict[int, tuple[Tensor, list[int]]] = {}  # by parameter: it, and what it reaches
    for tensors, at in sources:
        parameter = next((t for t in tensors if t.requires_grad), None)
        if parameter is not None:
            _, reached = history.setdefault(id(parameter), (parameter, []))
            reached += [i for i in at if not outputs[i].requires_grad]  # not a parameter itself
    whole = list(outputs)
    for parameter, reached in history.values():
        distinct = {id(outputs[i]): outputs[i] for i in reached}  # one may be returned twice
        made = _ForInference.apply(list(distinct.values()), parameter) if distinct else ()
        known = dict(zip(distinct, made, strict=True))
        for i in reached:
            whole[i] = known[id(outputs[i])]
    return whole
