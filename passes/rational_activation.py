"""GELU, SiLU, ReLU, tanh or sigmoid -> `ridgeline::group_rational` of a refitted rational function.

Law: y = P(x) / Q(x), `ridgeline.ir.group_rational` with one group, degrees 5 and 4, its
coefficients the minimax fit of `ridgeline.ir.rational_fit` over |x| <= R, where

    R = 1.25 max |x| over the example inputs, rounded up to halves.

Another function, never equal to the activation: approximate, under the tolerance, and wrong without
bound beyond R, where P/Q grows like a line with one slope on both sides. It stands apart from
`PASSES` and is named where it is wanted:
``optimize(model, args, tolerance=0.01, passes=(*PASSES, RATIONAL_ACTIVATION))``.
Source: Molina et al., Padé Activation Units (2020); Telgarsky, Neural Networks and Rational
Functions (2017).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import ridgeline.codegen.group_rational  # noqa: F401 - registers the kernels
from ridgeline.codegen.kernel import hints
from ridgeline.cost_model.pointwise import activation_work
from ridgeline.ir.group_rational import GROUP_RATIONAL, reference
from ridgeline.ir.match import Reject, Site
from ridgeline.ir.provenance import said
from ridgeline.ir.rational_fit import FUNCTIONS, Fit, fit
from ridgeline.passes import fused_activation
from ridgeline.passes.activations import activation
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.certify import relative_error
from ridgeline.passes.dataflow import stranger
from ridgeline.passes.fused_activation import Fused, coefficients, held, pairs

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEGREES = (5, 4)
_MARGIN = 1.25
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **FUNCTIONS,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """x: what the activation is of; fitted: the rational function in its place."""

    x: fx.Node
    fitted: Fit


def search(graph: fx.Graph) -> tuple[list[Site], list[Reject]]:
    """Every activation, by its name or written out."""
    sites: list[Site] = []
    misses: list[Reject] = []
    taken: set[fx.Node] = set()
    for node in reversed(graph.nodes):  # from the end: x σ(x) is one site, σ(x) a part of it
        if node in taken or not isinstance(node.meta.get("val"), Tensor):
            continue
        inside = {node}
        if node.target is aten.tanh.default:
            found = ("tanh", node.args[0])
        else:
            found = activation(node, inside)
        if found is None:
            continue
        inside -= {found[1]}
        if problem := stranger(inside, (node,)):
            misses.append(problem)
            continue
        taken |= inside
        sites.append(Site({"x": found[1]}, {}, tuple(sorted(inside)), (node,), found[0]))
    return sites[::-1], misses[::-1]


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Measure the domain on the example inputs, fit there, and state error and work."""
    x, out = site.bind["x"], site.outs[0]
    if setting.tolerance <= 0:
        return Reject("approximate, and tolerance is 0", out, "pass tolerance > 0, as 0.01")
    if setting.training:
        return Reject(
            "the model is being trained, and the fit holds for its present activations alone",
            out,
            "call eval(), or train with ridgeline.nn.GroupRational, whose coefficients learn",
        )
    dtypes = {n.meta["val"].dtype for n in (x, out)}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES) or not x.meta["val"].dim():
        return Reject(
            f"{said(x)} and {said(out)} have dtypes {sorted(map(str, dtypes))}; one of float32,"
            " bfloat16, float16 and at least one dimension are needed",
            out,
            "compute the activation in one dtype",
        )
    values = setting.observed.values(x)
    reach = math.ceil(2 * _MARGIN * values.reach) / 2 if math.isfinite(values.reach) else 0
    if not reach:
        return Reject(
            f"{said(x)} is zero, infinite or NaN on the example inputs, so no domain is known",
            x,
            "capture with inputs like those to come",
        )
    function = ACTIVATIONS[site.pattern]
    fitted = fit(function, *_DEGREES, float(reach))
    sample = values.sample.double()
    error = relative_error([_value(fitted, sample)], [function(sample)])
    elements, dtype = math.prod(hints(x)), x.meta["val"].dtype
    before, after = (
        activation_work(elements, dtype, site.pattern, kind=setting.target.kind, rational=rational)
        for rational in (False, True)
    )
    alone = Candidate(
        rewrite=RATIONAL_ACTIVATION,
        site=site,
        call=Call(x, fitted),
        before=before,
        after=after,
        variant=f"{site.pattern} as a rational over |x| <= {reach:g}",
        error=error,
        preconditions=(
            f"max |x| is {values.reach:.3g} on the example inputs; the fit holds over"
            f" |x| <= {reach:g}, largest error {fitted.error:.1e}",
            f"error curve: {_curve(fitted, function)}",
        ),
    )
    fused, apart = pairs(alone, fitted, setting)
    reasons = tuple(f"a kernel of its own: {reject.reason}" for reject in apart)
    return [dataclasses.replace(alone, preconditions=alone.preconditions + reasons), *fused]


def _value(fitted: Fit, x: Tensor) -> Tensor:
    """P/Q at x, float64, with the coefficients as fp32 holds them."""
    single = (c.double() for c in coefficients(fitted, torch.float32))
    return reference(x.reshape(-1, 1), *single).reshape(x.shape)


def _curve(fitted: Fit, function: Callable[[Tensor], Tensor]) -> str:
    """The largest |error| in each eighth of the domain, from left to right."""
    edges = torch.linspace(-fitted.reach, fitted.reach, 9, dtype=torch.float64)
    parts = []
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        x = torch.linspace(low, high, 257, dtype=torch.float64)
        parts.append(f"{float((_value(fitted, x) - function(x)).abs().max()):.0e}")
    return f"{', '.join(parts)} in the eighths of the domain"


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put one `ridgeline::group_rational` where the activation is computed, or the pair's
    operation."""
    if isinstance(candidate.call, Fused):
        return fused_activation.apply(candidate, copied, module)
    call: Call = candidate.call
    out, x = copied[candidate.site.outs[0]], copied[call.x]
    with module.graph.inserting_before(out):
        operands = held(module, call.fitted, out, x)
        new = module.graph.call_function(GROUP_RATIONAL.overload, (x, *operands))
    new.meta = {**out.meta, "val": x.meta["val"].new_empty(x.meta["val"].shape)}
    out.replace_all_uses_with(new)
    return new


RATIONAL_ACTIVATION = Pass(
    name="rational_activation",
    op=GROUP_RATIONAL,
    exactness="approximate",
    patterns=tuple,
    search=search,
    accepts=accepts,
    apply=apply,
    rounding={"float32": 1e-6, "bfloat16": 4e-3, "float16": 6e-4},
)
