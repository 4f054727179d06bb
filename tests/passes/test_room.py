"""Memory of what is alive while a program runs, in the choice and in the plan."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from torch import Tensor, nn

import ridgeline
from ridgeline.cost_model import InfeasibleChoice, Lifetimes, estimate, load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.match import Site
from ridgeline.ir.normalize import normalize
from ridgeline.passes.base import Setting
from ridgeline.passes.decide import PRICE_OF_MEMORY, choose
from ridgeline.passes.flash_attention import FLASH_ATTENTION
from ridgeline.passes.observe import Observation
from ridgeline.passes.propose import propose
from ridgeline.passes.room import Room
from ridgeline.passes.weights import WeightStore

HEADS, LENGTH, SIZE, LAYERS = 4, 512, 32, 3
SCORES = 4 * HEADS * LENGTH * LENGTH


class Spelled(nn.Module):
    """Layers of attention whose scores are values of the graph."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(LAYERS):
            x = torch.softmax(x @ x.transpose(-1, -2) * 0.1, -1) @ x
        return x


@pytest.fixture(scope="module")
def offered():
    """(target, candidates, room)"""
    target, x = load_target("a100"), torch.randn(1, HEADS, LENGTH, SIZE)
    with torch.no_grad():
        program = capture(Spelled().eval(), (x,)).program
    module = normalize(program.module)
    setting = Setting(target, False, 0.0, Observation(module, program), WeightStore())
    candidates, _ = propose((FLASH_ATTENTION,), module, setting)
    assert len(candidates) == LAYERS
    return target, candidates, Room(Lifetimes(module.graph), target)


def _slower(candidate):
    """A kernel that takes twice the time of what it replaces."""
    return dataclasses.replace(candidate, after=candidate.before + candidate.before)


def _chosen(candidates, target, room, objective="latency", **options):
    arguments = {"tolerance": 0.0, "sensitivity": 1.0, "weight_bytes": 0, **options}
    return choose(candidates, target, objective=objective, room=room, **arguments)


