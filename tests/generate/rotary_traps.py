"""Near misses of the rotary embedding: one stage of one spelt at random says something else."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from hypothesis import strategies as st

from generate.case import Case
from generate.rotary import Rotary, axes, case

_HALVES = Rotary()
_PAIRS = Rotary(interleaved=True)
_PART = Rotary(partial=True)
_APART = Rotary(form="apart")
_PAIRS_APART = Rotary(form="apart", interleaved=True)
_COMPLEX = Rotary(form="complex", interleaved=True)
_WIDE = Rotary(dtype=torch.bfloat16)
_EVERY = "any rewrite"
_STACK = "r = torch.stack(({}), dim=-1).flatten(-2)"
_CAT = "r = torch.cat(({}), dim=-1)"
_PARTS = "a, b = t.chunk(2, dim=-1)\ny = torch.cat(({}), dim=-1)"
_BY_TURNS = "a, b = t[..., ::2], t[..., 1::2]\ny = torch.stack(({}), dim=-1).flatten(-2)"
_Z = "z = torch.view_as_complex(t.float().unflatten(-1, (4, 2)))\nw = torch.complex(cos, sin)\n"
_SPOILT: dict[str, tuple[Rotary, dict[str, str], str]] = {
    "no sign": (_HALVES, {"rotation": _CAT.format("t[..., 4:], t[..., :4]")}, _EVERY),
    "two signs": (_HALVES, {"rotation": _CAT.format("-t[..., 4:], -t[..., :4]")}, _EVERY),
    "the sign behind": (_HALVES, {"rotation": _CAT.format("t[..., 4:], -t[..., :4]")}, _EVERY),
    "halves not swapped": (_HALVES, {"rotation": _CAT.format("-t[..., :4], t[..., 4:]")}, _EVERY),
    "one half twice": (_HALVES, {"rotation": _CAT.format("-t[..., 4:], t[..., 4:]")}, _EVERY),
    "off by one": (_HALVES, {"rotation": _CAT.format("-t[..., 3:7], t[..., :4]")}, _EVERY),
    "unequal halves": (_HALVES, {"rotation": _CAT.format("-t[..., 5:], t[..., :5]")}, _EVERY),
    "three parts": (
        _HALVES,
        {"rotation": _CAT.format("-t[..., 4:], t[..., :2], t[..., 2:4]")},
        "nothing",
    ),
    "neighbours in halves": (
        _HALVES,
        {"rotation": _CAT.format("-t[..., 1::2], t[..., ::2]")},
        _EVERY,
    ),
    "halves by turns": (_HALVES, {"rotation": _STACK.format("-t[..., 4:], t[..., :4]")}, _EVERY),
    "halves of the length": (
        _HALVES,
        {"rotation": "t = t[:, :, :2]\nr = torch.cat((-t[:, :, 1:], t[:, :, :1]), dim=2)"}
        | {"sum": "y = t * cos[..., :1, :] + r * sin[..., :1, :]"},
        _EVERY,
    ),
    "halves of another": (
        _HALVES,
        {"rotation": "a, b = t.flip(-1).chunk(2, dim=-1)\nr = torch.cat((-b, a), dim=-1)"},
        _EVERY,
    ),
    "rolled": (_HALVES, {"rotation": "r = t.roll(4, -1)"}, _EVERY),
    "doubled": (_HALVES, {"rotation": "+r = 2 * r"}, _EVERY),
    "twice minus": (_HALVES, {"rotation": _CAT.format("-2 * t[..., 4:], t[..., :4]")}, _EVERY),
    "even first": (_PAIRS, {"rotation": _STACK.format("-t[..., ::2], t[..., 1::2]")}, _EVERY),
    "even negated behind": (
        _PAIRS,
        {"rotation": _STACK.format("t[..., 1::2], -t[..., ::2]")},
        _EVERY,
    ),
    "both even": (_PAIRS, {"rotation": _STACK.format("-t[..., ::2], t[..., ::2]")}, _EVERY),
    "a step of four": (
        _PAIRS,
        {"rotation": _STACK.format("-t[..., 1::4], t[..., ::4]") + "\nr = torch.cat((r, r), -1)"},
        _EVERY,
    ),
    "pairs one behind the other": (
        _PAIRS,
        {"rotation": "r = torch.stack((-t[..., 1::2], t[..., ::2]), dim=-2).flatten(-2)"},
        _EVERY,
    ),
    "pairs from a transposed view": (
        _PAIRS,
        {
            "rotation": "a, b = t.unflatten(-1, (2, 4)).transpose(-1, -2).unbind(-1)\n"
            "r = torch.stack((-b, a), -1).flatten(-2)"
        },
        _EVERY,
    ),
    "difference": (_HALVES, {"sum": "y = t * cos - r * sin"}, _EVERY),
    "sum with alpha": (_HALVES, {"sum": "y = torch.add(t * cos, r * sin, alpha=2)"}, _EVERY),
    "addcmul with a value": (
        _HALVES,
        {"sum": "y = torch.addcmul(t * cos, r, sin, value=0.5)"},
        _EVERY,
    ),
    "products swapped": (_HALVES, {"sum": "y = t * sin + r * cos"}, "nothing"),
    "cos twice": (_HALVES, {"sum": "y = t * cos + r * cos"}, "nothing"),
    "no cos": (_HALVES, {"sum": "y = t + r * sin"}, _EVERY),
    "no sin": (_HALVES, {"sum": "y = t * cos + r"}, _EVERY),
    "another tensor turned": (_HALVES, {"sum": "y = t.flip(1) * cos + r * sin"}, "nothing"),
    "of a scaled": (_HALVES, {"wide": "t = 0.5 * t"}, "nothing"),
    "a scaled plain part": (_HALVES, {"sum": "y = (2 * t) * cos + r * sin"}, _EVERY),
    "the sum of three": (_HALVES, {"sum": "y = t * cos + r * sin + t"}, "nothing"),
    "angles off by one": (
        _HALVES,
        {"sum": "y = t * cos + r * sin.roll(1, -1)"},
        "nothing",
    ),
    "cos of one feature": (
        _HALVES,
        {"sum": "y = t * cos[..., :1] + r * sin[..., :1]"},
        "nothing",
    ),
    "cos of one, sin of all": (_HALVES, {"sum": "y = t * cos[..., :1] + r * sin"}, "nothing"),
    "cos of one position": (
        _HALVES,
        {"sum": "y = t * cos[..., :1, :] + r * sin[..., :1, :]"},
        "nothing",
    ),
    "cos with more dimensions": (
        _HALVES,
        {"sum": "c, s = (a[(None,) * (5 - a.dim())] for a in (cos, sin))\ny = t * c + r * s"},
        _EVERY,
    ),
    "the rest in front": (_PART, {"joined": "y = torch.cat((rest, y), dim=-1)"}, "nothing"),
    "a scaled rest": (_PART, {"joined": "y = torch.cat((y, 2 * rest), dim=-1)"}, "nothing"),
    "the turned part again": (_PART, {"joined": "y = torch.cat((y, t), dim=-1)"}, "nothing"),
    "the rest along the length": (_PART, {"joined": "y = torch.cat((y, rest), dim=2)"}, "nothing"),
    "the rest off by one": (
        _PART,
        {"part": "t, rest = x[..., :8], x[..., 7:15]", "joined": "y = torch.cat((y, rest), -1)"},
        "nothing",
    ),
    "the rest of another": (
        _PART,
        {"part": "t, rest = x[..., :8], q[:, :1, :1, 8:].expand_as(x[..., 8:])"}
        | {"joined": "y = torch.cat((y, rest), -1)"},
        "nothing",
    ),
    "the turned part rounded": (
        _PART,
        {"joined": "y = torch.cat((y.to(torch.bfloat16), rest), dim=-1)"},
        "nothing",
    ),
    "the rest rounded": (
        _PART,
        {"joined": "y = torch.cat((y, rest.to(torch.bfloat16)), dim=-1)"},
        "nothing",
    ),
    "the last features turned": (
        _PART,
        {"part": "t, rest = x[..., 8:], x[..., :8]", "joined": "y = torch.cat((y, rest), -1)"},
        "nothing",
    ),
    "every other feature turned": (
        _PART,
        {"part": "t, rest = x[..., ::2], x[..., 1::2]", "joined": "y = torch.cat((y, rest), -1)"},
        "nothing",
    ),
    "the rotated returned too": (Rotary(key=False), {"output": "return q_y, r"}, "nothing"),
    "the query returned too": (_HALVES, {"output": "return q_y, k_y, q, k"}, "nothing"),
    "the rest returned too": (
        Rotary(partial=True, key=False),
        {"output": "return q_y, t"},
        "nothing",
    ),
    "written before": (_HALVES, {"wide": "t.mul_(2)"}, "nothing"),
    "written between": (_HALVES, {"rotation": "+t.mul_(2)"}, "nothing"),
    "half written between": (_HALVES, {"rotation": "+t[..., :4] = 1.0"}, "nothing"),
    "rotated written between": (_HALVES, {"rotation": "+r[..., 0] = 1.0"}, "nothing"),
    "written later": (_HALVES, {"back": "+t.zero_()", "output": "return q_y, k_y, q"}, "nothing"),
    "result written": (_HALVES, {"back": "+y[..., 0] = 1.0"}, "nothing"),
    "cos written between": (
        Rotary(key=False),
        {"beside": "+cos = cos + 0", "rotation": "+cos.zero_()"},
        "nothing",
    ),
    "cos written after the query": (
        _HALVES,
        {"beside": "+cos = cos + 0", "back": "+cos.mul_(0.5)"},
        "nothing",
    ),
    "query made of the key": (_HALVES, {"back": "+k = k + q_y[:, :1, :1, :1]"}, "nothing"),
    "rounded": (_HALVES, {"wide": "t = t.to(torch.bfloat16).float()"}, "nothing"),
    "rotated rounded": (_HALVES, {"rotation": "+r = r.half().float()"}, "nothing"),
    "angles rounded": (_HALVES, {"sum": "y = t * cos.bfloat16() + r * sin"}, "nothing"),
    "result rounded": (_HALVES, {"back": "y = y.to(torch.bfloat16)"}, "nothing"),
    "cut to integers": (_WIDE, {"wide": "t = (8 * t).long().to(t.dtype)"}, "nothing"),
    "integers": (_HALVES, {"wide": "t = (8 * t).long()"}, "nothing"),
    "apart, two sums": (
        _APART,
        {"sum": _PARTS.format("a * cos + b * sin, b * cos + a * sin")},
        _EVERY,
    ),
    "apart, turned back": (
        _APART,
        {"sum": _PARTS.format("a * cos + b * sin, b * cos - a * sin")},
        _EVERY,
    ),
    "apart, the difference behind": (
        _APART,
        {"sum": _PARTS.format("a * cos + b * sin, a * sin - b * cos")},
        _EVERY,
    ),
    "apart, the difference reversed": (
        _APART,
        {"sum": _PARTS.format("b * sin - a * cos, b * cos + a * sin")},
        _EVERY,
    ),
    "apart, sin and cos": (
        _APART,
        {"sum": _PARTS.format("a * cos - b * sin, b * sin + a * cos")},
        _EVERY,
    ),
    "apart, parts swapped": (
        _APART,
        {"sum": _PARTS.format("b * cos + a * sin, a * cos - b * sin")},
        _EVERY,
    ),
    "apart, halves swapped": (
        _APART,
        {"sum": _PARTS.format("b * cos - a * sin, a * cos + b * sin")},
        _EVERY,
    ),
    "apart, one half scaled": (
        _APART,
        {"sum": _PARTS.format("a * cos - (2 * b) * sin, b * cos + a * sin")},
        _EVERY,
    ),
    "apart, other angles behind": (
        _APART,
        {"sum": _PARTS.format("a * cos - b * sin, b * cos.flip(-1) + a * sin.flip(-1)")},
        _EVERY,
    ),
    "apart, with alpha": (
        _APART,
        {"sum": _PARTS.format("torch.sub(a * cos, b * sin, alpha=2), b * cos + a * sin")},
        _EVERY,
    ),
    "apart, halves by turns": (
        _PAIRS_APART,
        {
            "sum": "a, b = t[..., :4], t[..., 4:]\n"
            + _BY_TURNS.split("\n")[1].format("a * cos - b * sin, b * cos + a * sin")
        },
        _EVERY,
    ),
    "apart, odd before even": (
        _PAIRS_APART,
        {"sum": _BY_TURNS.format("b * cos - a * sin, a * cos + b * sin")},
        _EVERY,
    ),
    "apart, first half returned too": (
        Rotary(form="apart", key=False),
        {"back": "+first = y[..., :4] + 0", "output": "return q_y, first, a * cos"},
        "nothing",
    ),
    "apart, sin written between": (
        Rotary(form="apart", key=False),
        {"beside": "+sin = sin + 0"}
        | {
            "sum": "a, b = t.chunk(2, -1)\ny = a * cos - b * sin\nsin.mul_(2)\n"
            "y = torch.cat((y, b * cos + a * sin), -1)"
        },
        "nothing",
    ),
    "apart, sin written after the query": (
        _APART,
        {"beside": "+sin = sin + 0", "back": "+sin.mul_(0.5)"},
        "nothing",
    ),
    "complex, turned back": (
        _COMPLEX,
        {"sum": _Z + "y = torch.view_as_real(z * w.conj()).flatten(-2)"},
        "nothing",
    ),
    "complex, conjugated": (
        _COMPLEX,
        {"sum": _Z + "y = torch.view_as_real(z.conj() * w).flatten(-2)"},
        _EVERY,
    ),
    "complex, divided": (
        _COMPLEX,
        {"sum": _Z + "y = torch.view_as_real(z / w).flatten(-2)"},
        _EVERY,
    ),
    "complex, squared": (
        _COMPLEX,
        {"sum": _Z + "y = torch.view_as_real(z * z).flatten(-2)"},
        _EVERY,
    ),
    "complex, imaginary first": (
        _COMPLEX,
        {"sum": _Z + "y = torch.view_as_real(z * w).flip(-1).flatten(-2)"},
        _EVERY,
    ),
    "complex, parts one behind the other": (
        _COMPLEX,
        {"sum": _Z + "y = torch.view_as_real(z * w).transpose(-1, -2).flatten(-2)"},
        _EVERY,
    ),
    "complex, of halves": (
        _COMPLEX,
        {
            "sum": "z = torch.complex(t[..., :4].float(), t[..., 4:].float())\n"
            "y = torch.view_as_real(z * torch.complex(cos, sin)).flatten(-2)"
        },
        _EVERY,
    ),
    "complex, odd first": (
        _COMPLEX,
        {
            "sum": "z = torch.complex(t[..., 1::2].float(), t[..., ::2].float())\n"
            "y = torch.view_as_real(z * torch.complex(cos, sin)).flatten(-2)"
        },
        _EVERY,
    ),
    "complex, one factor for all": (
        _COMPLEX,
        {"sum": _Z + "y = torch.view_as_real(z * w[..., :1]).flatten(-2)"},
        "nothing",
    ),
    "complex, turned twice": (
        _COMPLEX,
        {"sum": _Z + "y = torch.view_as_real(z * w * w).flatten(-2)"},
        "nothing",
    ),
    "complex, written between": (
        _COMPLEX,
        {"sum": _Z + "z.mul_(2)\ny = torch.view_as_real(z * w).flatten(-2)"},
        "nothing",
    ),
    "complex, cos written behind the factor": (
        _COMPLEX,
        {"beside": "cos = cos + 0\nw = torch.complex(cos, sin)\ncos[..., 0] = 0.5"}
        | {"output": "return q_y, k_y, cos"},
        "nothing",
    ),
    "complex, cos written after the query": (
        _COMPLEX,
        {"beside": "cos = cos + 0"}
        | {"sum": _Z + "y = torch.view_as_real(z * w).flatten(-2)\ncos[..., 0] *= 0.5"},
        "nothing",
    ),
    "complex, the factor written after the query": (
        _COMPLEX,
        {"beside": "+w = w + 0"}
        | {
            "sum": _Z.split("\n")[0]
            + "\ny = torch.view_as_real(z * w).flatten(-2)\nw[..., 0] *= 0.5"
        },
        "nothing",
    ),
    "complex": (_HALVES, {"wide": "t = torch.complex(t, t)"}, _EVERY),
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
    return trap(name, {a: draw(st.sampled_from(o)) for a, o in axes(_SPOILT[name][0]).items()})
