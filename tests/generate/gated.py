"""The gated activation of a feed-forward layer, act(gate) * up, in the spellings of model code.

Two tensors, or the halves of a packed one; SwiGLU, GEGLU, ReGLU and GLU by their activation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from generate.case import Case, Input

WIDTH = 12


@dataclass(frozen=True, slots=True)
class Gated:
    """What is computed from rows [2, 5, 12] of gate and up, or [10, 12] when `flat`.

    activation: one of `ACTIVATIONS`; packed: gate and up are the halves of one tensor.
    """

    activation: str = "silu"
    packed: bool = False
    flat: bool = False
    dtype: torch.dtype = torch.float32


ACTIVATIONS: dict[str, dict[str, str]] = {
    "silu": {
        "F.silu": "a = F.silu(z)",
        "nn.SiLU": "a = nn.SiLU()(z)",
        "in place": "a = F.silu(z.clone(), inplace=True)",
        "product": "a = z * torch.sigmoid(z)",
        "product, commuted": "a = z.sigmoid() * z",
        "product, function": "a = torch.mul(z, F.sigmoid(z))",
        "product, expit": "a = z * torch.special.expit(z)",
        "product in place": "a = torch.sigmoid(z)\na *= z",
        "product, logistic": "a = z * (1 / (1 + torch.exp(-z)))",
        "product, reciprocal": "a = z * (1 + (-z).exp()).reciprocal()",
        "quotient": "a = z / (1 + torch.exp(-z))",
        "quotient, commuted": "a = z / (torch.exp(-z) + 1.0)",
        "quotient, method": "a = z.div(z.neg().exp().add(1))",
        "quotient, factor": "a = z / (1 + torch.exp(-1.0 * z))",
        "tanh": "a = 0.5 * z * (1 + torch.tanh(0.5 * z))",
    },
    "sigmoid": {
        "sigmoid": "a = torch.sigmoid(z)",
        "F.sigmoid": "a = F.sigmoid(z)",
        "nn.Sigmoid": "a = nn.Sigmoid()(z)",
        "in place": "a = z.clone().sigmoid_()",
        "expit": "a = torch.special.expit(z)",
        "logistic": "a = 1 / (1 + torch.exp(-z))",
        "logistic, reciprocal": "a = (torch.exp(-z) + 1).reciprocal()",
    },
    "relu": {
        "F.relu": "a = F.relu(z)",
        "torch.relu": "a = torch.relu(z)",
        "nn.ReLU": "a = nn.ReLU()(z)",
        "in place": "a = F.relu_(z.clone())",
        "clamp": "a = z.clamp(min=0)",
        "clamp_min": "a = torch.clamp_min(z, 0.0)",
        "maximum": "a = torch.maximum(z, torch.zeros_like(z))",
    },
    "gelu": {
        "F.gelu": "a = F.gelu(z)",
        "nn.GELU": "a = nn.GELU()(z)",
        "erf": "a = z * 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0)))",
        "erf, half first": "a = 0.5 * z * (1 + torch.erf(z * 0.7071067811865476))",
        "erf, halved": "a = z * (1 + (z / 2**0.5).erf()) / 2",
        "erf, half last": "a = (torch.erf(z / math.sqrt(2.0)) + 1) * z * 0.5",
        "erf, distributed": "a = z * (0.5 + 0.5 * torch.erf(z / 2**0.5))",
        "erf, half apart": "a = z * (0.5 * (1 + torch.erf(z / 2**0.5)))",
        "erf, tensor": "a = z * 0.5 * (1 + torch.erf(z / torch.sqrt(torch.tensor(2.0))))",
        "ndtr": "a = z * torch.special.ndtr(z)",
    },
    "gelu_tanh": {
        "F.gelu": 'a = F.gelu(z, approximate="tanh")',
        "nn.GELU": 'a = nn.GELU("tanh")(z)',
        "cubic": (
            "c = z + 0.044715 * torch.pow(z, 3.0)\n"
            "a = 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * c))"
        ),
        "cubic, **": "a = z * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3)))",
        "cubic, product": (
            "c = z + 0.044715 * z * z * z\na = 0.5 * z * (1 + torch.tanh(0.7978845608028654 * c))"
        ),
        "Horner": (
            "c = 0.79788456 * z * (1 + 0.044715 * z * z)\na = z * 0.5 * (1.0 + torch.tanh(c))"
        ),
        "Horner, square": (
            "c = z * 0.7978845608 * (1.0 + 0.044715 * z.pow(2))\na = 0.5 * z * (1.0 + c.tanh())"
        ),
        "half last": (
            "c = 0.7978845608028654 * (z + 0.044715 * z**3)\na = (1 + torch.tanh(c)) * z / 2"
        ),
        "sigmoid": "a = z * torch.sigmoid(1.5957691216057308 * (z + 0.044715 * z**3))",
    },
}
"""Activation -> its spellings, z to a."""

PACKED = {
    "chunk": "{g}, {u} = p.chunk(2, dim=-1)",
    "chunk, function": "{g}, {u} = torch.chunk(p, 2, p.dim() - 1)",
    "split": "{g}, {u} = p.split(12, dim=-1)",
    "split, sizes": "{g}, {u} = torch.split(p, [12, 12], -1)",
    "split, half": "{g}, {u} = p.split(p.shape[-1] // 2, -1)",
    "tensor_split": "{g}, {u} = p.tensor_split(2, dim=-1)",
    "slices": "{g}, {u} = p[..., :12], p[..., 12:]",
    "slices, from the end": "{g}, {u} = p[..., :-12], p[..., -12:]",
    "slices, half": "half = p.shape[-1] // 2\n{u} = p[..., half:]\n{g} = p[..., :half]",
    "narrow": "{g}, {u} = p.narrow(-1, 0, 12), p.narrow(-1, 12, 12)",
    "unflatten, unbind": "{g}, {u} = p.unflatten(-1, (2, 12)).unbind(-2)",
    "unflatten, select": (
        "p = p.unflatten(-1, (2, -1))\n{g}, {u} = p.select(-2, 0), p.select(-2, 1)"
    ),
    "view, index": "p = p.view(*p.shape[:-1], 2, 12)\n{g}, {u} = p[..., 0, :], p[..., 1, :]",
    "neighbours": "{g}, {u} = p[..., ::2], p[..., 1::2]",
    "neighbours, unbind": "{g}, {u} = p.unflatten(-1, (12, 2)).unbind(-1)",
    "index_select": (
        "{g} = p.index_select(-1, torch.arange(12))\n{u} = p.index_select(-1, torch.arange(12, 24))"
    ),
}
ORDERS = {"gate first": ("g", "u"), "up first": ("u", "g")}
SOURCES = {"inputs": False, "linear": True}
WHOLE = {"F.glu": "h = F.glu(p, dim=-1)", "nn.GLU": "h = nn.GLU()(p)"}
"""The library's own gate, a sigmoid of the second half."""

