"""Reads act(x) off a graph, however the activation is written.

silu, gelu and gelu_tanh are x P(x), P the fraction of x that is kept:

    silu       P(x) = σ(x) = 1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2
    gelu       P(x) = Φ(x) = (1 + erf(x / √2)) / 2
    gelu_tanh  P(x) = σ(2 t) = (1 + tanh t) / 2        t = √(2/π) (x + 0.044715 x³)

The factors of x P(x) stand in any order and grouping; a constant factor may stand anywhere.
"""

import math

import torch
from torch import fx

from ridgeline.ir.gated import TANH_CUBIC, TANH_SCALE
from ridgeline.ir.normalize import is_cast
from ridgeline.passes.dataflow import negated, orders, through_casts

aten = torch.ops.aten
_CLOSE = 2e-9  # √(2/π) is written with eight digits; less exact constants are another function
_PLAIN = {aten.silu.default: "silu", aten.relu.default: "relu"}
_CLAMPS = (aten.clamp.default, aten.clamp_min.default)

Found = tuple[str, fx.Node]


def activation(node: object, seen: set[fx.Node]) -> Found | None:
    """(activation, x) where the node computes act(x); the nodes on the way are added to `seen`."""
    inside: set[fx.Node] = set()
    node = through_casts(node, inside)
    if not isinstance(node, fx.Node):
        return None
    inside.add(node)
    found = None
    if node.target in _PLAIN:
        found = _PLAIN[node.target], through_casts(node.args[0], inside)
    elif node.target in _CLAMPS:
        if node.args[1:] in ((0,), (0, None)) and not node.kwargs:
            found = "relu", through_casts(node.args[0], inside)
    elif node.target is aten.gelu.default:
        form = node.kwargs.get("approximate", "none")
        found = "gelu" if form == "none" else "gelu_tanh", through_casts(node.args[0], inside)
    elif (x := _sigmoid(node, inside)) is not None:
        found = "sigmoid", x
    elif node.target in (aten.mul.Tensor, aten.div.Tensor):
        found = _over_logistic(node, inside) or _written_out(node, inside)
    if found is not None:
        seen |= inside
    return found


def _written_out(node: fx.Node, seen: set[fx.Node]) -> Found | None:
    """x P(x), the factors in any order."""
    inside: set[fx.Node] = set()
    factors = _factors(node, inside)
    tensors = [f for f in factors if isinstance(f, fx.Node)]
    scale = math.prod(f for f in factors if not isinstance(f, fx.Node))
    if len(tensors) != 2:
        return None
    for x, other in (tensors, tensors[::-1]):
        inner: set[fx.Node] = set()
        kept = _fraction(other, x, inner)
        if kept is not None and _is(scale * kept[1], 1.0):
            seen |= inside | inner
            return kept[0], x
    return None


def _fraction(node: fx.Node, x: fx.Node, seen: set[fx.Node]) -> tuple[str, float] | None:
    """(activation, c) where the node computes c P(x)."""
    inside = {node}
    found = None
    if node.target is aten.special_ndtr.default and through_casts(node.args[0], inside) is x:
        found = "gelu", 1.0
    elif _plain_sum(node):
        found = _half_sum(node, x, inside)
    elif (argument := _sigmoid(node, inside)) is not None:
        name = _of_half(argument, x, 0.5, inside)
        found = None if name is None else (name, 1.0)
    if found is not None:
        seen |= inside
    return found


def _half_sum(node: fx.Node, x: fx.Node, seen: set[fx.Node]) -> tuple[str, float] | None:
    """(activation, c) where the sum is c/2 + c/2 erf(x / √2) or c/2 + c/2 tanh(h)."""
    for half, term in orders(node):
        inside: set[fx.Node] = set()
        factors = _factors(term, inside)
        odd = [f for f in factors if isinstance(f, fx.Node)]
        weight = math.prod(f for f in factors if not isinstance(f, fx.Node))
        if len(odd) != 1 or not _is(half, weight):
            continue
        inside.add(odd[0])
        name = None
        if odd[0].target is aten.tanh.default:
            name = _of_half(odd[0].args[0], x, 1.0, inside)
        elif odd[0].target is aten.erf.default:
            scale = _times(_factors(odd[0].args[0], inside, x), x)
            name = "gelu" if _is(scale, math.sqrt(0.5)) else None
        if name is not None:
            seen |= inside
            return name, 2.0 * weight
    return None


def _of_half(value: object, x: fx.Node, half: float, seen: set[fx.Node]) -> str | None:
    """The activation whose P(x) is σ(2 h), with `value` = h / half."""
    inside: set[fx.Node] = set()
    factors = _factors(value, inside, x)
    plain = _times(factors, x)
    if plain is not None:
        seen |= inside
        return "silu" if _is(plain * half, 0.5) else None
    if _is_cubic(factors, x, TANH_SCALE / half, inside):
        seen |= inside
        return "gelu_tanh"
    return None


