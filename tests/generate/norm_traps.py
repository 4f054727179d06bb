"""Near misses of the norms: one stage of a norm spelt at random says something else."""

from collections.abc import Mapping
from dataclasses import replace

from hypothesis import strategies as st

from generate.case import Case
from generate.norm import Norm, axes, case

LAYER = Norm(center=True, bias=True)
_EVERY = "any rewrite"
_SPOILT: dict[str, tuple[Norm, dict[str, str], str]] = {
    "eps outside the root": (Norm(), {"root": "h = h / (torch.sqrt(s) + {eps})"}, _EVERY),
    "eps outside the reciprocal root": (
        Norm(),
        {"root": "h = h * (torch.rsqrt(s) + {eps})"},
        _EVERY,
    ),
    "eps inside the mean": (
        Norm(eps=1e-2),
        {"squares": "s = (h.pow(2) + {eps}).sum(-1, True) / {D}"},
        "nothing",
    ),
    "eps added to x": (
        Norm(eps=1e-2),
        {"squares": "s = (h + {eps}).pow(2).mean(-1, True)"},
        _EVERY,
    ),
    "eps by clamping": (Norm(eps=0.5), {"root": "h = h * s.clamp_min({eps}).rsqrt()"}, _EVERY),
    "eps subtracted": (Norm(eps=1e-3), {"root": "h = h * torch.rsqrt(s - {eps})"}, "nothing"),
    "eps twice": (Norm(eps=1e-2), {"root": "h = h * torch.rsqrt(s + {eps} + {eps})"}, "nothing"),
    "eps from data": (Norm(), {"root": "h = h * torch.rsqrt(s + x.abs().amax())"}, _EVERY),
    "mean over two axes": (
        Norm(),
        {"squares": "s = h.pow(2).mean((-2, -1), keepdim=True)"},
        _EVERY,
    ),
    "mean over everything": (Norm(), {"squares": "s = h.pow(2).mean()"}, _EVERY),
    "mean over the length": (Norm(), {"squares": "s = h.pow(2).mean(1, keepdim=True)"}, _EVERY),
    "mean over the batch": (Norm(), {"squares": "s = h.pow(2).mean(0, keepdim=True)"}, _EVERY),
    "sum instead of mean": (Norm(), {"squares": "s = h.pow(2).sum(-1, keepdim=True)"}, _EVERY),
    "sum over another count": (
        Norm(),
        {"squares": "s = h.pow(2).sum(-1, keepdim=True) / 15"},
        _EVERY,
    ),
    "sum over the count of another axis": (
        Norm(),
        {"squares": "s = h.pow(2).sum(-1, keepdim=True) / h.shape[1]"},
        _EVERY,
    ),
    "mean unsqueezed in front": (
        Norm(),
        {"squares": "s = h[:, :1].pow(2).mean(-1).unsqueeze(1)"},
        "nothing",
    ),
    "unbiased var_mean": (
        LAYER,
        {"squares": "s, m = torch.var_mean(h, dim=-1, keepdim=True)\nh = h - m"},
        _EVERY,
    ),
    "mean and variance exchanged": (
        LAYER,
        {"squares": "m, s = torch.var_mean(h, -1, unbiased=False, keepdim=True)\nh = h - m"},
        _EVERY,
    ),
    "deviation not squared": (
        LAYER,
        {"squares": "s = h.std(-1, unbiased=False, keepdim=True)\nh = h - h.mean(-1, True)"},
        _EVERY,
    ),
    "deviation cubed": (
        LAYER,
        {"squares": "s = h.std(-1, False, True) ** 3\nh = h - h.mean(-1, keepdim=True)"},
        _EVERY,
    ),
    "mean of half the row": (
        Norm(),
        {"squares": "s = h[..., :8].pow(2).mean(-1, keepdim=True)"},
        _EVERY,
    ),
    "mean of a slice off by one": (
        Norm(),
        {"squares": "s = h[..., 1:].pow(2).mean(-1, keepdim=True)"},
        _EVERY,
    ),
    "squared mean": (Norm(), {"squares": "s = h.mean(-1, keepdim=True).pow(2)"}, _EVERY),
    "cubes": (Norm(), {"squares": "s = h.abs().pow(3).mean(-1, keepdim=True)"}, _EVERY),
    "absolute values": (Norm(), {"squares": "s = h.abs().mean(-1, keepdim=True)"}, _EVERY),
    "no root": (Norm(), {"root": "h = h / (s + {eps})"}, _EVERY),
    "root of the root": (Norm(), {"root": "h = h * (s + {eps}) ** -0.25"}, _EVERY),
    "multiplied by the root": (Norm(), {"root": "h = h * torch.sqrt(s + {eps})"}, _EVERY),
    "another tensor's mean": (
        Norm(residual=True),
        {"squares": "s = r.pow(2).mean(-1, True)"},
        _EVERY,
    ),
    "another tensor scaled": (
        Norm(residual=True),
        {"root": "h = r * torch.rsqrt(s + {eps})"},
        _EVERY,
    ),
    "before the sum": (
        Norm(residual=True),
        {"residual": "h = x", "output": "return h + r"},
        "nothing",
    ),
    "sum with alpha": (
        Norm(residual=True),
        {"residual": "h = torch.add(x, r, alpha=2)"},
        "nothing",
    ),
    "sum broadcast": (Norm(residual=True), {"residual": "h = x + r[:1]"}, "nothing"),
    "sum of itself": (Norm(), {"residual": "h = x + x"}, "nothing"),
    "sum written later": (
        Norm(residual=True),
        {"residual": "h = x + r\ntotal = h", "output": "total.mul_(2)\nreturn h, total"},
        "nothing",
    ),
    "sum written between": (
        Norm(residual=True),
        {
            "residual": "h = x + r\ntotal = h",
            "squares": "+total.mul_(2)",
            "output": "return h, total",
        },
        "nothing",
    ),
    "sum written through a view": (
        Norm(residual=True),
        {
            "residual": "h = x + r\ntotal = h",
            "squares": "+total[..., 0] = 0",
            "output": "return h, total",
        },
        "nothing",
    ),
    "summand written between": (
        Norm(residual=True),
        {"residual": "h = x + r\nx.zero_()", "output": "return h, x"},
        "nothing",
    ),
    "input written between": (Norm(), {"squares": "+x.mul_(3)"}, "nothing"),
    "result written": (Norm(), {"root": "+h[..., 0] = 1.0"}, "nothing"),
    "weight of the input": (Norm(), {"weight": "h = h * x"}, "nothing"),
    "weight of one row": (Norm(), {"weight": "h = h * x[0, 0]"}, "nothing"),
    "weight per position": (
        Norm(),
        {"weight": "h = h * torch.linspace(1, 2, 5)[:, None]"},
        "nothing",
    ),
    "weight less one": (Norm(), {"weight": "h = h * (self.weight - 1)"}, "nothing"),
    "one less weight": (Norm(), {"weight": "h = h * (1 - self.weight)"}, "nothing"),
    "two more": (Norm(), {"weight": "h = h * (2 + self.weight)"}, "nothing"),
    "weight twice": (Norm(), {"weight": "h = h * self.weight * self.weight"}, "nothing"),
    "weight flipped": (Norm(), {"weight": "h = h * self.weight.flip(0)"}, "nothing"),
    "weight added": (Norm(), {"weight": "h = h + self.weight"}, "nothing"),
    "gated": (Norm(residual=True), {"residual": "h = x", "weight": "h = h * F.silu(r)"}, "nothing"),
    "mean returned too": (Norm(), {"output": "return h, s"}, "nothing"),
    "input returned too": (Norm(), {"output": "return h, x"}, "nothing"),
    "before the weight returned too": (
        Norm(),
        {"weight": "n = h\nh = h * self.weight", "output": "return h, n"},
        "nothing",
    ),
    "divided by its norm": (
        Norm(),
        {"squares": "s = 0", "root": "h = F.normalize(h, dim=-1)"},
        _EVERY,
    ),
    "two dimensions in one norm": (
        LAYER,
        {"squares": "", "root": "h = F.layer_norm(h, (5, {D}))", "weight": "", "bias": ""},
        _EVERY,
    ),
    "rms of two dimensions": (
        Norm(),
        {"squares": "", "root": "h = F.rms_norm(h, (5, {D}), eps={eps})", "weight": ""},
        _EVERY,
    ),
    "transposed rows": (Norm(), {"residual": "h = x.mT", "weight": "h = h.mT"}, "nothing"),
    "unbiased variance": (
        LAYER,
        {"squares": "s = h.var(-1, keepdim=True)\nh = h - h.mean(-1, keepdim=True)"},
        _EVERY,
    ),
    "variance not centred": (
        LAYER,
        {"squares": "s = h.pow(2).mean(-1, keepdim=True)\nh = h - h.mean(-1, keepdim=True)"},
        _EVERY,
    ),
    "only the variance centred": (
        LAYER,
        {"squares": "s = h.var(-1, unbiased=False, keepdim=True)"},
        _EVERY,
    ),
    "mean over the length subtracted": (
        LAYER,
        {"squares": "h = h - h.mean(1, keepdim=True)\ns = h.pow(2).mean(-1, keepdim=True)"},
        "nothing",
    ),
    "mean added": (
        LAYER,
        {
            "squares": (
                "m = h.mean(-1, keepdim=True)\ns = (h - m).pow(2).mean(-1, keepdim=True)\nh = h + m"
            )
        },
        _EVERY,
    ),
    "mean reversed": (
        LAYER,
        {"squares": "h = h.mean(-1, keepdim=True) - h\ns = h.pow(2).mean(-1, keepdim=True)"},
        "nothing",
    ),
    "bias before the weight": (
        LAYER,
        {"weight": "h = (h + self.bias) * self.weight", "bias": ""},
        "nothing",
    ),
    "bias subtracted": (LAYER, {"bias": "h = h - self.bias"}, "nothing"),
    "bias with alpha": (LAYER, {"bias": "h = torch.add(h, self.bias, alpha=3)"}, "nothing"),
    "group norm": (
        LAYER,
        {
            "squares": "",
            "root": "h = F.group_norm(h.mT, 4, eps={eps}).mT",
            "weight": "",
            "bias": "",
        },
        _EVERY,
    ),
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
