"""A group-wise rational function of a tile in registers, at the end or the start of other kernels.

Law: `group_rational`, P(y) / Q(y) in fp32, with FORM 0 "abs_terms", 1 "abs_coefficients",
2 "abs_sum"; Q has a degree of 1 or more. This file needs only torch and triton.
"""

import triton
import triton.language as tl

FORMS = ("abs_terms", "abs_coefficients", "abs_sum")


@triton.jit
def _coefficient(
    pointer,
    first,
    column,
    inside,
    POWER: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Coefficient POWER of each column's group in fp32: one number where all columns have the same,
    else [1, SPAN]."""
    if WIDTH == 0:
        value = tl.load(pointer + POWER)
    elif WIDTH % SPAN == 0:
        value = tl.load(pointer + first // WIDTH * COUNT + POWER)
    else:
        at = column // WIDTH * COUNT + POWER
        value = tl.load(pointer + at, mask=inside, other=0.0)[None, :]
    return value.to(tl.float32)


@triton.jit
def rational(
    y,
    numerator_ptr,
    denominator_ptr,
    first,
    column,
    inside,
    FORM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WIDTH_A: tl.constexpr,
    WIDTH_B: tl.constexpr,
    SPAN: tl.constexpr,
):
    """P(y) / Q(y) of a fp32 tile [rows, SPAN] of the columns `first`, `first` + 1, ...; `first` is
    a multiple of SPAN. numerator [G, M + 1], denominator [G, N], WIDTH columns for each of their
    rows, 0 where they have one for all; inside: which columns there are."""
    top = tl.zeros_like(y)
    for i in tl.static_range(M + 1):
        a = _coefficient(numerator_ptr, first, column, inside, M - i, M + 1, WIDTH_A, SPAN)
        top = top * y + a
    z = tl.abs(y) if FORM == 0 else y
    bottom = tl.zeros_like(y)
    for i in tl.static_range(N):
        c = _coefficient(denominator_ptr, first, column, inside, N - 1 - i, N, WIDTH_B, SPAN)
        bottom = (bottom + (c if FORM == 2 else tl.abs(c))) * z
    return top / (1.0 + (tl.abs(bottom) if FORM == 2 else bottom))


def rational_constants(
    size: int, numerator: tuple[int, int] | None, denominator: tuple[int, int] | None, form: str
) -> dict[str, int]:
    """A kernel's constants for `size` columns and coefficients of these shapes, or for none."""
    if numerator is None or denominator is None:
        return {"FORM": -1, "M": 0, "N": 0, "WIDTH_A": 0, "WIDTH_B": 0}
    widths = (0 if rows == 1 else size // rows for rows in (numerator[0], denominator[0]))
    names = ("FORM", "M", "N", "WIDTH_A", "WIDTH_B")
    values = (FORMS.index(form), numerator[1] - 1, denominator[1], *widths)
    return dict(zip(names, values, strict=True))
