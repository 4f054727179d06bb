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
    *_rows("flash_attention", "product", "summed products"),
    *_rows("quantized_linear", "product", "weight first", "tensordot", "conv1d", "inner"),
    *_rows("norm", "square", "abs"),
    *_rows("norm", "mean", "mean, unsqueezed", "sum", "sum, multiplied", "sum, of the shape"),
    *_rows("norm", "root", "in place"),
    *_rows("norm", "variance", "var_mean", "std", "mean of squares"),
]


def known_miss(case: Case) -> bool:
    """Is the case excused from being rewritten?"""
    return any(miss.covers(case) for miss in KNOWN_MISSES)
