"""A linear layer and the rational function beside it -> `ridgeline::linear_rational`.

Law: `ridgeline.ir.linear_rational`. Of the layer's results (side "output"), the rational function
saves a pass over memory in each direction, is computed once per element, and the results are not
rounded in between. Of its input (side "input"), it is computed anew for each column of tiles, which
the cost model counts: that pays where the layer is narrow. Where a layer has one on both sides, or
one stands between two layers, what wins most is chosen. The price of either is the library's
product, than which ours is slower. For inference on GPUs: a training step keeps what lies between
for the backward, and on a CPU the product takes nearly all of the time and stays with the library.
Anchored at the rational function, whatever spells it (`ridgeline.passes.rational_sites`). Equal in
real arithmetic. Source: the feed-forward layer of Yang and Wang, Kolmogorov-Arnold Transformer
(2024).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

import ridgeline.codegen.group_rational  # noqa: F401 - registers the kernels
from ridgeline.codegen.kernel import argument
from ridgeline.cost_model import Gemm, Work, work_of
from ridgeline.ir.linear_rational import LINEAR_RATIONAL
from ridgeline.ir.match import Reject, Site
from ridgeline.ir.provenance import said
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.dataflow import stranger
from ridgeline.passes.rational_sites import (
    DTYPES,
    Found,
    above,
    below,
    put,
    rational_at,
    rational_functions,
    stands_between,
    whole_channels,
)

aten = torch.ops.aten
_LINEAR = aten.linear.default


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of the operation, as nodes of the program."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    numerator: fx.Node
    denominator: fx.Node
    form: str
    side: str


def search(graph: fx.Graph) -> tuple[list[Site], list[Reject]]:
    """Every rational function of a linear layer's results or before one, and what stands between
    other ones."""
    found, misses = [], []
    for node, rational in rational_functions(graph):
        sites, between = beside(rational, node)
        found += sites
        misses += between
    return found, misses


def beside(rational: Found, node: fx.Node) -> tuple[list[Site], list[Reject]]:
    """`search` for one rational function, which the sites bind as `node`."""
    found, misses = [], []
    layer, between = above(rational.call.x, _LINEAR)
    if layer is not None and between is not None:
        misses.append(stands_between(between, layer, rational.out))
    elif layer is not None:
        nodes = tuple(sorted((layer, *rational.nodes)))
        bind = {"x": layer.args[0], "layer": layer, "rational": node}
        found.append(Site(bind, {}, nodes, (rational.out,), "output"))
    layer, between, views = below(rational, _LINEAR)
    if layer is not None and between is not None:
        misses.append(stands_between(between, rational.out, layer))
    elif layer is not None:
        nodes = tuple(sorted((*rational.nodes, *views, layer)))
        bind = {"x": rational.call.x, "layer": layer, "rational": node}
        found.append(Site(bind, {}, nodes, (layer,), "input"))
    return found, misses


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """`fused` for the rational function that the site binds."""
    found = rational_at(site.bind["rational"])
    assert isinstance(found, Found)
    return fused(site, found, setting)


def fused(site: Site, found: Found, setting: Setting) -> list[Candidate] | Reject:
    """Check who else reads what lies between, and dtypes; state the work on both sides."""
    layer, side = site.bind["layer"], site.pattern
    first, second = (layer, found.out) if side == "output" else (found.out, layer)
    apart = side == "input" and shape_of(layer.args[0]) != shape_of(found.call.x)
    if refusal := _unfit(site, found, layer, setting) or whole_channels(found, layer, apart):
        return refusal
    if problem := stranger(site.nodes, site.outs):
        return problem
    x, weight, bias = (argument(layer, i) for i in range(3))
    rational = found.call
    if side == "input":
        x = rational.x
    call = Call(x, weight, bias, rational.numerator, rational.denominator, rational.form, side)
    if refusal := _dtypes(call, site.outs[0]):
        return refusal
    (product,) = work_of(layer).kernels
    assert isinstance(product, Gemm)
    fused = dataclasses.replace(product, library="ridgeline", **{f"{side}_terms": found.terms})
    return [
        Candidate(
            rewrite=LINEAR_RATIONAL_PASS,
            site=site,
            call=call,
            before=Work((product,)) + found.work,
            after=Work((fused,)),
            variant=f"rational function of the layer's {side}",
            preconditions=(
                f"{said(second)} alone reads {said(first)}",
                f"the denominator has form {call.form}",
            ),
        )
    ]


def _unfit(site: Site, found: Found, layer: fx.Node, setting: Setting) -> Reject | None:
    """A refusal for what the pass is not for."""
    if setting.training:
        return Reject(
            "the model is being trained, and the backward reads what lies between the layer and the"
            " rational function, so that nothing would be saved",
            site.outs[0],
            "call eval() for inference",
        )
    if setting.target.kind == "cpu":
        return Reject(
            f"there is no CPU kernel of {said(layer)} with {said(found.out)}: the product takes"
            " nearly all of the time, and the library's is faster than one of ours would be",
            site.outs[0],
            "choose a GPU as target",
        )
    weight = layer.args[1]
    sizes = shape_of(weight)  # pyright: ignore[reportArgumentType]
    if len(sizes) != 2 or not all(s.is_Integer and s for s in sizes):
        return Reject(
            f"the weight of {said(layer)} has shape {sizes}; the kernel takes a fixed [N,K]",
            layer,
            "use a weight of two fixed dimensions",
        )
    return None


def _dtypes(call: Call, out: fx.Node) -> Reject | None:
    data = {n.meta["val"].dtype for n in (call.x, call.weight, out)}
    held = {n.meta["val"].dtype for n in (call.numerator, call.denominator)}
    bias = set() if call.bias is None else {call.bias.meta["val"].dtype}
    if len(data) == len(held) == 1 and data | held | bias <= set(DTYPES):
        return None
    return Reject(
        f"{said(out)} is computed from {sorted(map(str, data))}, coefficients of"
        f" {sorted(map(str, held))} and a bias of {sorted(map(str, bias))}; the kernel takes one of"
        f" {', '.join(map(str, DTYPES))} each for rows and weight, for coefficients, and for the"
        " bias",
        out,
        "use these dtypes",
    )


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put the operation where the second of the two is computed."""
    call: Call = candidate.call
    operands = (call.x, call.weight, call.bias, call.numerator, call.denominator)
    shape = candidate.site.bind["layer"].meta["val"].shape
    return put(
        candidate, copied, LINEAR_RATIONAL, operands, {"form": call.form, "side": call.side}, shape
    )


LINEAR_RATIONAL_PASS = Pass(
    name="linear_rational",
    op=LINEAR_RATIONAL,
    exactness="reassociating",
    patterns=tuple,
    search=search,
    accepts=accepts,
    apply=apply,
    rounding={"float32": 2e-6, "bfloat16": 4e-3, "float16": 6e-4},
)
