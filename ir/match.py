"""Patterns are plain functions; `find` says where one fits, and where it nearly did, why not.

A pattern is traced once to the vocabulary of captured programs (pre-dispatch ATen, normal form).
Matching starts at the pattern's anchor, a rare operation, follows the pattern to its outputs and
then reads the graph upwards: operands of commutative operations in either order, floating casts
inside the pattern seen through, literals captured by name, one binding per name. Every interior
value must be used inside the site alone.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ridgeline.ir.normalize import is_cast, normalize
from ridgeline.ir.provenance import operation, operator, said

aten = torch.ops.aten
_COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One place where a pattern fits.

    bind: pattern argument -> the node that stands for it.
    literals: pattern argument -> the number found there.
    nodes: the interior, in graph order; outs: the values that the rest of the graph reads.
    """

    bind: dict[str, fx.Node]
    literals: dict[str, float]
    nodes: tuple[fx.Node, ...]
    outs: tuple[fx.Node, ...]
    pattern: str


@dataclass(frozen=True, slots=True)
class Reject:
    """Why not: a sentence a user can act on, the node, and the smallest change that would help,
    "" where nothing would."""

    reason: str
    node: fx.Node
    needed: str = ""
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Pattern:
    """A traced pattern. Build one with `trace`.

    near: the depth from which a miss is reported; more than 0 where the anchor is a common
    operation, of which most are not nearly a site.
    """

    name: str
    anchor: Any
    names: dict[fx.Node, str]
    literals: dict[float, str]
    outs: tuple[fx.Node, ...]
    graph: fx.Graph = field(repr=False)
    near: int = 0


def trace(function: Callable[..., Any], anchor: Any, **examples: Any) -> Pattern:
    """Trace `function` on example values into a pattern.

    examples: for each parameter a fake-able tensor, or a float that stands for "any literal here"
        (choose a number that the function does not use otherwise).
    anchor: the overload, occurring once in the pattern, where the search starts.
    """
    literals = {v: k for k, v in examples.items() if isinstance(v, float)}
    # Copies, because one tensor given twice would be traced as one input.
    tensors = {k: v.clone() for k, v in examples.items() if isinstance(v, torch.Tensor)}
    if list(inspect.signature(function).parameters) != list(examples):
        raise TypeError(f"{function.__name__}: examples must name its parameters in order")

    def on_tensors(*values):
        given = dict(zip(tensors, values, strict=True))
        return function(*(given.get(k, examples[k]) for k in examples))

    traced = make_fx(on_tensors, tracing_mode="fake", pre_dispatch=True)(*tensors.values())
    normalize(traced)
    nodes = list(traced.graph.nodes)
    names = dict(zip((n for n in nodes if n.op == "placeholder"), tensors, strict=True))
    result = nodes[-1].args[0]
    outs = tuple(result) if isinstance(result, tuple | list) else (result,)
    return Pattern(function.__name__, anchor, names, literals, outs, traced.graph)


def find(pattern: Pattern, graph: fx.Graph) -> tuple[list[Site], list[tuple[fx.Node, Reject]]]:
    """Every site of `pattern` in `graph`, and for each anchor outside any site the reason."""
    start = next(n for n in pattern.graph.nodes if n.target is pattern.anchor)
    sites: list[Site] = []
    misses: list[tuple[fx.Node, Reject]] = []
    for node in graph.find_nodes(op="call_function", target=pattern.anchor):
        answer = _Attempt(pattern).run(start, node)
        if isinstance(answer, Site):
            sites.append(answer)
        elif answer.depth >= pattern.near:
            misses.append((node, answer))
    return sites, misses