def _is_cubic(factors: list[object], x: fx.Node, scale: float, seen: set[fx.Node]) -> bool:
    """Is the product scale (x + 0.044715 x³), or scale x (1 + 0.044715 x²)?"""
    sums = [f for f in factors if isinstance(f, fx.Node) and _plain_sum(f)]
    if len(sums) != 1:
        return False
    rest = [f for f in factors if f is not sums[0]]
    for a, b in orders(sums[0]):
        inside: set[fx.Node] = {sums[0]}
        cubic = _factors(b, inside, x)
        first = through_casts(a, inside) is x and _is(_times(rest, x, 0), scale)
        if first and _is(_times(cubic, x, 3), TANH_CUBIC):
            seen |= inside
            return True
        if _is(a, 1.0) and _is(_times(rest, x, 1), scale) and _is(_times(cubic, x, 2), TANH_CUBIC):
            seen |= inside
            return True
    return False


def _sigmoid(node: fx.Node, seen: set[fx.Node]) -> fx.Node | None:
    """x where the node is σ(x), by its name or as 1 / (1 + exp(-x))."""
    inside = {node}
    if node.target is aten.mul.Tensor and _is(node.args[1], 1.0):  # torch's 1 / y
        node = through_casts(node.args[0], inside)
        inside.add(node)
    x = None
    if node.target is aten.sigmoid.default:
        x = through_casts(node.args[0], inside)
    elif node.target is aten.reciprocal.default:
        x = _one_more_exponential(node.args[0], inside)
    if x is not None:
        seen |= inside
    return x


def _over_logistic(node: fx.Node, seen: set[fx.Node]) -> Found | None:
    """x / (1 + exp(-x))."""
    if node.target is not aten.div.Tensor or node.kwargs:
        return None
    inside = {node}
    above = through_casts(node.args[0], inside)
    x = _one_more_exponential(node.args[1], inside)
    if x is None or x is not above:
        return None
    seen |= inside
    return "silu", x


def _one_more_exponential(value: object, seen: set[fx.Node]) -> fx.Node | None:
    """x where the value is 1 + exp(-x)."""
    inside: set[fx.Node] = set()
    value = through_casts(value, inside)
    if not isinstance(value, fx.Node) or not _plain_sum(value):
        return None
    inside.add(value)
    for one, term in orders(value):
        power = through_casts(term, inside)
        if not _is(one, 1.0) or not isinstance(power, fx.Node):
            continue
        if power.target is not aten.exp.default:
            continue
        inside.add(power)
        x = negated(power.args[0], inside)
        if x is not None:
            seen |= inside
            return x
    return None


def _is(value: object, number: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, number, rel_tol=_CLOSE)


def _plain_sum(node: fx.Node) -> bool:
    """A sum without alpha."""
    return node.target is aten.add.Tensor and not node.kwargs


def _factors(value: object, seen: set[fx.Node], whole: fx.Node | None = None) -> list[object]:
    """What a chain of products multiplies: numbers and tensors. The chain is added to `seen`.

    `whole` is one factor, and so is a product within the chain that others read too.
    """
    inner = through_casts(value, seen)
    if inner is whole or not isinstance(inner, fx.Node):
        return [inner]
    parts = _parts(inner)
    if parts:
        seen.add(inner)
    factors: list[object] = []
    for part in parts or [inner]:
        shared = not isinstance(part, fx.Node) or _is_shared(part)
        factors += (
            [through_casts(part, seen)] if shared or not parts else _factors(part, seen, whole)
        )
    return factors


def _parts(node: fx.Node) -> list[object]:
    """The factors of one product, power, negation or quotient by a number."""
    if node.target is aten.mul.Tensor:
        return list(node.args)
    if node.target is aten.neg.default:
        return [-1.0, node.args[0]]
    if node.target is aten.pow.Tensor_Scalar:
        return [node.args[0]] * int(node.args[1]) if node.args[1] in (2, 3) else []
    divisor = node.args[1] if node.target is aten.div.Tensor else 0
    if isinstance(divisor, int | float) and divisor != 0:
        return [node.args[0], 1.0 / divisor]
    return []


def _is_shared(node: fx.Node) -> bool:
    """Do several operations read the value, or that behind its casts?"""
    return len(node.users) != 1 or (is_cast(node) and _is_shared(node.args[0]))


def _times(factors: list[object], x: fx.Node, power: int = 1) -> float | None:
    """c where the factors multiply to c x^power."""
    tensors = [f for f in factors if isinstance(f, fx.Node)]
    if len(tensors) != power or any(f is not x for f in tensors):
        return None
    return math.prod((f for f in factors if not isinstance(f, fx.Node)), start=1.0)
