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
    # E[x²] - E[x]² cancels: it is another number in floating point.
    *_rows("norm", "variance", "mean of squares"),
    # √2 in float32 is not √2: certification, in float64, would see the difference.
    *_rows("gated_activation", "activation", "erf, tensor"),
    # A maximum with a tensor, which would have to be proven to be nought; rare.
    *_rows("gated_activation", "activation", "maximum"),
    # The operation has one dtype; here two are read and a wider one is written.
    *_rows("gated_activation", "cast", "both, kept"),
    # Rare spellings; a slice of one column of pairs, and a slice of -x.
    *_rows("rotary", "rotation", "cat", "negated before"),
    # A view is written: what the site reads is not what it returns.
    *_rows("rotary", "part", "written back"),
]


def known_miss(case: Case) -> bool:
    """Is the case excused from being rewritten?"""
    return any(miss.covers(case) for miss in KNOWN_MISSES)