class _Attempt:
    """One try to fit a pattern at one anchor; remembers the deepest near miss."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.miss: Reject | None = None

    def run(self, start: fx.Node, anchor: fx.Node) -> Site | Reject:
        out = self.pattern.outs[0]
        for candidate in self._downstream(start, anchor, out):
            for state in self._unify(out, candidate, {}):
                if state.get(start) is not anchor:
                    continue
                site = self._finish(state)
                if isinstance(site, Site):
                    return site
                self._note(site)
        assert self.miss is not None
        return self.miss

    def _note(self, miss: Reject) -> None:
        if self.miss is None or miss.depth > self.miss.depth:
            self.miss = miss

    def _differs(self, difference: str, needed: str, state: dict) -> None:
        """Note that the call matched last has another argument than the pattern."""
        last = next(g for p, g in reversed(state.items()) if isinstance(p, fx.Node))
        depth = 2 + sum(isinstance(k, fx.Node) for k in state)
        self._note(
            Reject(f"an argument of {said(last)} is {difference}", last, needed, depth=depth)
        )

    def _stands_between(self, found: fx.Node, wanted: str, state: dict) -> None:
        """Note that an operation is another than the pattern's."""
        reason, way = f"{said(found)} stands where '{wanted}' is needed", _way_past(found, wanted)
        cap = next((u for u in found.users if operator(u.target) == "tanh"), None)
        if cap is not None and wanted == "mul":
            reason, way = f"{said(found)} stands between the product and {said(cap)}", _SOFT_CAP
        depth = 2 + sum(isinstance(k, fx.Node) for k in state)
        self._note(Reject(reason, found, way, depth=depth))

    def _two_values(self, found: fx.Node, wanted: fx.Node, state: dict) -> None:
        """Note that two places read different values where the pattern reads one."""
        depth = 2 + sum(isinstance(k, fx.Node) for k in state)
        reason = f"{said(found)} stands where {said(wanted)} is needed"
        self._note(Reject(reason, found, "use one value in both places", depth=depth))

    def _downstream(
        self, start: fx.Node, anchor: fx.Node, out: fx.Node, depth: int = 1
    ) -> Iterator[fx.Node]:
        """Graph nodes that could be the pattern's output, following its path from the anchor."""
        if start is out:
            yield anchor
            return
        step = next(u for u in start.users if u.op != "output")
        reached = False
        for user in anchor.users:
            if is_cast(user) and user.target is not step.target:
                reached = True
                yield from self._downstream(start, user, out, depth)
            elif user.target is step.target:
                reached = True
                yield from self._downstream(step, user, out, depth + 1)
        if not reached:
            wanted = operator(step.target)
            users = sorted(anchor.users)
            found = " and ".join(said(u) for u in users) or "nothing"
            blocking = next((u for u in users if u.op == "call_function"), anchor)
            needed = f"let '{wanted}' read '{operation(anchor)}' directly"
            if blocking is not anchor:
                needed += f", with '{operation(blocking)}' before or after both, or left out"
            self._note(
                Reject(
                    f"{said(anchor)} is read by {found}, where '{wanted}' is needed",
                    blocking,
                    needed,
                    depth=depth,
                )
            )

    def _unify(self, p: Any, g: Any, state: dict) -> Iterator[dict]:
        """All extensions of `state` (pattern node -> graph node) under which `p` stands for `g`."""
        if not isinstance(p, fx.Node):
            name = self.pattern.literals.get(p) if isinstance(p, float) else None
            number = isinstance(g, int | float) and not isinstance(g, bool)
            if name is not None and number and state.get(name, g) == g:
                yield {**state, name: g}
            elif name is None and p == g:
                yield state
            elif isinstance(p, list | tuple) and isinstance(g, list | tuple) and len(p) == len(g):
                yield from self._unify_all(list(zip(p, g, strict=True)), state)
            else:
                expected = "a number known before the run" if name is not None else f"{p}"
                if isinstance(p, list | tuple) and any(x in self.pattern.literals for x in p):
                    expected = f"a list of {len(p)}"
                found = said(g) if isinstance(g, fx.Node) else f"{g}"
                self._differs(f"{found}, where {expected} is needed", f"pass {expected}", state)
            return
        if not isinstance(g, fx.Node):
            self._differs(f"{g}, where a tensor is needed", "pass a tensor", state)
            return
        if p.op == "placeholder":
            if state.get(p, g) is g:
                yield {**state, p: g}
            else:
                self._two_values(g, state[p], state)
            return
        seen = []
        while is_cast(g) and g.target is not p.target:
            seen.append(g)
            g = g.args[0]
        state = {**state, **{("cast", c): c for c in seen}}
        if p in state:
            if state[p] is g:
                yield state
            else:
                self._two_values(g, state[p], state)
            return
        if g.target is not p.target:
            self._stands_between(g, operator(p.target), state)
            return
        state = {**state, p: g}
        if p.kwargs.keys() != g.kwargs.keys() or len(p.args) != len(g.args):
            self._differs(
                "missing or too many", f"call '{operation(g)}' with {len(p.args)} arguments", state
            )
            return
        rest = [(p.kwargs[k], g.kwargs[k]) for k in p.kwargs]
        orders = [list(zip(p.args, g.args, strict=False))]
        if p.target in _COMMUTATIVE:
            orders.append(list(zip(p.args, g.args[::-1], strict=False)))
        for order in orders:
            # Plain arguments first: they cost nothing to compare, and settle most attempts.
            pairs = sorted(order + rest, key=lambda pair: isinstance(pair[0], fx.Node))
            yield from self._unify_all(pairs, state)

    def _unify_all(self, pairs: list[tuple[Any, Any]], state: dict) -> Iterator[dict]:
        if not pairs:
            yield state
            return
        for extended in self._unify(*pairs[0], state):
            yield from self._unify_all(pairs[1:], extended)

    def _finish(self, state: dict) -> Site | Reject:
        pattern = self.pattern
        missing = [o for o in pattern.outs if o not in state]
        if missing:
            raise ValueError(f"{pattern.name}: output {missing[0]} isn't reached from the first")
        outs = tuple(state[o] for o in pattern.outs)
        interior = {
            g for p, g in state.items() if isinstance(g, fx.Node) and p not in pattern.names
        }
        for node in interior - set(outs):
            stranger = next((u for u in node.users if u not in interior), None)
            if stranger is not None:
                return Reject(
                    f"{said(node)}, inside the site, is also read by {said(stranger)}",
                    node,
                    f"drop that other use of '{operation(node)}'",
                    depth=100,
                )
        ordered = tuple(n for n in outs[0].graph.nodes if n in interior)
        bind = {name: state[p] for p, name in pattern.names.items() if p in state}
        literals = {name: state[name] for name in pattern.literals.values() if name in state}
        return Site(bind, literals, ordered, outs, pattern.name)


_SOFT_CAP = "add masks and biases after the soft-cap (tanh), where the model means the same by it"
_DROPOUT = "call model.eval(), or set its probability to 0"


def _way_past(node: fx.Node, wanted: str) -> str:
    """The smallest change that would put `wanted` where `node` stands."""
    name = operator(node.target) if node.op == "call_function" else node.op
    if node.op != "call_function":
        return f"compute it inside forward with '{wanted}'"
    if "dropout" in name:
        return _DROPOUT
    if name.endswith("_"):
        return f"write a new value ('{name[:-1]}') instead of writing in place ('{name}')"
    return f"move '{operation(node)}' out from between, or compute it with '{wanted}'"
