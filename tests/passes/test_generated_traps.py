"""What nearly means one of the rewritten operations: the result stays, nothing illegal is done."""

import pytest

from generate import attention_traps, gated_traps, linear, norm_traps, rotary_traps
from generate.search import search
from generate.verdict import FORBIDDEN, Verdict, examine

TRAPS = {
    "attention": attention_traps,
    "gated": gated_traps,
    "linear": linear,
    "norm": norm_traps,
    "rotary": rotary_traps,
}

KNOWN_WRONG: set[str] = set()
"""Traps that are fallen into today; one that is avoided fails its test: drop it here."""


def _fell(verdict: Verdict) -> bool:
    return bool(verdict.wrong) or FORBIDDEN[verdict.case.forbidden](verdict)


@pytest.mark.slow
@pytest.mark.parametrize("meaning", TRAPS)
def test_each_trap_is_avoided(meaning):
    module = TRAPS[meaning]
    names = list(module.TRAPS)
    for start in range(0, len(names), 24):
        part = names[start : start + 24]
        for name, verdict in zip(part, examine([module.trap(n) for n in part]), strict=True):
            assert _fell(verdict) == (name in KNOWN_WRONG), f"{name}: {verdict}"


@pytest.mark.slow
@pytest.mark.parametrize("meaning", TRAPS)
def test_traps_among_random_spellings_are_avoided(request, meaning):
    search(
        request.config,
        TRAPS[meaning]
        .traps()
        .filter(lambda case: case.words["trap"] not in KNOWN_WRONG and case.runs()),
        _fell,
    )