CASTS: dict[str, tuple[str, str, str]] = {
    "none": ("", "", ""),
    "activation": ("z = z.float()", "a = a.to(u.dtype)", ""),
    "activation, type_as": ("z = z.to(torch.float32)", "a = a.type_as(u)", ""),
    "gate": ("z = z.float()", "", "h = h.to(u.dtype)"),
    "both": ("z = z.float()\nw = u.float()", "", "h = h.to(u.dtype)"),
    "both, kept": ("z = z.float()\nw = u.float()", "", ""),
    "product": ("", "a = a.float()", "h = h.to(u.dtype)"),
}
"""Casts before the activation, behind it and behind the product."""

PRODUCTS = {
    "gate first": "h = a * w",
    "up first": "h = w * a",
    "function": "h = torch.mul(w, a)",
    "method": "h = a.multiply(w)",
    "in place": "h = a\nh *= w",
    "mul_": "h = a.mul_(w)",
    "into up": "h = w.to(a.dtype).clone().mul_(a)",
}
OUTPUTS = {"as it is": "return h", "projected": "return self.down(h)"}


def axes(m: Gated) -> dict[str, tuple[str, ...]]:
    """Axis -> its choices, the plainest first."""
    found: dict[str, tuple[str, ...]] = {}
    if m.packed:
        whole = tuple(WHOLE) if m.activation == "sigmoid" else ()
        found = {"form": ("spelt out", *whole), "packed": tuple(PACKED), "order": tuple(ORDERS)}
    found |= {"source": tuple(SOURCES), "activation": tuple(ACTIVATIONS[m.activation])}
    if m.dtype != torch.float32:
        found["cast"] = tuple(CASTS)
    return found | {"product": tuple(PRODUCTS), "output": tuple(OUTPUTS)}


