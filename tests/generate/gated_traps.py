"""Near misses of the gated activation: one stage of one spelt at random says something else."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from hypothesis import strategies as st

from generate.case import Case
from generate.gated import Gated, axes, case

_PACKED = Gated(packed=True)
_GLU = Gated("sigmoid", packed=True)
_WIDE = Gated(dtype=torch.bfloat16)
_EVERY = "any rewrite"
_TANH = "0.5 * z * (1 + torch.tanh({}))"
_SPOILT: dict[str, tuple[Gated, dict[str, str], str]] = {
    "halves that overlap": (_PACKED, {"operands": "g, u = p[..., :14], p[..., 10:]"}, "nothing"),
    "up off by one": (_PACKED, {"operands": "g, u = p[..., :12], p[..., 11:-1]"}, "nothing"),
    "gate off by one": (_PACKED, {"operands": "g, u = p[..., 1:13], p[..., 12:]"}, "nothing"),
    "one half twice": (_PACKED, {"operands": "g = u = p[..., 12:]"}, "nothing"),
    "a step of two": (_PACKED, {"operands": "g, u = p[..., :-1:2], p[..., 12:]"}, "nothing"),
    "up flipped": (_PACKED, {"operands": "g, u = p.chunk(2, -1)\nu = u.flip(-1)"}, "nothing"),
    "up rolled": (_PACKED, {"operands": "g, u = p.chunk(2, -1)\nu = u.roll(1, -1)"}, "nothing"),
    "pairs for halves": (
        _PACKED,
        {"operands": "g, u = p.unflatten(-1, (12, 2)).transpose(-1, -2).unbind(-2)"},
        "nothing",
    ),
    "halves of the length": (
        _PACKED,
        {"operands": "p = p[:, :4]\ng, u = p.chunk(2, dim=1)"},
        "nothing",
    ),
    "halves of the batch": (_PACKED, {"operands": "g, u = p.chunk(2, dim=0)"}, "nothing"),
    "halves by another chunk": (
        _PACKED,
        {"operands": "g, u, rest = p.split([8, 8, 8], dim=-1)"},
        "nothing",
    ),
    "the wrong half activated": (
        _PACKED,
        {"operands": "u, g = p.chunk(2, -1)"},
        "nothing",
    ),
    "both halves activated": (_PACKED, {"activation": "a = F.silu(z)\nw = F.silu(w)"}, "nothing"),
    "the product activated": (_PACKED, {"product": "h = F.silu(z * w)"}, _EVERY),
    "the whole activated": (
        _PACKED,
        {"operands": "g, u = F.silu(p).chunk(2, -1)", "activation": "a = z"},
        _EVERY,
    ),
    "halves added": (_PACKED, {"product": "h = a + w"}, _EVERY),
    "halves divided": (_PACKED, {"product": "h = a / w"}, "nothing"),
    "one more than up": (_PACKED, {"product": "h = a * (w + 1)"}, "nothing"),
    "sum with alpha": (
        _PACKED,
        {"product": "h = a * torch.add(w, g, alpha=2)"},
        "nothing",
    ),
    "product halved": (_PACKED, {"product": "h = 0.5 * a * w"}, "nothing"),
    "product with itself": (_PACKED, {"product": "h = a * a"}, _EVERY),
    "gate times its own activation": (_PACKED, {"product": "h = a * z"}, "nothing"),
    "quick gelu": (Gated(), {"activation": "a = z * torch.sigmoid(1.702 * z)"}, "nothing"),
    "scaled inside the quotient": (
        Gated(),
        {"activation": "a = z / (1 + torch.exp(-1.702 * z))"},
        _EVERY,
    ),
    "another argument of the sigmoid": (Gated(), {"activation": "a = z * w.sigmoid()"}, "nothing"),
    "exponential of x": (Gated(), {"activation": "a = z / (1 + torch.exp(z))"}, _EVERY),
    "exponential subtracted": (Gated(), {"activation": "a = z / (1 - torch.exp(-z))"}, _EVERY),
    "two in the denominator": (Gated(), {"activation": "a = z / (2 + torch.exp(-z))"}, _EVERY),
    "denominator with alpha": (
        Gated(),
        {"activation": "a = z / torch.add(torch.exp(-z), 1, alpha=2)"},
        _EVERY,
    ),
    "numerator of another": (Gated(), {"activation": "a = w / (1 + torch.exp(-z))"}, _EVERY),
    "divided by nothing": (Gated(), {"activation": "a = (0.5 * z / 0) * torch.erf(z)"}, _EVERY),
    "hyperbolic half": (Gated(), {"activation": "a = z * (1 + torch.tanh(0.5 * z))"}, _EVERY),
    "hyperbolic whole": (Gated(), {"activation": "a = 0.5 * z * (1 + torch.tanh(z))"}, _EVERY),
    "hardswish": (Gated(), {"activation": "a = F.hardswish(z)"}, _EVERY),
    "mish": (Gated(), {"activation": "a = F.mish(z)"}, "nothing"),
    "log sigmoid": (Gated(), {"activation": "a = F.logsigmoid(z)"}, _EVERY),
    "scaled before": (Gated(), {"wide": "z, w = g * 2, u"}, "nothing"),
    "scaled between": (
        Gated(),
        {"activation": "z = z * 2\na = z * torch.sigmoid(z / 2)"},
        "nothing",
    ),
    "erf without the root": (
        Gated("gelu"),
        {"activation": "a = 0.5 * z * (1 + torch.erf(z))"},
        _EVERY,
    ),
    "erf of a wrong root": (
        Gated("gelu"),
        {"activation": "a = 0.5 * z * (1 + torch.erf(z / 1.414))"},
        _EVERY,
    ),
    "erf subtracted": (
        Gated("gelu"),
        {"activation": "a = 0.5 * z * (1 - torch.erf(z / 2**0.5))"},
        _EVERY,
    ),
    "no half": (Gated("gelu"), {"activation": "a = z * (1 + torch.erf(z / 2**0.5))"}, _EVERY),
    "half not distributed": (
        Gated("gelu"),
        {"activation": "a = z * (0.5 + torch.erf(z / 2**0.5))"},
        _EVERY,
    ),
    "erf with alpha": (
        Gated("gelu"),
        {"activation": "a = 0.5 * z * torch.add(torch.erf(z / 2**0.5), 1, alpha=2)"},
        _EVERY,
    ),
    "erf of up": (
        Gated("gelu"),
        {"activation": "a = 0.5 * z * (1 + torch.erf(w / 2**0.5))"},
        _EVERY,
    ),
    "another cubic": (
        Gated("gelu_tanh"),
        {"activation": "a = " + _TANH.format("0.7978845608028654 * (z + 0.0447 * z**3)")},
        _EVERY,
    ),
    "a nearly equal constant": (
        Gated("gelu_tanh"),
        {"activation": "a = " + _TANH.format("0.797884 * (z + 0.044715 * z**3)")},
        _EVERY,
    ),
    "a square for the cube": (
        Gated("gelu_tanh"),
        {"activation": "a = " + _TANH.format("0.7978845608028654 * (z + 0.044715 * z**2)")},
        _EVERY,
    ),
    "a cube of up": (
        Gated("gelu_tanh"),
        {"activation": "a = " + _TANH.format("0.7978845608028654 * (z + 0.044715 * w**3)")},
        _EVERY,
    ),
    "cubic subtracted": (
        Gated("gelu_tanh"),
        {"activation": "a = " + _TANH.format("0.7978845608028654 * (z - 0.044715 * z**3)")},
        _EVERY,
    ),
    "leaky": (Gated("relu"), {"activation": "a = F.leaky_relu(z)"}, _EVERY),
    "relu6": (Gated("relu"), {"activation": "a = F.relu6(z)"}, _EVERY),
    "clamped at one": (Gated("relu"), {"activation": "a = z.clamp(min=1)"}, _EVERY),
    "clamped above": (Gated("relu"), {"activation": "a = z.clamp(max=0)"}, _EVERY),
    "clamped on both sides": (Gated("relu"), {"activation": "a = z.clamp(0, 1)"}, _EVERY),
    "relu squared": (Gated("relu"), {"activation": "a = F.relu(z).square()"}, _EVERY),
    "the activation returned too": (Gated(), {"output": "return h, a"}, "nothing"),
    "the sigmoid returned too": (
        Gated(),
        {"activation": "s = torch.sigmoid(z)\na = z * s", "output": "return h, s"},
        "nothing",
    ),
    "the halves returned too": (_PACKED, {"output": "return h, g, u"}, "nothing"),
    "gate written before": (_PACKED, {"operands": "+g.mul_(3)"}, "nothing"),
    "up written before": (_PACKED, {"operands": "+u.add_(1)"}, "nothing"),
    "packed written before": (_PACKED, {"operands": "+p.mul_(2)"}, "nothing"),
    "gate written between": (_PACKED, {"activation": "+z.zero_()"}, "nothing"),
    "up written between": (_PACKED, {"activation": "+w.mul_(2)"}, "nothing"),
    "packed written between": (_PACKED, {"activation": "+p.mul_(2)"}, "nothing"),
    "overlap written between": (
        _PACKED,
        {"operands": "g, u = p[..., :12], p[..., 12:]", "activation": "+p[..., 11:13] = 5.0"},
        "nothing",
    ),
    "gate written later": (
        Gated(),
        {"product": "h = a * w\ng.mul_(2)", "output": "return h, g"},
        "nothing",
    ),
    "activation written between": (Gated(), {"activation": "+a[..., 0] = 1.0"}, "nothing"),
    "result written": (Gated(), {"product": "h = a * w\nh[..., 0] = 1.0"}, "nothing"),
    "result written into the gate": (
        Gated(),
        {"product": "g.copy_(a * w)", "output": "return g + 0"},
        "nothing",
    ),
    "a gate per row": (Gated(), {"wide": "z, w = g[..., :1], u"}, _EVERY),
    "a gate per feature": (Gated(), {"wide": "z, w = g[:1, :1], u"}, _EVERY),
    "an up per row": (Gated(), {"wide": "z, w = g, u[..., :1]"}, "nothing"),
    "an up of fewer dimensions": (Gated(), {"wide": "z, w = g, u[0, 0]"}, "nothing"),
    "an outer product": (Gated(), {"wide": "z, w = g[..., None, :], u[..., :, None]"}, _EVERY),
    "a number for up": (Gated(), {"product": "h = a * 3.0"}, "nothing"),
    "integers": (Gated("sigmoid"), {"wide": "z, w = g.mul(3).long(), u"}, _EVERY),
    "integers for up": (Gated(), {"wide": "z, w = g, u.mul(3).long()"}, "nothing"),
    "integers in relu": (
        Gated("relu"),
        {"wide": "z, w = g.mul(3).long(), u.mul(3).long()"},
        _EVERY,
    ),
    "a mask for up": (Gated(), {"wide": "z, w = g, u > 0"}, "nothing"),
    "complex": (Gated(), {"wide": "z, w = g, torch.complex(u, g)"}, _EVERY),
    "gate cut to integers": (_WIDE, {"wide": "z, w = g.long().to(g.dtype), u"}, "nothing"),
    "gate rounded": (Gated(), {"wide": "z, w = g.to(torch.bfloat16).float(), u"}, "nothing"),
    "activation rounded": (
        Gated(),
        {"narrow": "a = a.to(torch.bfloat16).float()"},
        _EVERY,
    ),
    "up rounded": (Gated(), {"wide": "z, w = g, u.half().float()"}, "nothing"),
    "result rounded": (Gated(), {"back": "h = h.to(torch.bfloat16)"}, "nothing"),
    "GLU of the other half": (_GLU, {"product": "h = F.glu(p.roll(12, -1), -1)"}, "nothing"),
    "GLU of the length": (_GLU, {"product": "h = F.glu(p[:, :4], 1)"}, "nothing"),
}
TRAPS = tuple(_SPOILT)


def trap(name: str, choices: Mapping[str, str] | None = None) -> Case:
    """The module of one trap, the other stages spelt by `choices`."""
    meaning, spoilt, forbidden = _SPOILT[name]
    made = case(meaning, choices or {}, spoilt, forbidden)
    words = {"trap": name} | made.words
    return replace(made, words=words, respell=lambda other: trap(name, other))


@st.composite
def traps(draw: st.DrawFn) -> Case:
    """A random trap, whatever it leaves open spelt at random."""
    name = draw(st.sampled_from(TRAPS))
    known = {a: o for a, o in axes(_SPOILT[name][0]).items() if a not in ("form", "output")}
    return trap(name, {a: draw(st.sampled_from(o)) for a, o in known.items()})
