"""RMSNorm and LayerNorm in the spellings that model code has.

RMSNorm: x / √(mean(x²) + eps) · (w + shift). LayerNorm: the same of x - mean(x), plus a bias.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from generate.case import Case, Input

D = 16


@dataclass(frozen=True, slots=True)
class Norm:
    """What is computed over the last dimension of x [2, 5, 16].

    center: LayerNorm; weight: "none", "given" or "one more" (w + 1); residual: x is a sum.
    """

    center: bool = False
    weight: str = "given"
    bias: bool = False
    residual: bool = False
    dtype: torch.dtype = torch.float32
    eps: float = 1e-5


CASTS = {"none": "", "float": "h = h.float()", "to": "h = h.to(torch.float32)"}
SQUARES = {
    "pow": "s = h.pow(2)",
    "**": "s = h ** 2",
    "square": "s = torch.square(h)",
    "product": "s = h * h",
    "torch.pow": "s = torch.pow(h, 2)",
    "pow of a float": "s = h.pow(2.0)",
    "abs": "s = h.abs().square()",
}
MEANS = {
    "mean": "s = s.mean(-1, keepdim=True)",
    "mean of a list": "s = s.mean([-1], keepdim=True)",
    "mean, from the front": "s = s.mean(dim=2, keepdim=True)",
    "torch.mean": "s = torch.mean(s, dim=-1, keepdim=True)",
    "mean, unsqueezed": "s = s.mean(-1).unsqueeze(-1)",
    "sum": "s = s.sum(-1, keepdim=True) / {D}",
    "sum, multiplied": "s = s.sum(-1, keepdim=True) * (1 / {D})",
    "sum, of the shape": "s = s.sum(-1, True) / h.shape[-1]",
}
ROOTS = {
    "rsqrt": "h = h * torch.rsqrt(s + {eps})",
    "rsqrt, commuted": "h = torch.rsqrt({eps} + s) * h",
    "rsqrt, method": "h = h * s.add(eps).rsqrt()",
    "sqrt": "h = h / torch.sqrt(s + {eps})",
    "sqrt, method": "h = h.div((s + {eps}).sqrt())",
    "power -0.5": "h = h * (s + {eps}) ** -0.5",
    "power 0.5": "h = h / (s + {eps}).pow(0.5)",
    "reciprocal": "h = h * torch.sqrt(s + {eps}).reciprocal()",
    "one over": "h = h * (1 / torch.sqrt(s + {eps}))",
    "in place": "h = h.clone().mul_(torch.rsqrt(s + {eps}))",
}
VARIANCES = {
    "var": "s = h.var(-1, unbiased=False, keepdim=True)\nh = h - h.mean(-1, keepdim=True)",
    "var, correction": (
        "s = torch.var(h, dim=-1, correction=0, keepdim=True)\nh = h - h.mean(-1, keepdim=True)"
    ),
    "var_mean": "s, m = torch.var_mean(h, dim=-1, unbiased=False, keepdim=True)\nh = h - m",
    "squares": "h = h - h.mean(-1, keepdim=True)\ns = h.pow(2).mean(-1, keepdim=True)",
    "squares of differences": (
        "m = h.mean(-1, keepdim=True)\ns = (h - m).pow(2).mean(-1, keepdim=True)\nh = h - m"
    ),
    "std": "s = h.std(-1, unbiased=False, keepdim=True) ** 2\nh = h - h.mean(-1, keepdim=True)",
    "mean of squares": (
        "m = h.mean(-1, keepdim=True)\ns = (h * h).mean(-1, keepdim=True) - m * m\nh = h - m"
    ),
}
BACK = {"before the weight": "h = h.to(x.dtype)", "type_as": "h = h.type_as(x)"}
WEIGHTS = {
    "none": {"none": ""},
    "given": {
        "weight first": "h = self.weight * h",
        "weight last": "h = h * self.weight",
        "mul": "h = torch.mul(h, self.weight)",
        "cast": "h = h * self.weight.to(h.dtype)",
        "of three dimensions": "h = h * self.weight[None, None, :]",
    },
    "one more": {
        "1 + w": "h = h * (1 + self.weight)",
        "w + 1": "h = (self.weight + 1.0) * h",
        "float": "h = h * (1.0 + self.weight.float()).to(h.dtype)",
        "distributed": "h = h + h * self.weight",
    },
}
LIBRARY = {
    False: {
        "F.rms_norm": "h = F.rms_norm(h, ({D},), {w}, {eps})",
        "nn.RMSNorm": "h = self.norm(h)",
    },
    True: {
        "F.layer_norm": "h = F.layer_norm(h, ({D},), {w}, {b}, {eps})",
        "nn.LayerNorm": "h = self.norm(h)",
        "torch.layer_norm": "h = torch.layer_norm(h, [{D}], {w}, {b}, {eps})",
    },
}
RESIDUALS = {
    "added": "h = x + r",
    "commuted": "h = r + x",
    "function": "h = torch.add(x, r)",
    "in place": "h = x.clone()\nh += r",
}
OUTPUTS = {"as it is": "return h", "the sum too": "return h, total"}


def axes(m: Norm) -> dict[str, tuple[str, ...]]:
    """Axis -> its choices, the plainest first."""
    forms = ("spelt out", *LIBRARY[m.center]) if m.weight != "one more" else ("spelt out",)
    found = {"form": forms}
    if m.dtype != torch.float32:
        found["cast"] = tuple(CASTS)[1:]
        found["back"] = tuple(BACK)
    if m.center:
        found["variance"] = tuple(VARIANCES)
    else:
        found |= {"square": tuple(SQUARES), "mean": tuple(MEANS)}
    found |= {"root": tuple(ROOTS), "weight": tuple(WEIGHTS[m.weight])}
    if m.residual:
        found |= {"residual": tuple(RESIDUALS), "output": tuple(OUTPUTS)}
    return found


def case(
    meaning: Norm,
    choices: Mapping[str, str],
    spoilt: Mapping[str, str] | None = None,
    forbidden: str = "nothing",
) -> Case:
    """The module for one choice on each axis (the plainest where none is given).

    spoilt: stage ("residual", "cast", "squares", "root", "back", "weight", "bias", "output") ->
    other statements in its place, or, after a "+", more statements behind it.
    """
    known = axes(meaning)
    chosen = {axis: choices.get(axis, options[0]) for axis, options in known.items()}
    if chosen["form"] != "spelt out":
        chosen = {a: c for a, c in chosen.items() if a in ("form", "residual", "output")}
    stages = _stages(meaning, chosen)
    for stage, text in (spoilt or {}).items():
        stages[stage] = f"{stages[stage]}\n{text[1:]}" if text.startswith("+") else text
    given = {"w": "self.weight" if meaning.weight == "given" else "None"}
    given["b"] = "self.bias" if meaning.bias else "None"
    text = "\n".join(t.strip() for t in stages.values() if t)
    text = text.replace("add(eps)", "add({eps})").format(D=D, eps=meaning.eps, **given)
    words = {"norm": "LayerNorm" if meaning.center else "RMSNorm", "parameters": meaning.weight}
    words |= {"bias": str(meaning.bias), "dtype": str(meaning.dtype).removeprefix("torch.")}
    inputs = [Input("x", (2, 5, D), meaning.dtype)]
    inputs += [Input("r", (2, 5, D), meaning.dtype)] if meaning.residual else []
    return Case(
        rewrite="norm",
        words=words,
        choices=chosen,
        respell=lambda other: case(meaning, other, spoilt, forbidden),
        inputs=tuple(inputs),
        body=tuple(text.split("\n")),
        setup=_setup(meaning, text),
        forbidden=forbidden,
    )


def _setup(m: Norm, text: str) -> tuple[str, ...]:
    if "self.norm" in text:
        affine = f"elementwise_affine={m.weight != 'none'}, dtype={m.dtype}"
        name, bias = ("LayerNorm", f", bias={m.bias}") if m.center else ("RMSNorm", "")
        random = ("for p in self.norm.parameters():", "    nn.init.normal_(p)")
        return (f"self.norm = nn.{name}({D}, {m.eps}, {affine}{bias})", *random)
    made = f"nn.Parameter(torch.randn({D}, dtype={m.dtype}))"
    return tuple(f"self.{n} = {made}" for n in ("weight", "bias") if f"self.{n}" in text)


def _stages(m: Norm, chosen: Mapping[str, str]) -> dict[str, str]:
    stages = {"residual": RESIDUALS[chosen["residual"]] if m.residual else "h = x"}
    if chosen.get("output") == "the sum too":
        stages["total"] = "total = h"
    if chosen["form"] != "spelt out":
        stages["squares"] = LIBRARY[m.center][chosen["form"]]
    else:
        stages["cast"] = CASTS[chosen.get("cast", "none")]
        if m.center:
            stages["squares"] = VARIANCES[chosen["variance"]]
        else:
            stages["squares"] = f"{SQUARES[chosen['square']]}\n{MEANS[chosen['mean']]}"
        stages["root"] = ROOTS[chosen["root"]]
        stages["back"] = BACK.get(chosen.get("back", ""), "")
        stages["weight"] = WEIGHTS[m.weight][chosen["weight"]]
        stages["bias"] = "h = h + self.bias" if m.bias else ""
    return stages | {"output": OUTPUTS[chosen.get("output", "as it is")]}


def _sensible(m: Norm) -> bool:
    return m.weight == "given" if m.bias else not (m.center and m.weight == "one more")


MEANINGS = st.builds(
    Norm,
    center=st.booleans(),
    weight=st.sampled_from(("given", "none", "one more")),
    bias=st.booleans(),
    residual=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16)),
    eps=st.sampled_from((1e-5, 1e-3)),
).filter(lambda m: _sensible(m) and not (m.bias and not m.center))


@st.composite
def spellings(draw: st.DrawFn) -> Case:
    """A random meaning, spelt at random."""
    meaning = draw(MEANINGS)
    return case(meaning, {a: draw(st.sampled_from(o)) for a, o in axes(meaning).items()})


def single_choices() -> list[Case]:
    """Every choice once, all else plain."""
    plain = (
        *(Norm(), Norm(weight="one more"), Norm(dtype=torch.bfloat16), Norm(residual=True)),
        *(Norm(center=True, bias=True), Norm(center=True, weight="none")),
    )
    found: dict[tuple[object, ...], Case] = {}
    for meaning in plain:
        for axis, options in axes(meaning).items():
            for choice in options:
                key = (meaning.center, axis, choice)
                found.setdefault(key, case(meaning, {axis: choice}))
    return list(found.values())