def case(
    meaning: Gated,
    choices: Mapping[str, str],
    spoilt: Mapping[str, str] | None = None,
    forbidden: str = "nothing",
) -> Case:
    """The module for one choice on each axis (the plainest where none is given).

    spoilt: stage ("operands", "wide", "activation", "narrow", "product", "back", "output") -> other
    statements in its place, or, after a "+", more statements behind it.
    """
    chosen = {axis: choices.get(axis, options[0]) for axis, options in axes(meaning).items()}
    if chosen.get("form", "spelt out") != "spelt out":
        chosen = {a: c for a, c in chosen.items() if a in ("form", "source", "output")}
    stages = _stages(meaning, chosen)
    for stage, text in (spoilt or {}).items():
        stages[stage] = f"{stages[stage]}\n{text[1:]}" if text.startswith("+") else text
    text = "\n".join(t.strip() for t in stages.values() if t)
    lead = (10,) if meaning.flat else (2, 5)
    sizes = {"p": 2 * WIDTH} if meaning.packed else {"g": WIDTH, "u": WIDTH}
    sizes = {"x": WIDTH} if SOURCES[chosen["source"]] else sizes
    words = {"gate": meaning.activation, "of halves": str(meaning.packed)}
    words |= {"flat": str(meaning.flat), "dtype": str(meaning.dtype).removeprefix("torch.")}
    return Case(
        rewrite="gated_activation",
        words=words,
        choices=chosen,
        respell=lambda other: case(meaning, other, spoilt, forbidden),
        inputs=tuple(Input(name, (*lead, n), meaning.dtype) for name, n in sizes.items()),
        body=tuple(text.split("\n")),
        setup=_setup(text, meaning.dtype),
        forbidden=forbidden,
    )


def _setup(text: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The projections that the statements call."""
    sizes = {"gate": (WIDTH, WIDTH), "up": (WIDTH, WIDTH), "down": (WIDTH, WIDTH)}
    sizes["gate_up"] = (WIDTH, 2 * WIDTH)
    return tuple(
        f"self.{name} = nn.Linear({i}, {o}, bias=False, dtype={dtype})"
        for name, (i, o) in sizes.items()
        if f"self.{name}(" in text
    )


def _stages(m: Gated, chosen: Mapping[str, str]) -> dict[str, str]:
    linear = SOURCES[chosen["source"]]
    stages = {"source": ""}
    if linear:
        both = "g = self.gate(x)\nu = self.up(x)"
        stages["source"] = "p = self.gate_up(x)" if m.packed else both
    if chosen.get("form", "spelt out") != "spelt out":
        stages["product"] = WHOLE[chosen["form"]]
    else:
        first, second = ORDERS[chosen.get("order", "gate first")]
        packed = PACKED.get(chosen.get("packed", ""), "")
        stages["operands"] = packed.format(g=first, u=second)
        wide, narrow, back = CASTS[chosen.get("cast", "none")]
        stages["wide"] = f"z, w = g, u\n{wide}"
        stages["activation"] = ACTIVATIONS[m.activation][chosen["activation"]]
        stages |= {"narrow": narrow, "product": PRODUCTS[chosen["product"]], "back": back}
    if chosen["output"] == "projected" and chosen.get("cast") == "both, kept":
        stages["narrowed"] = "h = h.to(u.dtype)"
    return stages | {"output": OUTPUTS[chosen["output"]]}


MEANINGS = st.builds(
    Gated,
    activation=st.sampled_from(("silu", "silu", "gelu", "gelu_tanh", "sigmoid", "relu")),
    packed=st.booleans(),
    flat=st.sampled_from((False, False, True)),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
)


@st.composite
def spellings(draw: st.DrawFn) -> Case:
    """A random meaning, spelt at random."""
    meaning = draw(MEANINGS)
    return case(meaning, {a: draw(st.sampled_from(o)) for a, o in axes(meaning).items()})


def single_choices() -> list[Case]:
    """Every choice once, all else plain."""
    plain = (
        *(Gated(activation) for activation in ACTIVATIONS),
        *(Gated(packed=True), Gated("sigmoid", packed=True), Gated(dtype=torch.bfloat16)),
    )
    found: dict[tuple[str, str, str], Case] = {}
    for meaning in plain:
        for axis, options in axes(meaning).items():
            for choice in options:
                key = (meaning.activation if axis == "activation" else "", axis, choice)
                found.setdefault(key, case(meaning, {axis: choice}))
    return list(found.values())
