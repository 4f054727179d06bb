"""ShiftAddViT as a trainable model: which parts become additions, shifts or mixtures.

The recipe has two stages, each followed by fine-tuning (from the paper, section 5):

    stage 1    attentions -> `AdditiveAttention`
    stage 2    linear layers of the blocks -> `ShiftLinear`, or `MixtureOfPrimitives` of both

`stage=None` does both at once. Training continues with any loss, for mixtures with
``+ 0.01 * balance_loss(model)``; `ridgeline.optimize(model.eval())` then packs the codes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from ridgeline.cost_model import Target, load_target
from ridgeline.passes.ignore import check_ignore, ignored
from ridgeline.passes.shift_add_vit.additive_attention import AdditiveAttention
from ridgeline.passes.shift_add_vit.errors import ShiftAddError
from ridgeline.passes.shift_add_vit.find import (
    Place,
    additive,
    is_attention,
    linear_refusal,
    linears,
    places,
)
from ridgeline.passes.shift_add_vit.latency import expert_latencies
from ridgeline.passes.shift_add_vit.mixture import MixtureOfPrimitives
from ridgeline.passes.shift_add_vit.shift_linear import BITS, ShiftLinear

AttentionAs = Literal["add", "keep"]
LinearsAs = Literal["shift", "mixture", "keep"]


@dataclass(frozen=True, slots=True)
class Replaced:
    """One line of a reparameterised model's report.

    path: of the module. became: the class that stands there now, "" where it stays. reason: why it
    stays, or, of a mixture, the shares of tokens that its latencies ask for.
    """

    path: str
    became: str
    reason: str = ""

    def __str__(self) -> str:
        if self.became:
            return f"{self.path} -> {self.became}" + (f" ({self.reason})" if self.reason else "")
        return f"{self.path} stays: {self.reason}"


OUTSIDE = "outside the blocks that hold an attention, as embeddings and heads are"


@dataclass(frozen=True, slots=True)
class Options:
    """What `reparameterize` was asked for, checked; see `shift_add_vit`."""

    attention: AttentionAs
    linears: LinearsAs
    terms: int
    capacity: float
    tokens: int
    latencies: tuple[float, float] | None
    target: Target | None


def shift_add_vit(
    model: nn.Module,
    *,
    stage: Literal[1, 2] | None = None,
    target: str | Target = "native",
    attention: AttentionAs = "add",
    linears: LinearsAs = "mixture",
    ignore: Sequence[str] = (),
    terms: int = 1,
    capacity: float = 1.25,
    tokens: int = 1024,
    latencies: tuple[float, float] | None = None,
) -> nn.Module:
    """A copy of `model`, parameters its own, with multiplications replaced; see above.

    stage: 1 for the attentions alone, 2 for the linear layers alone, None for both.
    target: the machine whose cost model gives the latencies of a mixture's experts, for `tokens`
        tokens at a time; latencies: (mult, shift) seconds to take instead, for every layer.
    attention, linears: what they become. terms: powers of two per weight, 1 or 2. capacity: of a
        mixture's experts, over their share. ignore: patterns of module paths to leave alone.
    The copy's `report` says what became of each attention and linear layer, and why not.

    Raises ShiftAddError for options out of range, patterns that match nothing, and a model with no
    attention that can be told; `ridgeline.cost_model.UnknownTarget`.
    """
    options = _checked(stage, target, attention, linears, terms, capacity, tokens, latencies)
    check_ignore(model, ignore, ShiftAddError)
    earlier = getattr(model, "report", ())
    if not isinstance(earlier, tuple) or not all(isinstance(line, Replaced) for line in earlier):
        raise ShiftAddError("the model has an attribute `report` of its own; rename it")
    new = copy.deepcopy(model)
    report = _attentions(new, options, ignore) + _linears(new, options, ignore)
    if not any(line.became for line in report):
        said = "; ".join(map(str, report)) or "no attention was found"
        raise ShiftAddError(f"nothing of the model can be reparameterised: {said}")
    _leave_fused_code(new)
    new.report = (*earlier, *report)  # pyright: ignore[reportAttributeAccessIssue]
    return new


def _checked(
    stage: Any,
    target: str | Target,
    attention: Any,
    linears: Any,
    terms: int,
    capacity: float,
    tokens: int,
    latencies: tuple[float, float] | None,
) -> Options:
    if stage not in (1, 2, None):
        raise ShiftAddError(f"stage is {stage!r}; choose 1, 2, or None for both")
    for name, value, known in (
        ("attention", attention, AttentionAs),
        ("linears", linears, LinearsAs),
    ):
        if value not in get_args(known):
            raise ShiftAddError(f"{name} is {value!r}; choose one of {get_args(known)}")
    if terms not in BITS:
        raise ShiftAddError(f"terms is {terms!r}; choose one of {list(BITS)}")
    if tokens < 1 or not capacity >= 1:
        raise ShiftAddError(f"tokens is {tokens!r}, capacity {capacity!r}; both are at least 1")
    attention = "keep" if stage == 2 else attention
    linears = "keep" if stage == 1 else linears
    timed = linears == "mixture" and latencies is None
    machine = load_target(target) if timed else None
    return Options(attention, linears, terms, capacity, tokens, latencies, machine)


def _attentions(model: nn.Module, options: Options, ignore: Sequence[str]) -> list[Replaced]:
    """Replace the attentions of `model` that can be."""
    report: list[Replaced] = []
    if options.attention == "keep":
        return report
    done: list[str] = []
    for place in list(places(model)):
        if not is_attention(place.module) or any(place.path.startswith(f"{d}.") for d in done):
            continue
        new = "named in `ignore`" if ignored(place.path, ignore) else additive(place)
        if isinstance(new, AdditiveAttention):
            setattr(place.parent, place.name, new.train(place.module.training))
            done.append(place.path)
            report.append(Replaced(place.path, "AdditiveAttention"))
        else:
            report.append(Replaced(place.path, "", new))
    return report


def _linears(model: nn.Module, options: Options, ignore: Sequence[str]) -> list[Replaced]:
    """Replace the linear layers of the blocks of `model` that can be."""
    if options.linears == "keep":
        return []
    held = [p for p in places(model) if _is_known_attention(p)]
    report: list[Replaced] = []
    inside = list(linears(model, [p.path for p in held]))
    known = {p.path for p in inside}
    outside = [
        p.path
        for p in places(model)
        if isinstance(p.module, nn.Linear)
        and p.path not in known
        and not isinstance(p.parent, MixtureOfPrimitives)
    ]
    for place in inside:
        refusal = "named in `ignore`" if ignored(place.path, ignore) else None
        refusal = refusal or linear_refusal(place, model)
        if refusal:
            report.append(Replaced(place.path, "", refusal))
            continue
        new = _linear(place.module, options)
        setattr(place.parent, place.name, new.train(place.module.training))
        shares = f"tokens {new.shares[0]:.0%} mult" if isinstance(new, MixtureOfPrimitives) else ""
        report.append(Replaced(place.path, type(new).__name__, shares))
    return report + [Replaced(path, "", OUTSIDE) for path in outside]


def _is_known_attention(place: Place) -> bool:
    module = place.module
    if isinstance(module, AdditiveAttention):
        return True
    return is_attention(module) and isinstance(additive(place), AdditiveAttention)


def _linear(linear: nn.Linear, options: Options) -> ShiftLinear | MixtureOfPrimitives:
    if options.linears == "shift":
        return ShiftLinear.of(linear, terms=options.terms)
    latencies = options.latencies
    if latencies is None:
        assert options.target is not None
        latencies = expert_latencies(linear, options.target, tokens=options.tokens)
    return MixtureOfPrimitives(linear, latencies, terms=options.terms, capacity=options.capacity)


def _leave_fused_code(model: nn.Module) -> None:
    """torch's encoder layers hand their weights to fused code in eval mode, past our layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
