"""Rotary position embedding, x cos + rotate(x) sin, in the spellings that model code has."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from generate.case import Case, Input
from generate.rotary_words import (
    ANGLES,
    BROADCASTS,
    CASTS,
    COMPLEX,
    DOUBLED,
    FACTORS,
    HALVES,
    HALVES_APART,
    INTERLEAVED,
    LAYOUTS,
    NEIGHBOURS,
    NEIGHBOURS_APART,
    PART,
    POLAR,
    SUMS,
)

_SIZES = {"B": 2, "S": 5, "one": 1}


@dataclass(frozen=True, slots=True)
class Rotary:
    """What is turned: a query of four heads and, where `key`, a key of two.

    interleaved: neighbours form pairs, not halves; partial: 8 of 16 features are turned; heads: the
    dimension of the heads, 1 or 2; form: "rotated" (with a rotated tensor), "apart" or "complex".
    """

    interleaved: bool = False
    partial: bool = False
    key: bool = True
    heads: int = 1
    form: str = "rotated"
    dtype: torch.dtype = torch.float32


def axes(m: Rotary) -> dict[str, tuple[str, ...]]:
    """Axis -> its choices, the plainest first."""
    found: dict[str, tuple[str, ...]] = {"layout": tuple(LAYOUTS[m.heads])}
    found |= {"angles": tuple(ANGLES)}
    if m.form == "rotated":
        found["doubled"] = tuple(INTERLEAVED if m.interleaved else DOUBLED)
    found["broadcast"] = tuple({name: 0 for table in BROADCASTS.values() for name in table})
    if m.partial:
        found["part"] = tuple(PART)
    if m.dtype != torch.float32:
        found["cast"] = tuple(CASTS) if m.form != "complex" else tuple(CASTS)[2:]
    if m.form == "complex":
        return found | {"factor": tuple(FACTORS), "product": tuple(COMPLEX)}
    if m.form == "apart":
        return found | {"pairs": tuple(NEIGHBOURS_APART if m.interleaved else HALVES_APART)}
    return found | {
        "rotation": tuple(NEIGHBOURS if m.interleaved else HALVES),
        "sum": tuple(SUMS),
    }


def case(
    meaning: Rotary,
    choices: Mapping[str, str],
    spoilt: Mapping[str, str] | None = None,
    forbidden: str = "nothing",
) -> Case:
    """The module for one choice on each axis (the plainest where none is given).

    spoilt: stage ("layout", "angles", "beside", "part", "wide", "rotation", "sum", "back",
    "joined", "output") -> other statements in its place, or, after a "+", more statements behind
    it; x is the query and then the key, y what becomes of it.
    """
    chosen = {axis: choices.get(axis, options[0]) for axis, options in axes(meaning).items()}
    shape, rank, _ = ANGLES[chosen["angles"]]
    if shape not in ("", "at"):
        chosen.pop("doubled", None)
    ways = BROADCASTS[rank, meaning.heads]
    if chosen["broadcast"] not in ways:
        chosen["broadcast"] = next(iter(ways))
    stages = _stages(meaning, chosen)
    for stage, text in (spoilt or {}).items():
        stages[stage] = f"{stages[stage]}\n{text[1:]}" if text.startswith("+") else text
    text = "\n".join(_lines(meaning, stages))
    text = text.replace("{length}", str(3 - meaning.heads)).replace("{D}", str(_dim(meaning)))
    words = {"pairs": "neighbours" if meaning.interleaved else "halves", "form": meaning.form}
    words |= {"partial": str(meaning.partial), "key": str(meaning.key)}
    words |= {"heads": str(meaning.heads), "dtype": str(meaning.dtype).removeprefix("torch.")}
    inverse = "self.register_buffer('inverse', 10.0 ** -torch.linspace(0, 3, 4))"
    return Case(
        rewrite="rotary",
        words=words,
        choices=chosen,
        respell=lambda other: case(meaning, other, spoilt, forbidden),
        inputs=_inputs(meaning, chosen),
        body=tuple(line for line in text.split("\n") if line),
        setup=(inverse,) if "self.inverse" in text else (),
        forbidden=forbidden,
    )


def _dim(m: Rotary) -> int:
    return 16 if m.partial else 8


def _names(m: Rotary) -> tuple[str, ...]:
    return ("q", "k") if m.key else ("q",)


def _inputs(m: Rotary, chosen: Mapping[str, str]) -> tuple[Input, ...]:
    def sized(shape: str, heads: int) -> tuple[int, ...]:
        sizes = {**_SIZES, "H": heads, "D": _dim(m), "W": heads * _dim(m)}
        sizes["R"] = 8 if m.form == "rotated" else 4
        return tuple(sizes[letter] for letter in shape.split())

    layout, _ = LAYOUTS[m.heads][chosen["layout"]]
    inputs = [Input(x, sized(layout, 4 if x == "q" else 2), m.dtype) for x in _names(m)]
    shape, *_ = ANGLES[chosen["angles"]]
    if shape == "at":
        return *inputs, Input("at", sized("B S", 0), torch.int64)
    beside = shape.replace("heads S", "one S" if m.heads == 1 else "S one")
    angles = [Input(x, sized(beside, 0)) for x in ("cos", "sin")] if shape else []
    return *inputs, *angles


def _stages(m: Rotary, chosen: Mapping[str, str]) -> dict[str, str]:
    """Stage -> statements, in order."""
    _, rank, angle = ANGLES[chosen["angles"]]
    if angle:
        doubled = (DOUBLED | INTERLEAVED)[chosen["doubled"]] if "doubled" in chosen else ""
        last = doubled.startswith("cos")
        angle = "\n".join([angle, *((POLAR, doubled) if last else (doubled, POLAR))])
    of_angles, wide, back = CASTS[chosen["cast"]] if "cast" in chosen else ("", "", "")
    brought = (BROADCASTS[rank, m.heads][chosen["broadcast"]], of_angles)
    beside = [
        f"{c} = " + re.sub(r"\bc\b", c, way) for way in brought if way for c in ("cos", "sin")
    ]
    part, joined = PART[chosen["part"]] if m.partial else ("t = x", "")
    stages = {"layout": LAYOUTS[m.heads][chosen["layout"]][1], "angles": angle}
    stages |= {"beside": "\n".join(beside), "part": part, "wide": wide}
    if m.form == "rotated":
        stages["rotation"] = (NEIGHBOURS if m.interleaved else HALVES)[chosen["rotation"]]
        stages["sum"] = SUMS[chosen["sum"]]
    elif m.form == "apart":
        stages["sum"] = (NEIGHBOURS_APART if m.interleaved else HALVES_APART)[chosen["pairs"]]
    else:
        stages["beside"] += "\n" + FACTORS[chosen["factor"]]
        stages["sum"] = COMPLEX[chosen["product"]]
    results = ", ".join(f"{x}_y" for x in _names(m))
    return stages | {"back": back, "joined": joined, "output": f"return {results}"}


def _lines(m: Rotary, stages: Mapping[str, str]) -> list[str]:
    """The statements, those about a tensor once for each."""
    order = list(stages)
    turn = [stages[stage] for stage in order[order.index("part") : order.index("output")]]
    lines = [re.sub(r"\bx\b", x, stages["layout"]) for x in _names(m)]
    lines += [stages["angles"], stages["beside"]]
    for x in _names(m):
        about = re.sub(r"\bx\b", x, "\n".join(turn))
        lines.append(re.sub(r"\by\b", f"{x}_y", about))
    return [*lines, stages["output"]]


MEANINGS = st.builds(
    Rotary,
    interleaved=st.booleans(),
    partial=st.sampled_from((False, False, True)),
    key=st.sampled_from((True, True, False)),
    heads=st.sampled_from((1, 1, 2)),
    form=st.sampled_from(("rotated", "rotated", "rotated", "apart", "complex")),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
).filter(lambda m: m.interleaved or m.form != "complex")


@st.composite
def spellings(draw: st.DrawFn) -> Case:
    """A random meaning, spelt at random."""
    meaning = draw(MEANINGS)
    return case(meaning, {a: draw(st.sampled_from(o)) for a, o in axes(meaning).items()})


def single_choices() -> list[Case]:
    """Every choice once, all else plain."""
    plain = (
        *(
            Rotary(interleaved=pairs, form=form)
            for form in ("rotated", "apart")
            for pairs in (False, True)
        ),
        *(Rotary(interleaved=True, form="complex"), Rotary(heads=2), Rotary(partial=True)),
        *(Rotary(key=False), Rotary(dtype=torch.bfloat16)),
    )
    found: dict[tuple[object, ...], Case] = {}
    for meaning in plain:
        for axis, options in axes(meaning).items():
            for choice in options:
                angle = {"angles": "outer"} if axis == "doubled" else {}
                form = () if axis in ("cast", "part") else (meaning.form, meaning.interleaved)
                heads = meaning.heads if axis in ("layout", "broadcast") else 0
                key = (*form, heads, axis, choice)
                found.setdefault(key, case(meaning, {axis: choice, **angle}))
    return list(found.values())
