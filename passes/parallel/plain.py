"""Layers that compute what their class says, which alone can be replaced by a rank's part of them.

A hook, a forward that was set on the object, a weight that is computed before each call (weight
normalisation, spectral normalisation, pruning) are no part of the class: a rank's layer, made anew
from the weights, would drop them in silence.
"""

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ridgeline.passes.copy_model import rebound
from ridgeline.passes.watched import RUN_HOOKS


def is_linear(module: object) -> bool:
    """An `nn.Linear`, or transformers' Conv1D, whose weight is (in, out)."""
    return type(module) is nn.Linear or _of_transformers(module, "Conv1D")


def is_embedding(module: Any) -> bool:
    """An `nn.Embedding` that only looks rows up, or Gemma's, which multiplies them by a scale."""
    scaled = _of_transformers(module, "TextScaledWordEmbedding")
    return (type(module) is nn.Embedding or scaled) and module.max_norm is None


def _of_transformers(module: object, ending: str) -> bool:
    kind = type(module)
    return kind.__name__.endswith(ending) and kind.__module__.startswith("transformers.")


def changed(module: nn.Module) -> str | None:
    """Why a layer does not compute what its class says; None where it does."""
    if parametrize.is_parametrized(module):
        return f"has a computed {', '.join(module.parametrizations)} (parametrizations)"
    held = module.__dict__
    computed = [n for n in ("weight", "bias") if n in held and n not in module._parameters]
    if computed:
        return (
            f"has a computed {', '.join(computed)} (weight_norm, spectral_norm or pruning); make it"
            " permanent to have it split (remove_weight_norm, remove_spectral_norm, prune.remove)"
        )
    hooks = [hook for name in RUN_HOOKS for hook in getattr(module, name).values()]
    if hooks:
        said = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
        return f"has a hook ({said}); remove it to have the layer split"
    if "forward" in held:
        return "has a forward of its own, set on the object"
    return None


def opaque_forward(module: nn.Module) -> str | None:
    """Why a module's own forward may run the layers of the caller's model, whatever a rank holds:
    it was set on the object, and is no method bound to it. None where it is not so."""
    own = module.__dict__.get("forward")
    if own is None or rebound(own, module, module) is not None:
        return None
    return "has a forward of its own, set on the object, which may hold the object's own layers"
