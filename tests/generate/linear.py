"""A linear layer, x Wᵀ + b, in the spellings that model code has, and near misses of it.

The weight's entries are small whole numbers, so that a quantised form holds it without loss: what
is rewritten must then be equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from generate.case import Case, Input

K = N = 64  # square, so that no shape tells a weight from its transpose


@dataclass(frozen=True, slots=True)
class Linear:
    """x [2, 5, 64], or [5, 64] when `flat`, times a constant weight [64, 64]."""

    bias: bool = True
    flat: bool = False


_ROWS = "w = w.where(torch.arange(64) > 0, torch.tensor(7.0))"  # each row reaches the largest code
_WEIGHT = "w = torch.randint(-7, 8, (64, 64)).float(); " + _ROWS
PLAIN = (_WEIGHT, "self.weight = nn.Parameter(w)", "self.bias = nn.Parameter(torch.randn(64))")
TRANSPOSED = (_WEIGHT, "self.weight = nn.Parameter(w.T.contiguous())", PLAIN[2])
MODULE = (
    _WEIGHT,
    "self.proj = nn.Linear(64, 64, bias={bias})",
    "self.proj.weight = nn.Parameter(w)",
)

SPELLINGS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "nn.Linear": (MODULE, "y = self.proj(x)", "module"),
    "F.linear": (PLAIN, "y = F.linear(x, self.weight{, bias})", "inside"),
    "matmul": (PLAIN, "y = x @ self.weight.T", "after"),
    "matmul, mT": (PLAIN, "y = torch.matmul(x, self.weight.mT)", "after"),
    "matmul, t": (PLAIN, "y = x.matmul(self.weight.t())", "after"),
    "matmul, transpose": (PLAIN, "y = x @ self.weight.transpose(0, 1)", "after"),
    "matmul, permute": (PLAIN, "y = x @ self.weight.permute(1, 0)", "after"),
    "matmul, transposed weight": (TRANSPOSED, "y = x @ self.weight", "after"),
    "weight first": (PLAIN, "y = (self.weight @ x.mT).mT", "after"),
    "mm": (PLAIN, "y = torch.mm(x.reshape(-1, 64), self.weight.t()).view(x.shape)", "after"),
    "mm, transposed weight": (
        TRANSPOSED,
        "y = torch.mm(x.view(-1, x.size(-1)), self.weight).view(x.shape)",
        "after",
    ),
    "addmm, Conv1D": (
        TRANSPOSED,
        "y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)"
        ".view(x.size()[:-1] + (64,))",
        "needed",
    ),
    "addmm": (
        PLAIN,
        "y = torch.addmm(self.bias, x.flatten(0, -2), self.weight.T).reshape(x.shape)",
        "needed",
    ),
    "einsum": (PLAIN, "y = torch.einsum('...i,oi->...o', x, self.weight)", "after"),
    "einsum, weight first": (PLAIN, "y = torch.einsum('oi,...i->...o', self.weight, x)", "after"),
    "einsum, transposed weight": (
        TRANSPOSED,
        "y = torch.einsum('...i,io->...o', x, self.weight)",
        "after",
    ),
    "baddbmm": (
        PLAIN,
        "y = torch.baddbmm(self.bias, x.reshape(-1, 5, 64), "
        "self.weight.T.expand(x.numel() // 320, 64, 64))"
        ".view(x.shape)",
        "needed",
    ),
    "bmm": (
        PLAIN,
        (
            "y = torch.bmm(x.reshape(-1, 5, 64), "
            "self.weight.T.expand(x.numel() // 320, 64, 64)).view(x.shape)"
        ),
        "after",
    ),
    "tensordot": (PLAIN, "y = torch.tensordot(x, self.weight, dims=([-1], [1]))", "after"),
    "conv1d": (
        PLAIN,
        "y = F.conv1d(x.mT, self.weight.unsqueeze(-1)).mT",
        "after",
    ),
    "inner": (PLAIN, "y = torch.inner(x, self.weight)", "after"),
}
"""Name -> statements of setup, the product, and where the bias stands."""

BIASES = {
    "added": "y = y + self.bias",
    "commuted": "y = self.bias + y",
    "function": "y = torch.add(y, self.bias)",
    "in place": "y += self.bias",
}
INPUTS = {
    "as it is": "",
    "contiguous": "x = x.contiguous()",
    "dropout": "x = F.dropout(x, 0.1, self.training)",
}


def axes(m: Linear) -> dict[str, tuple[str, ...]]:
    """Axis -> its choices, the plainest first."""
    unfit = set() if m.bias else {s for s, (*_, at) in SPELLINGS.items() if at == "needed"}
    found = {"product": tuple(s for s in SPELLINGS if s not in unfit), "input": tuple(INPUTS)}
    return found | ({"bias": tuple(BIASES)} if m.bias else {})


def case(
    meaning: Linear,
    choices: Mapping[str, str],
    spoilt: Mapping[str, str] | None = None,
    forbidden: str = "nothing",
) -> Case:
    """The module for one choice on each axis (the plainest where none is given).

    spoilt: stage ("input", "product", "bias", "output") -> other statements in its place, or,
    after a "+", more statements behind it.
    """
    chosen = {axis: choices.get(axis, options[0]) for axis, options in axes(meaning).items()}
    setup, product, at = SPELLINGS[chosen["product"]]
    if at != "after":
        chosen.pop("bias", None)
    stages = {
        "input": INPUTS[chosen["input"]],
        "product": product.replace("{, bias}", ", self.bias" if meaning.bias else ""),
        "bias": BIASES[chosen["bias"]] if "bias" in chosen else "",
        "output": "return y",
    }
    for stage, text in (spoilt or {}).items():
        stages[stage] = f"{stages[stage]}\n{text[1:]}" if text.startswith("+") else text
    text = "\n".join(t.strip() for t in stages.values() if t)
    return Case(
        rewrite="quantized_linear",
        words={"with a bias": str(meaning.bias), "flat": str(meaning.flat)},
        choices=chosen,
        respell=lambda other: case(meaning, other, spoilt, forbidden),
        inputs=(Input("x", (5, K) if meaning.flat else (2, 5, K)),),
        body=tuple(text.split("\n")),
        setup=tuple(line.replace("{bias}", str(meaning.bias)) for line in setup),
        forbidden=forbidden,
    )


MEANINGS = st.builds(Linear, bias=st.booleans(), flat=st.booleans())


@st.composite
def spellings(draw: st.DrawFn) -> Case:
    """A random meaning, spelt at random."""
    meaning = draw(MEANINGS)
    return case(meaning, {a: draw(st.sampled_from(o)) for a, o in axes(meaning).items()})


def single_choices() -> list[Case]:
    """Every choice once, all else plain; every product with and without bias and batch."""
    found: dict[str, Case] = {}
    for meaning in (Linear(), Linear(bias=False), Linear(flat=True), Linear(False, True)):
        for axis, options in axes(meaning).items():
            for choice in options:
                product = {"product": "matmul"} if axis == "bias" else {}
                made = case(meaning, {axis: choice, **product})
                found.setdefault(made.source + str(meaning.flat), made)
    return list(found.values())


_F = "y = F.linear(x, self.weight, self.bias)"
_SPOILT: dict[str, tuple[dict[str, str], str]] = {
    "weight not transposed": ({"product": "y = x @ self.weight"}, "nothing"),
    "weight transposed twice": ({"product": "y = x @ self.weight.T.T"}, "nothing"),
    "weight of linear transposed": ({"product": "y = F.linear(x, self.weight.T)"}, "nothing"),
    "einsum, weight transposed": (
        {"product": "y = torch.einsum('bsi,io->bso', x, self.weight)"},
        "nothing",
    ),
    "einsum over the length": (
        {"product": "y = torch.einsum('bsi,oj->bso', x, self.weight)"},
        "any rewrite",
    ),
    "einsum, diagonal": (
        {"product": "y = torch.einsum('bsi,ii->bsi', x, self.weight)"},
        "any rewrite",
    ),
    "einsum, result transposed": (
        {"product": "y = torch.einsum('bsi,oi->bos', x, self.weight).mT"},
        "nothing",
    ),
    "weight from data": ({"product": "y = x @ (self.weight * x.mean())"}, "any rewrite"),
    "weight written before": (
        {"product": "w = self.weight.detach().clone()\nw[3, 5] = 9.0\ny = F.linear(x, w)"},
        "nothing",
    ),
    "weight written through a view": (
        {"product": "w = self.weight.detach().clone()\nw.view(-1)[7] = 9.0\ny = x @ w.T"},
        "nothing",
    ),
    "weight written later": (
        {"product": "w = self.weight.detach().clone()\ny = F.linear(x, w)\nw.zero_()"},
        "nothing",
    ),
    "weight returned too": (
        {"product": _F, "bias": "", "output": "return y, self.weight * 1"},
        "nothing",
    ),
    "half the weight": ({"product": "y = F.linear(x[..., :32], self.weight[:, 32:])"}, "nothing"),
    "rows one too late": ({"product": "y = F.linear(x, self.weight.roll(1, 0))"}, "nothing"),
    "alpha of addmm": (
        {
            "product": (
                "y = torch.addmm(self.bias, x.flatten(0, 1), self.weight, alpha=2).view(x.shape)"
            )
        },
        "nothing",
    ),
    "beta of addmm": (
        {
            "product": (
                "y = torch.addmm(self.bias, x.flatten(0, 1), self.weight.T, beta=2).view(x.shape)"
            )
        },
        "nothing",
    ),
    "bias per row": (
        {
            "product": "b = torch.linspace(-1, 1, 10)[:, None]\n"
            "y = torch.addmm(b, x.view(-1, 64), self.weight).view(x.shape)"
        },
        "nothing",
    ),
    "rows of another shape": (
        {"product": "y = torch.addmm(self.bias, x.view(-1, 64), self.weight).view(5, 2, 64)"},
        "nothing",
    ),
    "columns as rows": (
        {"product": "y = torch.addmm(self.bias, x.mT.reshape(-1, 64), self.weight).view(x.shape)"},
        "nothing",
    ),
    "flat rows read twice": (
        {
            "product": "flat = torch.addmm(self.bias, x.view(-1, 64), self.weight)\n"
            "y = flat.view(x.shape) + flat.mean()"
        },
        "nothing",
    ),
    "input written between": (
        {
            "product": "flat = x.view(-1, 64)\nx.mul_(2)\n"
            "y = torch.addmm(self.bias, flat, self.weight).view(x.shape)"
        },
        "nothing",
    ),
    "input written later": ({"product": f"{_F}\nx.mul_(2)"}, "nothing"),
    "bias subtracted": ({"bias": "y = y - self.bias"}, "nothing"),
    "bias with alpha": ({"bias": "y = torch.add(y, self.bias, alpha=2)"}, "nothing"),
    "bias per position": ({"bias": "y = y + self.bias[:5, None]"}, "nothing"),
    "bias of one number": ({"bias": "y = y + self.bias[0]"}, "nothing"),
    "bias twice": ({"product": _F, "bias": "y = y + self.bias + self.bias"}, "nothing"),
    "dropout": ({"input": "x = F.dropout(x, 1.0)"}, "nothing"),
    "convolution of two positions": (
        {
            "product": "w = torch.stack((self.weight, self.weight), -1)\n"
            "y = F.conv1d(x.mT, w, padding=1)[..., 1:].mT"
        },
        "any rewrite",
    ),
    "convolution with a stride": (
        {
            "product": "y = F.conv1d(x.mT, self.weight[..., None], stride=2).mT",
            "bias": "",
            "output": "return y",
        },
        "nothing",
    ),
    "convolution with padding": (
        {
            "product": "y = F.conv1d(x.mT, self.weight[..., None], padding=1).mT",
            "bias": "",
            "output": "return y",
        },
        "nothing",
    ),
    "convolution in groups": (
        {"product": "y = F.conv1d(x.mT, self.weight[:, :32, None], groups=2).mT"},
        "nothing",
    ),
    "convolution not turned back": (
        {
            "product": "y = F.conv1d(x.mT, self.weight[..., None])",
            "bias": "",
            "output": "return y.view(2, 320)",
        },
        "nothing",
    ),
    "turned weight first": ({"product": "y = (self.weight.T @ x.mT).mT"}, "nothing"),
    "weight first, turned otherwise": (
        {"product": "y = (self.weight @ x.mT).transpose(0, 1).flatten(1).view(x.shape)"},
        "nothing",
    ),
    "weight first, the input written between": (
        {"product": "t = x.mT\nx.mul_(2)\ny = (self.weight @ t).mT"},
        "nothing",
    ),
    "tensordot over another dimension": (
        {"product": "y = torch.tensordot(x, self.weight, dims=([-1], [0]))"},
        "nothing",
    ),
    "tensordot over the length": (
        {
            "product": "y = torch.tensordot(x[:, :, :5], self.weight[:, :5], dims=([1], [1]))",
            "bias": "",
            "output": "return y",
        },
        "nothing",
    ),
    "tensordot over two dimensions": (
        {
            "product": "y = torch.tensordot(x, self.weight[:5], dims=2)",
            "bias": "",
            "output": "return y",
        },
        "any rewrite",
    ),
    "batch of weights": (
        {"product": "y = torch.bmm(x, torch.stack((self.weight, self.weight.T)))"},
        "any rewrite",
    ),
    "product of elements": ({"product": "y = x * self.weight[0]"}, "any rewrite"),
}
TRAPS = tuple(_SPOILT)


def trap(name: str, choices: Mapping[str, str] | None = None) -> Case:
    """The module of one trap; the product is `F.linear`'s or spoilt."""
    spoilt, forbidden = _SPOILT[name]
    made = case(Linear(), {"product": "matmul", **(choices or {})}, spoilt, forbidden)
    return replace(made, words={"trap": name} | made.words, respell=lambda other: trap(name, other))


@st.composite
def traps(draw: st.DrawFn) -> Case:
    """A random trap, whatever it leaves open spelt at random."""
    name = draw(st.sampled_from(TRAPS))
    known = axes(Linear())
    if "product" in _SPOILT[name][0]:
        known["product"] = tuple(s for s in known["product"] if SPELLINGS[s][2] == "after")
    return trap(name, {a: draw(st.sampled_from(o)) for a, o in known.items()})
