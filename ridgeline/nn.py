"""Modules to build models with, whose operations ridgeline has kernels for.

They stand beside `optimize`, above all folders, because they bind a law of `ir` to its kernels in
`codegen`, which `ir` must not import.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import ridgeline.codegen.group_rational  # noqa: F401 - registers the kernels
from ridgeline.ir.group_rational import FORMS, GROUP_RATIONAL, RationalError, check_attributes
from ridgeline.ir.rational_fit import fit

__all__ = ["GroupRational", "with_group_rational"]

_KAT_COEFFICIENTS = (
    ("weight_numerator", "weight_denominator"),
    ("numerator_v", "denominator_v"),
)
"""How the public KAT_Group and FlashKAT_Group name a [1 or G, m+1] and b [1 or G, n]."""


class GroupRational(nn.Module):
    """A learnable rational activation with one pair of polynomials per group of channels.

    Law: `ridgeline.ir.group_rational`. Runs, forward and backward, by TVM kernels on the CPU and by
    Triton kernels on GPUs.

    channels: C, the last dimension of the input; groups: G, a divisor of C.
    init: what the function is at first: "identity", "silu", "gelu", "relu", "tanh", "sigmoid", or
        an elementwise function of a float64 tensor, fitted over |x| <= reach. `initial_error` is
        the largest error of that fit, before rounding to `dtype`.
    degrees: (m, n) of numerator and denominator. form, sign0: as the law has them.
    shared_numerator, shared_denominator: one row of coefficients for all groups.
    numerator [1 or G, m+1] and denominator [1 or G, n] are its parameters.

    Raises RationalError for groups that do not divide the channels or attributes outside the law,
    and FitError for an unknown `init`.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 8,
        init: str | Callable[[Tensor], Tensor] = "silu",
        *,
        degrees: tuple[int, int] = (5, 4),
        form: str = FORMS[0],
        sign0: int = 1,
        shared_numerator: bool = False,
        shared_denominator: bool = False,
        reach: float = 3.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_attributes(form, sign0)
        if groups < 1 or channels < 1 or channels % groups:
            raise RationalError(
                f"expected a number of groups that divides the channels; found {groups} groups and"
                f" {channels} channels"
            )
        self.channels, self.groups, self.form, self.sign0 = channels, groups, form, sign0
        self.init, self.degrees, self.reach = init, degrees, reach
        rows = (1 if shared_numerator else groups, 1 if shared_denominator else groups)
        options = {"device": device, "dtype": dtype}
        self.numerator = nn.Parameter(torch.empty(rows[0], degrees[0] + 1, **options))
        self.denominator = nn.Parameter(torch.empty(rows[1], degrees[1], **options))
        self.initial_error = 0.0
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the coefficients to the fit of `init`."""
        fitted = fit(self.init, *self.degrees, self.reach)
        self.initial_error = fitted.error
        self.numerator.copy_(torch.tensor(fitted.numerator))
        self.denominator.copy_(torch.tensor(fitted.denominator))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C], x's dtype."""
        return GROUP_RATIONAL.overload(
            x, self.numerator, self.denominator, form=self.form, sign0=self.sign0
        )

    def extra_repr(self) -> str:
        init = self.init if isinstance(self.init, str) else self.init.__name__
        return (
            f"{self.channels}, groups={self.groups}, init={init!r}, degrees={self.degrees},"
            f" form={self.form!r}, sign0={self.sign0}"
        )


def with_group_rational(model: nn.Module) -> nn.Module:
    """A copy of `model` with `GroupRational` for its public KAT_Group and FlashKAT_Group layers.

    They are known by what they hold, not by their class: two matrices of coefficients under the
    names that one of the two gives them. What they compute on GPUs, and were trained with, is form
    "abs_terms" with sign0 = 1, and that is what the copy computes on any device; their plain torch
    code is another function (see `ridgeline.ir.group_rational`). A layer on x [..., C] reads C from
    its input, so here `channels` is the number of groups, of which C must be a multiple. Layers in
    several places stay shared; coefficients are copied. Raises RationalError for coefficients that
    no law fits, and where the model holds no such layer.
    """
    model = copy.deepcopy(model)
    made: dict[int, GroupRational] = {}
    if (own := _converted(model, made)) is not None:
        return own
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and (layer := _converted(child, made)) is not None:
                setattr(parent, name, layer)
    if not made:
        raise RationalError(
            "expected layers that hold coefficients as KAT_Group (weight_numerator,"
            " weight_denominator) or FlashKAT_Group (numerator_v, denominator_v) do; found none in"
            f" {type(model).__name__}; build the model with ridgeline.nn.GroupRational instead"
        )
    return model


def _converted(layer: nn.Module, made: dict[int, GroupRational]) -> GroupRational | None:
    names = next(
        (pair for pair in _KAT_COEFFICIENTS if set(pair) <= layer._parameters.keys()), None
    )
    if names is None:
        return None
    if id(layer) not in made:
        a, b = (layer._parameters[name] for name in names)
        assert a is not None
        assert b is not None
        groups = max(len(a), len(b))
        if a.dim() != 2 or b.dim() != 2 or {len(a), len(b)} - {1, groups} or not b.shape[1]:
            raise RationalError(
                f"{names[0]} and {names[1]} expect shapes [1 or G, m+1] and [1 or G, n]; found"
                f" {list(a.shape)} and {list(b.shape)} in a {type(layer).__name__}"
            )
        made[id(layer)] = own = GroupRational(
            groups,
            groups,
            "identity",
            degrees=(a.shape[1] - 1, b.shape[1]),
            shared_numerator=len(a) == 1,
            shared_denominator=len(b) == 1,
            device=a.device,
            dtype=a.dtype,
        )
        own.numerator = nn.Parameter(a.detach().clone(), a.requires_grad)
        own.denominator = nn.Parameter(b.detach().clone(), b.requires_grad)
        own.train(layer.training)
    return made[id(layer)]
