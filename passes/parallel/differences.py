"""What ranks have said, told where it is not the same."""

from collections.abc import Mapping, Sequence

_SHOWN = 60
"""Characters of each rank's facts in an error."""
_LISTED = 8
"""Facts that an error lists, the first of those that differ."""


def differences(said: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Name of each fact that not every rank says alike -> who says what; said: by rank."""
    found = {}
    for name in dict.fromkeys(name for each in said for name in each):
        values = [each.get(name, "nothing") for each in said]
        if len(set(values)) > 1:
            told = ", ".join(f"rank {r}: {v}" for r, v in enumerate(_shortened(values)))
            found[name] = f"{name} differs ({told})"
    return found


def listed(found: Mapping[str, str]) -> list[str]:
    """The first of them, and how many others there are."""
    lines = list(found.values())
    more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return lines[:_LISTED] + more


def first_difference(lines: Sequence[Sequence[tuple[str, str]]]) -> list[dict[str, str]]:
    """Facts of each rank about its first line that not all have; lines: by rank, each with what it
    is called, of which the first rank that has such a line names the fact."""
    shared = set.intersection(*({text for text, _ in each} for each in lines))
    first = [next((x for x in each if x[0] not in shared), ("nothing", "")) for each in lines]
    name = next(called for _, called in first if called)
    return [{name: text, "its place": called} for text, called in first]


def _shortened(values: Sequence[str]) -> list[str]:
    """Each; of long ones what is about the place from which on they differ."""
    if max(map(len, values)) <= _SHOWN:
        return list(values)
    differs = [len(set(letters)) > 1 for letters in zip(*values, strict=False)]
    same = differs.index(True) if True in differs else len(differs)
    start = max(0, same - _SHOWN // 3)
    lead = "..." if start else ""
    cut = [value[start:] for value in values]
    return [f"{lead}{v if len(v) <= _SHOWN else f'{v[: _SHOWN - 3]}...'}" for v in cut]
