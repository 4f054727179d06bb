"""Spellings that are not rewritten yet. A row whose spelling is rewritten fails its test: drop it.

A case that has all words or choices of a row may be taken or not; its result must be right.
"""

from dataclasses import dataclass

from generate.case import Case


@dataclass(frozen=True, slots=True)
class Miss:
    """Words and choices of the spellings that `rewrite` does not take."""

    rewrite: str
    spelt: dict[str, str]

    def covers(self, case: Case) -> bool:
        """Has the case all of this row?"""
        has = case.words | case.choices
        return case.rewrite == self.rewrite and all(has.get(a) == c for a, c in self.spelt.items())


def _rows(rewrite: str, axis: str, *choices: str) -> list[Miss]:
    return [Miss(rewrite, {axis: choice}) for choice in choices]


KNOWN_MISSES: list[Miss] = [
    *_rows(
        *("flash_attention", "scale"),
        *("after, true_divide", "after, tensor", "after, root of a tensor"),
        *("after, rsqrt of a tensor", "after, power of a tensor", "after, full"),
    ),
    *_rows(
        *("flash_attention", "product"),
        *("einsum", "einsum, other letters", "einsum, ellipsis", "einsum, key first"),
        *("key first", "bmm", "bmm, views", "baddbmm", "matmul of three dimensions"),
        "summed products",
    ),
    *_rows(
        *("flash_attention", "softmax"),
        *("maximum, exp, sum", "max, exp, sum", "max, exp, reciprocal", "exp, sum"),
        *("log_softmax, exp", "logsumexp", "maximum first"),
    ),
    *_rows("flash_attention", "value", "einsum", "einsum, value first", "bmm", "transposed"),
    *_rows(
        *("flash_attention", "exclusion"),
        *("masked_fill, tensor", "where, excluded first", "where, full", "where, method"),
        "subtracted, product",
    ),
    *_rows("flash_attention", "bias", "subtracted"),
    *_rows("flash_attention", "repeat", "enable_gqa"),
    *_rows(
        *("quantized_linear", "product"),
        *("matmul", "matmul, mT", "matmul, t", "matmul, transpose", "matmul, permute"),
        *("matmul, transposed weight", "weight first", "mm", "mm, transposed weight", "addmm"),
        *("einsum", "einsum, weight first", "einsum, transposed weight", "baddbmm", "bmm"),
        *("tensordot", "conv1d", "inner"),
    ),
    *_rows("norm", "square", "abs"),
    *_rows("norm", "mean", "mean, unsqueezed", "sum", "sum, multiplied", "sum, of the shape"),
    *_rows("norm", "root", "in place"),
    *_rows("norm", "variance", "var_mean", "std", "mean of squares"),
]


def known_miss(case: Case) -> bool:
    """Is the case excused from being rewritten?"""
    return any(miss.covers(case) for miss in KNOWN_MISSES)
