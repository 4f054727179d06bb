"""Row-parallel sums in every form in use, by every way that takes models which send."""

import pytest

from gloo import on_ranks
from gloo.forms import (
    BLOCKS,
    FORMS,
    WAYS,
    all_forms,
    dtensors,
    left_as_they_came,
    plugged_apart,
    trained,
)
from gloo.lengths import of_lengths

ALL = [f"{form} {way}" for form in FORMS for way in WAYS]


def test_every_form_is_rewritten() -> None:
    for told in on_ranks(2, all_forms):
        assert "error" not in told, told
        for form in [*ALL, "dtensor plugin"]:
            assert told[form]["error"] <= 1e-6, form
            assert told[form]["applied"].count("allreduce_rms_norm") == BLOCKS, form
            sent = {"all_to_all_single": BLOCKS, "all_gather_into_tensor": BLOCKS}
            assert told[form]["sent"] == sent, form
        assert any("no approximate rewrites" in note for note in told["lossy"])
        sequence = told["sequence plugin"]
        assert sequence["error"] <= 1e-6
        assert not [reason for reason in sequence["refused"] if "not better" not in reason]
        # gate and up read one gather of each block; two more are of the last norm and the result
        gathers = BLOCKS + 2
        assert sequence["sent"] == {
            "reduce_scatter_tensor": BLOCKS,
            "all_gather_into_tensor": gathers,
        }
        assert f"{BLOCKS} all_gather of values gathered before are left out" in sequence["notes"][0]


def test_lengths_that_change_from_call_to_call() -> None:
    """A size may be an input of the graph by itself, or half of one that is no input at all."""
    cases = [("dtensor", None, [7, 9]), ("functional", True, [7, 9]), ("sequence", None, [6, 8])]
    for told in on_ranks(2, of_lengths, cases):
        assert "error" not in told, told
        assert max(e for case in told for e in case["errors"]) <= 1e-6
        *rows, sequence = told
        assert [len(case["plans"]) for case in told] == [2, 1, 2]
        plans = [plan for case in told for plan in case["plans"]]
        assert not [r for plan in plans for r in plan["refused"] if "pass stopped" in r]
        for plan in [plan for case in rows for plan in case["plans"]]:
            assert plan["applied"].count("allreduce_rms_norm") == BLOCKS
        for plan in sequence["plans"]:
            assert "all_gather of values gathered before are left out" in plan["notes"][0]


@pytest.mark.parametrize(("world", "length"), [(2, 7), (4, 6)])
def test_tokens_that_dtensor_pads_are_no_mismatch(world: int, length: int) -> None:
    """7 = 4 + 3, 6 = 2 + 2 + 2 + 0: the ranks' graphs pad and cut differently."""
    for told in on_ranks(world, of_lengths, [("sequence", False, [length])]):
        assert "error" not in told, told
        assert max(told[0]["errors"]) <= 1e-6
        (plan,) = told[0]["plans"]
        assert not plan["applied"]
        assert "found: collectives differs (rank 0: " in plan["refused"][0]


def test_a_model_of_dtensors_gets_the_other_passes_too() -> None:
    """Its biases are added once, its vocabulary and its 14 tokens do not divide by 4 ranks."""
    for told in on_ranks(4, dtensors):
        assert "trace" not in told, told
        assert max(told["error"], told["eager"]) <= 1e-6
        applied = told["applied"]
        assert applied.count("allreduce_rms_norm") == 3  # the embedding, attention and the MLP
        assert "flash_attention" in applied
        # what three norms give, and the logits
        assert told["sent"] == {"all_to_all_single": 3, "all_gather_into_tensor": 4}
        assert told["fallback"] <= 1e-6
        assert "backend='ridgeline'" in told["why"][0]


def test_gradients_are_those_of_eager() -> None:
    for told in on_ranks(2, trained):
        assert "trace" not in told, told
        for way in ("dtensor plugin", "functional plugin", "functional optimize"):
            assert max(told[way]) <= 1e-6, way
        assert len(told["said"]) == 3
        assert all("for inference only" in said for said in told["said"])


def test_ranks_that_compile_apart_are_told_so() -> None:
    for told in on_ranks(2, plugged_apart, 1):
        target, weights = told
        assert "RankMismatch" in target
        assert "target differs (rank 0: a100, rank 1: h100)" in target
        assert "their weights differs (rank 0: " in weights


LEFT = {
    "view in place, always": "an input, a view or a part of a value",
    "view of an input in place, always": "an input, a view or a part of a value",
    "two at once, always": "sends several tensors at once",
    "own weight, always": "their weights differs (rank 0: ",
    "epsilon, always": "norms on a shard differs (rank 0: ",
    "own inputs, always": "inputs are not the same on all ranks",
}
"""Case -> why the graph is left as it came."""


def test_what_cannot_be_rewritten_is_left_as_it_came() -> None:
    for told in on_ranks(2, left_as_they_came):
        assert "trace" not in told, told
        for case, each in told.items():
            assert each["error"] <= 1e-6, case
            assert "allreduce_rms_norm" not in each["applied"], case
        for case, reason in LEFT.items():
            for level in ("plugin", "optimize"):
                assert reason in told[f"{case}, {level}"]["refused"], (case, level)
        for level in ("plugin", "optimize"):
            assert 'pass fuse="measured"' in told[f"own inputs, None, {level}"]["notes"]
