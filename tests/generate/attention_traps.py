"""Near misses of attention: one stage of an attention spelt at random says something else."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from generate.attention import FORMS, Attention, axes, case
from generate.case import Case
from generate.mask_traps import CAUSAL, NO_DIAGONAL, OTHER_DIAGONALS, UNEQUAL


@dataclass(frozen=True, slots=True)
class Trap:
    """What is spoilt (see `generate.attention.case`), in which meanings, and what that forbids."""

    spoilt: Mapping[str, str]
    forbidden: str = "nothing"
    form: str = FORMS[0]
    meaning: Attention = field(default_factory=Attention)
    fixed: Mapping[str, str] = field(default_factory=dict)


GIVEN = Attention(keep="given")
BIAS = Attention(keep="bias")
SQUARE = Attention(q=8, k=8)
GROUPED = Attention(kv_heads=2)
SINKS = Attention(sinks=True)
CAPPED = Attention(capped=True)
COLUMN = "sinks.view(1, {H}, 1, 1).expand(z.shape[0], -1, z.shape[2], 1)"

NO_REWRITE = {
    "softmax over queries": ({"softmax": "p = torch.softmax(z, -2)"}, Attention()),
    "softmax over heads": ({"softmax": "p = F.softmax(z, dim=1)"}, Attention()),
    "softmax over the batch": ({"softmax": "p = z.softmax(0)"}, Attention()),
    "sum over queries": (
        {"softmax": "e = (z - z.amax(-1, keepdim=True)).exp()\np = e / e.sum(-2, keepdim=True)"},
        Attention(),
    ),
    "sum of something else": (
        {
            "softmax": (
                "e = (z - z.amax(-1, keepdim=True)).exp()\np = e / z.exp().sum(-1, keepdim=True)"
            )
        },
        Attention(),
    ),
    "sum and one": (
        {"softmax": "e = z.exp()\np = e / (1 + e.sum(-1, keepdim=True))"},
        Attention(),
    ),
    "power of two": (
        {"softmax": "e = (z - z.amax(-1, True)).exp2()\np = e / e.sum(-1, True)"},
        Attention(),
    ),
    "absolute sum": (
        {"softmax": "e = z - z.amin(-1, True)\np = e / e.sum(-1, True)"},
        Attention(),
    ),
    "no sum": ({"softmax": "p = (z - z.amax(-1, True)).exp()"}, Attention()),
    "log_softmax": ({"softmax": "p = F.log_softmax(z, -1)"}, Attention()),
    "softmin": ({"softmax": "p = F.softmin(z, -1)"}, Attention()),
    "scale from data": ({"after": "z = z * q.abs().mean()"}, Attention()),
    "divided by data": ({"after": "z = z / k.norm()"}, Attention()),
    "scale per head": ({"after": "z = z * q.abs().mean((2, 3), keepdim=True)"}, Attention()),
    "scale per key": ({"after": "z = z * torch.linspace(0.5, 2, {Sk})"}, Attention()),
    "reciprocal scores": ({"after": "z = {c} / z"}, Attention()),
    "rounded scores": ({"after": "z = torch.div(z, {d}, rounding_mode='floor')"}, Attention()),
    "squared scores": ({"after": "z = (z * {c}) ** 2"}, Attention()),
    "capped by a sigmoid": ({"after": "z = 5 * torch.sigmoid(z / 5)"}, Attention()),
    "capped by data": ({"after": "m = z.amax()\nz = m * torch.tanh(z / m)"}, Attention()),
    "capped after the mask": (
        {"softmax": "z = 5 * torch.tanh(z / 5)\np = torch.softmax(z, -1)"},
        Attention(keep="causal"),
    ),
    "capped after the bias": ({"bias": "z = 5 * torch.tanh((z + bias) / 5)"}, BIAS),
    "capped twice": (
        {"after": "z = 5 * torch.tanh(z / 5)\nz = 3 * torch.tanh(z / 3)"},
        Attention(),
    ),
    "weights returned": ({"output": "return o, p"}, Attention()),
    "scores returned": ({"output": "return o, z"}, Attention()),
    "sum of the weights returned": ({"output": "return o, p.sum(-1)"}, Attention()),
    "dropout": (
        {"dropout": "p = F.dropout(p, 0.5, training=True)", "output": "return o.isnan()"},
        Attention(),
    ),
    "dropout of everything": ({"dropout": "p = torch.dropout(p, 1.0, True)"}, Attention()),
    "alpha dropout": (
        {"dropout": "p = F.alpha_dropout(p, 0.5, training=True)", "output": "return o.isnan()"},
        Attention(),
    ),
    "weights masked": ({"exclusion": "", "dropout": "p = p.masked_fill(~keep, 0.0)"}, CAUSAL),
    "weights multiplied by the mask": ({"exclusion": "", "dropout": "p = p * keep"}, CAUSAL),
    "weights squared": ({"dropout": "p = p * p"}, Attention()),
    "weights shifted": ({"dropout": "p = p + 1e-3"}, Attention()),
    "weights rolled": ({"dropout": "p = p.roll(1, -1)"}, Attention()),
    "weights transposed": ({"dropout": "p = p.mT"}, Attention()),
    "scores multiplied by the mask": ({"exclusion": "z = z * keep"}, CAUSAL),
    "boolean added": ({"exclusion": "z = z + keep"}, CAUSAL),
    "one key too few": (
        {"softmax": "p = torch.softmax(z, -1)[..., :-1]", "value": "o = p @ v[:, :, 1:]"},
        Attention(),
    ),
    "a sink": ({"softmax": "p = torch.softmax(F.pad(z, (1, 0)), -1)[..., 1:]"}, Attention()),
    "a key dropped for the sink": ({"dropped": "p = p[..., 1:]"}, SINKS),
    "a sink kept": ({"dropped": "", "value": "o = p @ F.pad(v, (0, 0, 0, 1), value=1.0)"}, SINKS),
    "a key dropped too": ({"dropped": "p = p[..., :-2]", "value": "o = p @ v[:, :, 1:]"}, SINKS),
    "two sinks": (
        {"sinks": f"z = torch.cat((z, {COLUMN}, {COLUMN}), -1)", "dropped": "p = p[..., :-2]"},
        SINKS,
    ),
    "a sink per query": ({"sinks": "z = torch.cat((z, z.mean(-1, keepdim=True)), -1)"}, SINKS),
    "a sink per sequence": (
        {"sinks": "z = torch.cat((z, q.mean((2, 3), keepdim=True).expand(-1, -1, {Sq}, 1)), -1)"},
        SINKS,
    ),
    "sinks beside the queries": (
        {
            "sinks": "z = torch.cat((z, sinks.view(1, {H}, 1, 1).expand(2, -1, 1, {Sk})), 2)",
            "dropped": "p = p[:, :, :-1]",
        },
        SINKS,
    ),
    "alpha of the mask": ({"bias": "z = torch.add(z, bias, alpha=2)"}, BIAS),
    "bias divided too late": ({"after": "", "bias": "z = bias / z"}, BIAS),
    "values on the left": ({"value": "o = v.mT @ p"}, Attention()),
}
"""Not attention as the op has it: stages and meaning; any rewrite is wrong."""

EQUAL = {
    "key reshaped, not transposed": (
        {"product": "z = q @ k.reshape(k.shape[0], {H}, {D}, {Sk})"},
        Attention(),
    ),
    "key not transposed": ({"product": "z = q @ k"}, SQUARE),
    "value transposed": ({"value": "o = p @ v.mT"}, SQUARE),
    "query and key swapped": ({"product": "z = k @ q.mT"}, Attention()),
    "einsum, key not transposed": (
        {"product": "z = torch.einsum('bhqd,bhdk->bhqk', q, k)"},
        SQUARE,
    ),
    "einsum, scores transposed": (
        {"product": "z = torch.einsum('bhqd,bhkd->bhkq', q, k)"},
        Attention(),
    ),
    "einsum, value transposed": ({"value": "o = torch.einsum('bhqk,bhdk->bhqd', p, v)"}, SQUARE),
    "einsum, weights transposed": (
        {"value": "o = torch.einsum('bhkq,bhkd->bhqd', p, v)"},
        Attention(),
    ),
    "einsum over heads": ({"value": "o = torch.einsum('bhqk,bgkd->bhqd', p, v)"}, Attention()),
    "scaled after the sinks": ({"sinks": f"z = torch.cat((z, {COLUMN}), -1) * 2"}, SINKS),
    "weights of the keys renormalised": (
        {"dropped": "p = p[..., :-1]; p = p / p.sum(-1, keepdim=True)"},
        SINKS,
    ),
    "every second weight": (
        {"dropped": "p = p[..., : 2 * {Sk} : 2]", "value": "o = p @ v[:, :, : p.shape[-1]]"},
        SINKS,
    ),
    "sinks of other heads": ({"sinks": f"z = torch.cat((z, {COLUMN}.flip(1)), -1)"}, SINKS),
    "heads of another query": ({"operands": "+q = q.flip(1)"}, Attention()),
    "scale three times": (
        {"before": "q = q * {c}; k = k / {d}", "after": "z = z * {c}"},
        Attention(),
    ),
    "capped at another height": ({"capped": "z = 5 * torch.tanh(z / 3)"}, CAPPED),
    "capped at nought": ({"capped": "z = 0.0 * torch.tanh(z / 3)"}, CAPPED),
    "capped below": ({"capped": "z = -2 * torch.tanh(z / 3)"}, CAPPED),
    "capped and scaled": ({"capped": "+z = z * 0.5"}, CAPPED),
    "weights of the cap returned": ({"capped": "+t = z.sum()", "output": "return o, t"}, CAPPED),
    "negative scale": ({"after": "z = z * -{c}"}, Attention()),
    "scale of zero": ({"after": "z = z * 0.0"}, Attention()),
    "scale from data on the query": ({"before": "q = q * q.abs().mean()"}, Attention()),
    "scale per feature": ({"before": "k = k * torch.linspace(0.5, 2, {D})"}, Attention()),
    "integer division": ({"before": "q = torch.div(q, {d}, rounding_mode='trunc')"}, Attention()),
    "scores rounded": (
        {"after": "+z = z.bfloat16()", "softmax": "p = z.softmax(-1).float()"},
        Attention(),
    ),
    "scores rounded and widened": ({"after": "+z = z.half().float()"}, Attention()),
    "weights rounded": ({"dropout": "p = p.bfloat16().float()"}, Attention()),
    "query rounded": ({"operands": "+q = q.bfloat16().float()"}, Attention()),
    "mask returned too": ({"output": "return o, keep"}, CAUSAL),
    "query returned too": ({"output": "return o, q, k"}, Attention()),
    "fill that does not exclude": ({"exclusion": "z = z.masked_fill(~keep, -5.0)"}, CAUSAL),
    "fill of zero": ({"exclusion": "z = z.masked_fill(~keep, 0.0)"}, CAUSAL),
    "fill of -1e4": ({"exclusion": "z = torch.where(keep, z, -1e4)"}, CAUSAL),
    "bias before the scale": ({"product": "+z = z + bias", "bias": ""}, BIAS),
    "penalty before the scale": (
        {"product": "+z = z + torch.where(keep, 0.0, -5.0)", "exclusion": ""},
        CAUSAL,
    ),
    "bias twice": ({"bias": "z = z + bias + bias"}, BIAS),
    "bias of one key": ({"bias": "z = z + bias[..., :1]"}, BIAS),
    "bias of one query": ({"bias": "z = z + bias[:, :, :1]"}, BIAS),
    "bias transposed": ({"bias": "z = z + bias.mT"}, BIAS),
    "bias and triangle": (
        {"bias": "z = z + bias + torch.full((6, 6), float('-inf')).triu(1)"},
        BIAS,
    ),
    "query written later": ({"product": "+q.mul_(2)"}, Attention()),
    "query written through a view": ({"product": "+q[:, :, 0].zero_()"}, Attention()),
    "key written later": ({"product": "+k.zero_()"}, Attention()),
    "key written after the softmax": ({"softmax": "+k[..., 0] = 3.0"}, Attention()),
    "value written before the end": ({"softmax": "+v.mul_(3)"}, Attention()),
    "value written after the end": ({"value": "+v.mul_(3)"}, Attention()),
    "scores written": ({"after": "+z[..., 0] = 2.0"}, Attention()),
    "scores written after the softmax": ({"softmax": "+z.zero_()"}, Attention()),
    "weights written": ({"softmax": "+p[..., 0] = 0.0"}, Attention()),
    "bias written later": ({"bias": "+bias.fill_(9.0)"}, BIAS),
    "bias written before": ({"after": "+bias.fill_(9.0)"}, BIAS),
    "mask written after its use": ({"exclusion": "+keep.fill_(True)"}, GIVEN),
    "mask written before its use": ({"keep": "+keep[..., 1] = False"}, GIVEN),
    "integers compared": ({"keep": "keep = (keep.long() * 3 - 2) > 0"}, GIVEN),
    "integers compared with one": ({"keep": "keep = (keep.long() * 2 + 1) == 1"}, GIVEN),
    "floats as conditions": ({"keep": "keep = (keep.float() - 0.5).bool()"}, GIVEN),
    "mask of values": ({"keep": "keep = q[:, :, :, :1] > -9"}, GIVEN),
    "doubled mask product": (
        {"exclusion": "z = z + (1.0 - keep.to(z.dtype) * 2) * -7.0"},
        GIVEN,
    ),
    "polarity": ({"keep": "+keep = ~keep | torch.eye({Sq}, {Sk}, dtype=torch.bool)"}, GIVEN),
    "key heads tiled": ({"operands": "k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)"}, GROUPED),
    "value heads tiled": (
        {"operands": "k, v = k.repeat_interleave(2, 1), v.repeat(1, 2, 1, 1)"},
        GROUPED,
    ),
    "key heads tiled by expand": (
        {"operands": "k, v = (x[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2) for x in (k, v))"},
        GROUPED,
    ),
    "key heads interleaved by hand": (
        {"operands": "k, v = k[:, [0, 1, 0, 1]], v[:, [0, 0, 1, 1]]"},
        GROUPED,
    ),
    "key heads reversed": ({"operands": "k, v = k[:, [1, 1, 0, 0]], v[:, [1, 1, 0, 0]]"}, GROUPED),
    "key heads uneven": ({"operands": "k, v = k[:, [0, 0, 0, 1]], v[:, [0, 0, 0, 1]]"}, GROUPED),
    "lengths repeated": (
        {
            "operands": "k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)\n"
            "q, k, v = q[:, :2], k, v",
            "output": "return o",
        },
        GROUPED,
    ),
}
"""Rewritten or not, the result must be the same."""

_FUSED_CAUSAL = {"exclusion": "is_causal"}
FUSED = {
    "is_causal, longer keys": Trap({"output": "+"}, "nothing", "fused", UNEQUAL, _FUSED_CAUSAL),
    "is_causal, longer queries": Trap(
        {"output": "+"}, "nothing", "fused", Attention(keep="causal", q=9, k=3), _FUSED_CAUSAL
    ),
    "dropout_p": Trap(
        {
            "value": "o = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)",
            "output": "return o.isnan()",
        },
        "any rewrite",
        "fused",
    ),
    "inverted boolean": Trap(
        {"value": "o = F.scaled_dot_product_attention(q, k, v, ~keep)"},
        "a diagonal",
        "fused",
        Attention(keep="causal", q=6, k=9),
    ),
    "boolean as number": Trap(
        {"value": "o = F.scaled_dot_product_attention(q, k, v, keep.float())"},
        "a diagonal",
        "fused",
        CAUSAL,
    ),
    "query written later": Trap({"value": "+q.mul_(2)"}, "nothing", "fused"),
    "mask written before": Trap(
        {"keep": "+keep = keep.clone()\nkeep[..., 0, 3] = True"}, "a diagonal", "fused", CAUSAL
    ),
    "scale of zero": Trap(
        {"value": "o = F.scaled_dot_product_attention(q, k, v, scale=0.0)"}, "nothing", "fused"
    ),
    "value transposed": Trap(
        {"value": "o = F.scaled_dot_product_attention(q, k, v.mT)"}, "nothing", "fused", SQUARE
    ),
}

TRAPS: dict[str, Trap] = {
    **{n: Trap(s, "any rewrite", meaning=m) for n, (s, m) in NO_REWRITE.items()},
    **{n: Trap(s, "nothing", meaning=m) for n, (s, m) in EQUAL.items()},
    **{n: Trap(s, "a diagonal", meaning=m) for n, (s, m) in NO_DIAGONAL.items()},
    **{n: Trap(s, "nothing", meaning=m) for n, (s, m) in OTHER_DIAGONALS.items()},
    **{f"fused: {n}": trap for n, trap in FUSED.items()},
}


def trap(name: str, choices: Mapping[str, str] | None = None) -> Case:
    """The module of one trap, the other stages spelt by `choices`."""
    t = TRAPS[name]
    made = case(t.meaning, t.form, {**(choices or {}), **t.fixed}, t.spoilt, t.forbidden)
    return replace(made, words={"trap": name} | made.words, respell=lambda other: trap(name, other))


@st.composite
def traps(draw: st.DrawFn) -> Case:
    """A random trap, whatever it leaves open spelt at random."""
    name = draw(st.sampled_from(tuple(TRAPS)))
    t = TRAPS[name]
    known = {a: o for a, o in axes(t.meaning, t.form).items() if _keeps(t, a)}
    return trap(name, {a: draw(st.sampled_from(o)) for a, o in known.items()})


def _keeps(t: Trap, axis: str) -> bool:
    """May the axis vary: the trap names neither it nor anything that it would put away?"""
    if "operands" in t.spoilt and not t.spoilt["operands"].startswith("+"):
        return axis not in ("query", "key", "repeat")
    if axis == "sinks":
        return False  # where the sink stands says what is spoilt
    if axis == "exclusion" and t.form == "spelt out":
        return False  # a triangle of its own would replace the spoilt mask
    return axis not in t.fixed
