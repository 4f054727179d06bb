"""From the trainable form to what runs: shift layers as codes."""

import logging

from torch import nn

from ridgeline.passes.copy_model import copy_model
from ridgeline.passes.shift_add_vit.additive_attention import AdditiveAttention
from ridgeline.passes.shift_add_vit.find import places
from ridgeline.passes.shift_add_vit.shift_linear import ShiftLinear

log = logging.getLogger(__name__)


def freeze(model: nn.Module) -> nn.Module:
    """A copy of `model` whose shift layers hold codes; `model` itself where it has none, or trains.

    Parameters of other layers are shared; `model` is not changed. The copy computes what `model`
    does, and goes on doing so when the latent weights are trained further.
    Raises ShiftAddError where a latent weight is infinite or NaN.
    """
    if model.training:
        return model
    attentions = [m for m in model.modules() if isinstance(m, AdditiveAttention)]
    if fresh := sum(int(m.queries.batches) == 0 for m in attentions):
        log.warning(
            "%d additive attentions have seen no batch in train mode: their thresholds are 0, and"
            " the model's outputs far from what they were; fine-tune it first",
            fresh,
        )
    if not any(isinstance(m, ShiftLinear) for m in model.modules()):
        return model
    if isinstance(model, ShiftLinear):
        return model.frozen().eval()
    new = copy_model(model)
    made: dict[ShiftLinear, nn.Module] = {}
    for place in list(places(new)):
        layer = place.module
        if isinstance(layer, ShiftLinear):
            made.setdefault(layer, layer.frozen().eval())
            setattr(place.parent, place.name, made[layer])
    return new
