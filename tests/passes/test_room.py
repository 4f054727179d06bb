"""Memory of what is alive while a program runs, in the choice and in the plan."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import ridgeline
from ridgeline.cost_model import InfeasibleChoice, Lifetimes, load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.match import Site
from ridgeline.ir.normalize import normalize
from ridgeline.passes.base import Setting
from ridgeline.passes.decide import choose
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
