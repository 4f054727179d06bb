"""Which layers of a model can be held as codes, and why others stay."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ridgeline.passes.ignore import check_ignore, ignored
from ridgeline.passes.quantization import Codec, QuantizationError

SMALLEST = 64
"""Layers with fewer inputs or outputs stay: their weights are no traffic to speak of."""


@dataclass(frozen=True, slots=True)
class Requantized:
    """One line of a reparameterised model's report: a layer, its codec, or why it stays."""

    path: str
    codec: Codec | None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.codec or self.reason}"


def is_linear(module: nn.Module) -> bool:
    """Is it nn.Linear or a subclass, or transformers' Conv1D, a linear layer turned?"""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def unfit(module: nn.Module, parent: nn.Module | None) -> str:
    """Why a linear layer computes something else than x Wᵀ + b of its own weight, or is not called
    at all; empty where it can be replaced."""
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks, which see or change what it computes"
    if hasattr(module, "parametrizations"):
        return "its weight is computed (a parametrization); remove it first"
    return ""


def quantizable(model: nn.Module, ignore: Sequence[str]) -> tuple[list[str], list[Requantized]]:
    """Names of the layers that can be held as codes, and why others stay.

    Raises QuantizationError where there is none, or `ignore` cannot be used.
    """
    check_ignore(model, ignore, QuantizationError)
    embeddings = {
        id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    names: list[str] = []
    stay: list[Requantized] = []
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        reason = unfit(module, parents.get(module))
        if ignored(name, ignore):
            reason = "listed in ignore="
        elif module is head or id(module.weight) in embeddings:
            reason = "the output head stays: its errors are the model's own"
        elif not reason and min(module.weight.shape) < SMALLEST:
            reason = f"{tuple(module.weight.shape)} is too small to be worth it"
        if reason:
            stay.append(Requantized(name, None, reason))
        else:
            names.append(name)
    if "" in names:
        raise QuantizationError("the model is a linear layer; put it into an nn.Sequential")
    if not names:
        said = "; ".join(map(str, stay)) or "the model has no linear layer"
        raise QuantizationError(f"nothing to quantise: {said}")
    return names, stay
