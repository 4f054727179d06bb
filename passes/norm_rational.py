"""LayerNorm and the group-wise rational function that reads it -> `ridgeline::layer_norm_rational`.

Law: `ridgeline.ir.norm_rational`. One pass over memory instead of two; the normalised rows are not
rounded in between. Anchored at the rational function, whatever spells it
(`ridgeline.passes.rational_sites`). A training step keeps the normalised rows for the rational
function's backward anyway, and is left alone. Equal in real arithmetic. Source: the block of Yang
and Wang, Kolmogorov-Arnold Transformer (2024).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

import ridgeline.codegen.group_rational  # noqa: F401 - registers the kernels
from ridgeline.codegen.kernel import argument
from ridgeline.cost_model import Work
from ridgeline.ir.match import Reject, Site
from ridgeline.ir.norm_rational import LAYER_NORM_RATIONAL
from ridgeline.ir.provenance import said
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.dataflow import stranger
from ridgeline.passes.norm_work import norm_work
from ridgeline.passes.norms import DTYPES, GPU_SIZE
from ridgeline.passes.rational_sites import Call as Rational
from ridgeline.passes.rational_sites import (
    Found,
    above,
    put,
    rational_at,
    rational_functions,
    stands_between,
    whole_channels,
)

aten = torch.ops.aten
_EPS = 1e-5
"""LayerNorm's where the call names none."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of the operation, as nodes of the program."""

    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    numerator: fx.Node
    denominator: fx.Node
    eps: float
    form: str


def search(graph: fx.Graph) -> tuple[list[Site], list[Reject]]:
    """Every rational function of a LayerNorm, and what stands between other ones."""
    found, misses = [], []
    for node, rational in rational_functions(graph):
        sites, between = beside(rational, node)
        found += sites
        misses += between
    return found, misses


def beside(rational: Found, node: fx.Node) -> tuple[list[Site], list[Reject]]:
    """`search` for one rational function, which the site binds as `node`."""
    norm, between = above(rational.call.x, aten.layer_norm.default)
    if norm is None:
        return [], []
    if between is not None:
        return [], [stands_between(between, norm, rational.out)]
    nodes = tuple(sorted((norm, *rational.nodes)))
    bind = {"x": norm.args[0], "norm": norm, "rational": node}
    return [Site(bind, {}, nodes, (rational.out,), "layer_norm")], []


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """`fused` for the rational function that the site binds."""
    found = rational_at(site.bind["rational"])
    assert isinstance(found, Found)
    return fused(site, found, setting)


def fused(site: Site, found: Found, setting: Setting) -> list[Candidate] | Reject:
    """Check who else reads the norm, its dimensions and dtypes; state the work on both sides."""
    norm = site.bind["norm"]
    call, out = _call(norm, found.call), found.out
    if setting.training:
        return Reject(
            "the model is being trained, and the backward of the rational function reads the"
            " normalised rows, so that nothing would be saved",
            out,
            "call eval() for inference",
        )
    if problem := stranger(site.nodes, site.outs):
        return problem
    if apart := whole_channels(found, norm):
        return apart
    size = shape_of(call.x)[-1]
    if len(norm.args[1]) != 1 or not size.is_Integer:  # pyright: ignore[reportArgumentType]
        return Reject(
            f"{said(norm)} normalises over {norm.args[1]}; the kernels take one fixed dimension",
            norm,
            "normalise over the last dimension",
        )
    if setting.target.kind != "cpu" and size > GPU_SIZE:
        return Reject(
            f"a row of {size} elements does not fit the registers of one block ({GPU_SIZE})",
            call.x,
            f"normalise over at most {GPU_SIZE} elements",
        )
    given = (call.x, call.weight, call.bias, call.numerator, call.denominator)
    operands = [n for n in given if n is not None]
    unknown = {n.meta["val"].dtype for n in (*operands, out)} - set(DTYPES)
    if unknown or call.x.meta["val"].dtype != out.meta["val"].dtype:
        return Reject(
            f"{said(norm)} and {said(out)} compute in"
            f" {sorted(str(n.meta['val'].dtype) for n in operands)}; the kernels take"
            f" {', '.join(map(str, DTYPES))}, and give the rows' dtype",
            out,
            "use one of these dtypes",
        )
    before, after = _works(norm, found)
    return [
        Candidate(
            rewrite=NORM_RATIONAL,
            site=site,
            call=call,
            before=before,
            after=after,
            preconditions=(
                f"the rational function alone reads {said(norm)}",
                f"mean over the last dimension, eps {call.eps:g}",
                f"the denominator has form {call.form}",
            ),
        )
    ]


def _call(norm: fx.Node, rational: Rational) -> Call:
    x, _, weight, bias, eps = (argument(norm, i, _EPS if i == 4 else None) for i in range(5))
    return Call(x, weight, bias, rational.numerator, rational.denominator, eps, rational.form)


def _works(norm: fx.Node, found: Found) -> tuple[Work, Work]:
    x = norm.args[0]
    alone = Site({}, {}, (norm,), (norm,), "")
    before, after = norm_work(alone, x, [x], center=True, residual=False)  # pyright: ignore[reportArgumentType]
    if found.one_loop:
        return _with_terms(before, found.terms), _with_terms(after, found.terms)
    return before + found.work, _with_terms(after, found.terms)


def _with_terms(work: Work, terms: int) -> Work:
    norm, *rest = work.kernels
    return Work((dataclasses.replace(norm, terms=terms), *rest))  # pyright: ignore[reportArgumentType]


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put the operation where the rational function is computed."""
    call: Call = candidate.call
    operands = (call.x, call.weight, call.bias, call.numerator, call.denominator)
    shape = call.x.meta["val"].shape
    return put(
        candidate,
        copied,
        LAYER_NORM_RATIONAL,
        operands,
        {"eps": call.eps, "form": call.form},
        shape,
    )


NORM_RATIONAL = Pass(
    name="norm_rational",
    op=LAYER_NORM_RATIONAL,
    exactness="reassociating",
    patterns=tuple,
    search=search,
    accepts=accepts,
    apply=apply,
    rounding={"float32": 1e-6, "bfloat16": 4e-3, "float16": 6e-4},
)
