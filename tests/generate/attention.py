"""Attention, softmax(c Q Kᵀ + M) V, in the spellings that model code has, and near misses of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from generate.attention_words import (
    BIASES,
    CAPS,
    DROPOUTS,
    EXCLUSIONS,
    FUSED,
    FUSED_MASKS,
    KEEPS,
    LAYOUTS,
    OUTPUTS,
    PRODUCTS,
    REPEATS,
    SCALES,
    SINKS,
    SOFTMAXES,
    TRIANGLES,
    VALUES,
)
from generate.case import Case, Input


@dataclass(frozen=True, slots=True)
class Attention:
    """What is computed: queries [B,H,Sq,D], keys [B,Hk,Sk,D], values [B,Hk,Sk,D].

    keep: which keys a query reads: "all", "causal" (j <= i), "causal from the end"
    (j <= i + Sk - Sq), "window" (the last three), "given" (a boolean input), "bias" (an additive
    input). A scale of None is 1/√D. sinks: does each head have a score without a value?
    capped: is a score z 5 tanh(z / 5) before it is masked?
    """

    heads: int = 4
    kv_heads: int = 4
    q: int = 6
    k: int = 6
    keep: str = "all"
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    batch: int = 2  # 1: the inputs have no batch dimension
    dim: int = 8
    sinks: bool = False
    capped: bool = False

    @property
    def forms(self) -> tuple[str, ...]:
        """Those of `FORMS` that can say it."""
        return FORMS[:1] if self.sinks or self.capped else FORMS

    @property
    def factor(self) -> float:
        """The number that scores are multiplied by."""
        return self.dim**-0.5 if self.scale is None else self.scale


def axes(meaning: Attention, form: str = "spelt out") -> dict[str, tuple[str, ...]]:
    """Axis -> its choices, the plainest first, for one meaning and one of `FORMS`."""
    rank = "{H}" if meaning.batch == 1 else "{B}"
    layouts = tuple(x for x, (shape, _) in LAYOUTS.items() if shape.startswith(rank))
    found = {"query": layouts, "key": (*layouts, "transposed") if meaning.batch > 1 else layouts}
    if meaning.kv_heads != meaning.heads:
        found["repeat"] = (*REPEATS, *(("enable_gqa",) if form == "fused" else ()))
    triangles = tuple(TRIANGLES) if meaning.keep == "causal" else ()
    if form == "fused":
        if form not in meaning.forms:
            raise ValueError("the fused call has neither sinks nor a cap")
        found["fused"] = tuple(FUSED)
        if meaning.keep in KEEPS:
            found["mask"] = tuple(KEEPS[meaning.keep])
            found["exclusion"] = tuple(FUSED_MASKS)
        if meaning.keep == "causal":
            found["exclusion"] += ("is_causal",)
    else:
        found |= {"scale": tuple(SCALES), "product": tuple(PRODUCTS)}
        if meaning.capped:
            found["cap"] = tuple(CAPS)
        if meaning.keep in KEEPS:
            found["mask"] = tuple(KEEPS[meaning.keep])
            found["exclusion"] = (*EXCLUSIONS, *triangles)
        if meaning.keep == "bias":
            found["bias"] = tuple(BIASES)
        if meaning.sinks:
            found["sinks"] = tuple(SINKS)
        found |= {"softmax": tuple(SOFTMAXES), "dropout": tuple(DROPOUTS), "value": tuple(VALUES)}
    return found | {"output": tuple(OUTPUTS)}


FORMS = ("spelt out", "fused")


def case(
    meaning: Attention,
    form: str,
    choices: Mapping[str, str],
    spoilt: Mapping[str, str] | None = None,
    forbidden: str = "nothing",
) -> Case:
    """The module for one choice on each axis (the plainest where none is given).

    spoilt: stage ("operands", "before", "product", "after", "capped", "keep", "exclusion", "bias",
    "sinks", "softmax", "dropped", "dropout", "value", "output") -> other statements in its place,
    or, after a "+", more statements behind it; `forbidden` says what they forbid.
    """
    known = axes(meaning, form)
    if unknown := {a: c for a, c in choices.items() if c not in known.get(a, ())}:
        raise ValueError(f"no such choices for {meaning}, {form}: {unknown}")
    chosen = {axis: choices.get(axis, options[0]) for axis, options in known.items()}
    if chosen.get("exclusion") in (*TRIANGLES, "is_causal"):
        del chosen["mask"]
    stages = _stages(meaning, form, chosen)
    for stage, text in (spoilt or {}).items():
        stages[stage] = f"{stages[stage]}\n{text[1:]}" if text.startswith("+") else text
    text = "\n".join(t.strip() for t in stages.values() if t).format(**_sizes(meaning))
    setup = ()
    if "self.triangle" in text:
        ones = "torch.ones(16, 16, dtype=torch.bool)"
        setup = (f"self.register_buffer('triangle', {ones}.tril(), persistent=False)",)
    words = {"keep": meaning.keep, "form": form}
    words |= {"dtype": str(meaning.dtype).removeprefix("torch.")}
    return Case(
        rewrite="flash_attention",
        words=words,
        choices=chosen,
        respell=lambda other: case(meaning, form, other, spoilt, forbidden),
        inputs=_inputs(meaning, chosen),
        body=tuple(text.split("\n")),
        setup=setup,
        forbidden=forbidden,
    )


def _sizes(m: Attention) -> dict[str, object]:
    c = m.factor
    return {
        **{"B": m.batch, "H": m.heads, "Hk": m.kv_heads, "r": m.heads // m.kv_heads},
        **{"Sq": "q.shape[-2]", "Sk": "k.shape[-2]", "D": m.dim},
        **{"c": c, "d": 1 / c, "e": 1 / c**2, "two": 2 * c, "root": c**0.5, "fourth": c**-0.5},
        "d8c": c * m.dim**0.5,
    }


def _inputs(m: Attention, chosen: Mapping[str, str]) -> tuple[Input, ...]:
    def shape(layout: str, heads: int, length: int) -> tuple[int, ...]:
        if layout == "transposed":
            return (m.batch, heads, m.dim, length)
        sizes = {"B": m.batch, "H": heads, "S": length, "D": m.dim}
        factors = [part.split(" * ") for part in LAYOUTS[layout][0].format(**sizes).split(", ")]
        return tuple(int(a[0]) * int(a[1]) if len(a) == 2 else int(a[0]) for a in factors)

    value = "heads first" if chosen["key"] == "transposed" else chosen["key"]
    inputs = [
        Input("q", shape(chosen["query"], m.heads, m.q), m.dtype),
        Input("k", shape(chosen["key"], m.kv_heads, m.k), m.dtype),
        Input("v", shape(value, m.kv_heads, m.k), m.dtype),
    ]
    if m.keep == "given":
        inputs.append(Input("keep", (m.batch, 1, m.q, m.k), torch.bool))
    if m.keep == "bias":
        inputs.append(Input("bias", (m.batch, 1, m.q, m.k), m.dtype))
    if m.sinks:
        inputs.append(Input("sinks", (m.heads,), m.dtype))
    return tuple(inputs)


def _layout(name: str, layout: str, heads: str) -> str:
    expression = "k.mT" if layout == "transposed" else _renamed(LAYOUTS[layout][1], name)
    expression = expression.replace("{H}", heads)
    return "" if expression == name else f"{name} = {expression}"


def _stages(m: Attention, form: str, chosen: Mapping[str, str]) -> dict[str, str]:
    """Stage -> statements, in order."""
    value = "heads first" if chosen["key"] == "transposed" else chosen["key"]
    operands = [
        _layout("q", chosen["query"], "{H}"),
        _layout("k", chosen["key"], "{Hk}"),
        _layout("v", value, "{Hk}"),
    ]
    repeat = REPEATS.get(chosen.get("repeat", ""), "")
    if repeat:
        operands += [_renamed(repeat, "k"), _renamed(repeat, "v")]
    stages = {"operands": "\n".join(filter(None, operands))}
    exclusion = chosen.get("exclusion", "")
    stages["keep"] = f"keep = {KEEPS[m.keep][chosen['mask']]}" if "mask" in chosen else ""
    if form == "fused":
        mask = ", is_causal=True" if exclusion == "is_causal" else ""
        mask = f", attn_mask={FUSED_MASKS[exclusion]}" if exclusion in FUSED_MASKS else mask
        mask = ", attn_mask=bias" if m.keep == "bias" else mask
        mask += ", enable_gqa=True" if chosen.get("repeat") == "enable_gqa" else ""
        stages["value"] = FUSED[chosen["fused"]].replace("{mask}", mask)
    else:
        before, after = SCALES[chosen["scale"]]
        stages |= {"before": before, "product": PRODUCTS[chosen["product"]], "after": after}
        stages["capped"] = CAPS[chosen["cap"]] if m.capped else ""
        stages["exclusion"] = (EXCLUSIONS | TRIANGLES).get(exclusion, "")
        stages["bias"] = BIASES[chosen["bias"]] if m.keep == "bias" else ""
        stages["sinks"], dropped = SINKS[chosen["sinks"]] if m.sinks else ("", "")
        stages["softmax"] = SOFTMAXES[chosen["softmax"]]
        stages["dropped"] = dropped
        stages["dropout"] = DROPOUTS[chosen["dropout"]]
        stages["value"] = VALUES[chosen["value"]]
    return stages | {"output": OUTPUTS[chosen["output"]]}


def _renamed(statement: str, name: str) -> str:
    return re.sub(r"\bx\b", name, statement)


MEANINGS = st.builds(
    Attention,
    kv_heads=st.sampled_from((4, 2)),
    q=st.sampled_from((6, 3)),
    k=st.sampled_from((6, 9)),
    keep=st.sampled_from(("all", "causal", "given", "bias", "window", "causal from the end")),
    scale=st.sampled_from((None, 0.3)),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16)),
    batch=st.sampled_from((2, 2, 2, 1)),
    sinks=st.sampled_from((False, False, False, True)),
    capped=st.sampled_from((False, False, False, True)),
)


@st.composite
def spellings(draw: st.DrawFn) -> Case:
    """A random meaning, spelt at random."""
    meaning = draw(MEANINGS)
    form = draw(st.sampled_from((*FORMS[:1] * 4, meaning.forms[-1])))
    known = axes(meaning, form)
    return case(meaning, form, {a: draw(st.sampled_from(o)) for a, o in known.items()})


def single_choices() -> list[Case]:
    """Every choice once, all else plain."""
    keeps = ("all", "causal", "given", "bias", "window", "causal from the end")
    meanings = [Attention(keep=keep) for keep in keeps]
    meanings += [Attention(kv_heads=2), Attention(sinks=True), Attention(capped=True)]
    found: dict[tuple[str, str, str], Case] = {}
    for meaning in meanings:
        for form in meaning.forms:
            for axis, options in axes(meaning, form).items():
                for choice in options:
                    key = (meaning.keep if axis == "mask" else form, axis, choice)
                    found.setdefault(key, case(meaning, form, {axis: choice}))
    return list(found.values())