def test_a_slower_form_is_taken_where_only_it_fits(offered):
    target, candidates, room = offered
    slow = [_slower(c) for c in candidates]
    answer = _chosen(slow, target, room)
    assert not answer.chosen
    assert {loss.by for loss in answer.refused} == {"cost"}
    assert room.peak_bytes() > SCORES > room.peak_bytes(dict.fromkeys(candidates, 1))
    small = dataclasses.replace(target, memory_bytes=SCORES)
    assert len(_chosen(slow, small, Room(room.lifetimes, small)).chosen) == LAYERS
    none = dataclasses.replace(target, memory_bytes=SCORES // 16)
    with pytest.raises(InfeasibleChoice, match="at its fullest step"):
        _chosen(slow, none, Room(room.lifetimes, none))
    # Weights take the room as well.
    with pytest.raises(InfeasibleChoice):
        _chosen(slow, small, Room(room.lifetimes, small), weight_bytes=SCORES)


def test_what_one_site_frees_is_room_for_another(offered):
    """A form that holds more bytes fits beside attention without its scores."""
    target, candidates, room = offered
    flash = [dataclasses.replace(c, before=c.before + c.before + c.before) for c in candidates]
    end = room.lifetimes.nodes[-1]
    site = Site({}, {}, (end,), (end,), "")
    large = dataclasses.replace(flash[0], site=site, memory_bytes=SCORES, variant="large")
    memory = room.peak_bytes() + SCORES // 2
    small = dataclasses.replace(target, memory_bytes=memory)
    assert room.peak_bytes(dict.fromkeys(candidates, 1)) + SCORES <= memory
    chosen = _chosen([*flash, large], small, Room(room.lifetimes, small)).chosen
    assert set(chosen) == {*flash, large}


def test_two_of_three_layers_leave_the_peak_where_it_is(offered):
    target, candidates, room = offered
    assert room.peak_bytes(dict.fromkeys(candidates[:2], 1)) > SCORES
    answer = _chosen([_slower(c) for c in candidates[:2]], target, room, objective="memory")
    assert not answer.chosen  # slower, and nothing is won


def test_the_objective_memory_counts_what_is_alive(offered):
    target, candidates, room = offered
    slow = [_slower(c) for c in candidates]
    assert len(_chosen(slow, target, room, objective="memory").chosen) == LAYERS


@torch.no_grad()
def test_the_plan_says_what_is_alive_and_that_it_does_not_fit(capsys):
    x = torch.randn(1, HEADS, LENGTH, SIZE)
    h100 = load_target("h100")

    def planned(memory_bytes: int, passes):
        target = dataclasses.replace(h100, memory_bytes=memory_bytes)
        options = {"target": target, "lowering": "eager", "passes": passes}
        return ridgeline.optimize(Spelled().eval(), (x,), **options).plan

    for memory, passes, fits in (
        (2 * SCORES, (), True),
        (SCORES, (), False),
        (SCORES, (FLASH_ATTENTION,), True),
    ):
        plan = planned(memory, passes)
        (figures,) = plan.predicted.values()
        assert figures["before"]["live_bytes"] > SCORES
        assert (figures["after"]["live_bytes"] < SCORES) == bool(passes)
        notes = [n for n in plan.notes if "does not fit h100" in n]
        assert len(notes) == (not fits)
        assert all("what else is alive" in note for note in notes)
        plan.print()
        assert "at its fullest" in capsys.readouterr().out


class _Joined(nn.Module):
    """A sum takes the place of u or of v, whichever is not kept beside its twin until the end."""

    def forward(self, x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, n: Tensor) -> Tensor:
        u, u2, v, v2 = x @ a, x @ b, x @ c, x @ d
        kept = (x.bfloat16() @ a.bfloat16()), (x.bfloat16() @ b.bfloat16())
        z = (u + v + kept[0] + kept[1]) @ n
        return z + u2 @ n + v2 @ n


def test_sites_that_fit_alone_and_not_together(offered):
    """What two take beyond their sum counts against one of them, and not against neither."""
    target, (flash, *_), _ = offered
    args = torch.randn(4096, 64), *torch.randn(4, 64, 64), torch.randn(64, 1)
    with torch.no_grad():
        module = normalize(capture(_Joined().eval(), args).program.module)
    products = module.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    first, second, third, fourth = [n for n in products if n.meta["val"].dtype == torch.float32][:4]
    better = dataclasses.replace(flash, before=flash.before + flash.before + flash.before)
    pairs = (first, second), (third, fourth)
    one, other = (dataclasses.replace(better, site=Site({}, {}, p, p, "")) for p in pairs)
    room = Room(Lifetimes(module.graph), target)
    each = [room.peak_bytes(times) for times in ({}, {one: 1}, {other: 1})]
    both = room.peak_bytes({one: 1, other: 1})
    assert max(each) < both
    small = dataclasses.replace(target, memory_bytes=(max(each) + both) // 2)
    assert len(_chosen([one, other], small, Room(room.lifetimes, small)).chosen) == 1
    assert len(_chosen([one, other], target, room).chosen) == 2
    # Where there is room enough, an error that is too large is not told as a lack of it.
    rough = dataclasses.replace(one, error=0.5)
    (loss,) = _chosen([rough], target, room, objective="memory", tolerance=0.1).refused
    assert "pass tolerance=" in loss.needed, loss


class _Late(nn.Module):
    """Two products of one input, the second after attention."""

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        early = x @ w
        y = torch.softmax(x @ x.transpose(-1, -2) * 0.1, -1) @ x
        return (x @ w) * y.tanh() @ w + early


def test_a_rewrite_that_makes_the_peak_higher_is_not_taken_where_it_does_not_fit(offered):
    target, (flash, *_), _ = offered
    x = torch.randn(1, HEADS, LENGTH, SIZE)
    with torch.no_grad():
        graph = normalize(
            capture(_Late().eval(), (x, torch.randn(SIZE, SIZE))).program.module
        ).graph
    products = graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    both = (products[0], products[3])
    site = Site({}, {}, both, both, "")
    merged = dataclasses.replace(
        flash, site=site, before=flash.before + flash.before + flash.before
    )
    lifetimes = Lifetimes(graph)
    room = Room(lifetimes, target)
    assert room.peak_bytes({merged: 1}) == room.peak_bytes() + 4 * HEADS * LENGTH * SIZE
    assert _chosen([merged], target, room).chosen == [merged]
    small = dataclasses.replace(target, memory_bytes=room.peak_bytes() + 1)
    answer = _chosen([merged], small, Room(lifetimes, small))
    assert not answer.chosen
    assert [loss.kind for loss in answer.refused] == ["does not fit the memory"]


class _Several(nn.Module):
    """Attention with its scores between two products of one input, of fewer rows each time."""

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        for i in range(LAYERS):
            some = x[:, :, : LENGTH >> i]
            early = some @ w
            y = torch.softmax(x @ x.transpose(-1, -2) * 0.1, -1) @ x
            late = (some @ w) * y[:, :, : LENGTH >> i].tanh()
            x = x + (late @ w + early).sum(-2, keepdim=True)
        return x


@pytest.fixture(scope="module")
def several(offered):
    """(lifetimes, candidates that free scores, products taken together, which live longer)"""
    target, (flash, *_), _ = offered
    x, w = torch.randn(1, HEADS, LENGTH, SIZE), torch.randn(SIZE, SIZE)
    with torch.no_grad():
        program = capture(_Several().eval(), (x, w)).program
    module = normalize(program.module)
    setting = Setting(target, False, 0.0, Observation(module, program), WeightStore())
    attentions, _ = propose((FLASH_ATTENTION,), module, setting)
    products = module.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    early, late = products[::5], products[3::5]
    assert len(attentions) == len(early) == len(late) == LAYERS
    sites = [Site({}, {}, pair, pair, "") for pair in zip(early, late, strict=True)]
    before = flash.before + flash.before + flash.before
    merged = [dataclasses.replace(flash, site=site, before=before) for site in sites]
    return Lifetimes(module.graph), attentions, merged


def test_only_those_rewrites_that_do_not_fit_are_left_out(offered, several):
    target, (lifetimes, _, merged) = offered[0], several
    room = Room(lifetimes, target)
    assert room.peak_bytes({merged[0]: 1}) > room.peak_bytes() == room.peak_bytes({merged[2]: 1})
    small = dataclasses.replace(target, memory_bytes=room.peak_bytes())
    answer = _chosen(merged, small, Room(lifetimes, small))
    assert answer.chosen == [merged[2]]
    assert {loss.kind for loss in answer.refused} <= {"does not fit the memory"}
    small = dataclasses.replace(target, memory_bytes=room.peak_bytes(dict.fromkeys(merged, 1)))
    assert _chosen(merged, small, Room(lifetimes, small)).chosen == merged


def _gain(candidate, target):
    before, after = (estimate(w, target).seconds for w in (candidate.before, candidate.after))
    return before - after - PRICE_OF_MEMORY * before * (candidate.memory_bytes > 0)


def _most(candidates, room, held):
    """The most that any set of candidates wins whose fullest step, counted as a whole, fits."""
    best = -math.inf
    for some in itertools.chain.from_iterable(
        itertools.combinations(candidates, n) for n in range(len(candidates) + 1)
    ):
        full = held + sum(c.memory_bytes for c in some) + room.peak_bytes(dict.fromkeys(some, 1))
        if full <= room.target.memory_bytes:
            best = max(best, sum(_gain(c, room.target) for c in some))
    return best


def test_choices_where_memory_is_short_are_those_of_brute_force(offered, several):
    """Attention that frees its scores, slower or faster; products that live longer, some with more
    weights."""
    target, (lifetimes, attentions, merged) = offered[0], several
    draw, seen, held = random.Random(0), set(), SCORES // 8
    for case in range(12):
        kinds = [_slower, lambda c: dataclasses.replace(c, before=c.before + c.before)]
        candidates = [draw.choice(kinds)(c) for c in attentions]
        for c in merged:
            candidates.append(dataclasses.replace(c, memory_bytes=draw.choice([0, SCORES // 16])))
        most = Room(lifetimes, target).peak_bytes(dict.fromkeys(merged, 1)) + held
        capacity = int(most * draw.uniform(0.2, 1.1))
        room = Room(lifetimes, dataclasses.replace(target, memory_bytes=capacity))
        best = _most(candidates, room, held)
        try:
            answer = _chosen(candidates, room.target, room, state_bytes=held)
        except InfeasibleChoice:
            assert best == -math.inf, case
            continue
        full = held + sum(c.memory_bytes for c in answer.chosen) + room.peak_bytes(answer.times)
        assert full <= capacity, case
        won = sum(_gain(c, room.target) for c in answer.chosen)
        assert won == pytest.approx(best, abs=1e-12), case
        seen.add(len(answer.chosen))
    assert len(seen) >= 3  # answers differ from case to case
