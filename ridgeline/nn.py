"""Modules to build models with, whose operations ridgeline has kernels for.

They stand beside `optimize`, above all folders, because they bind a law of `ir` to its kernels in
`codegen`, which `ir` must not import.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import ridgeline.codegen.group_rational  # noqa: F401 - registers the kernels
from ridgeline.ir.group_rational import FORMS, GROUP_RATIONAL, RationalError, check_attributes
from ridgeline.ir.rational_fit import fit

__all__ = ["GroupRational"]


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
