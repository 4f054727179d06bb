"""Arguments of `parallelize` that cannot be used: what was expected, what was found."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

from gloo import on_ranks
from gloo.groups import alone, saved
from ridgeline.passes.all import PASSES
from ridgeline.passes.compiler import OptimizeError
from ridgeline.passes.parallel import Unparallel, plan_parallel
from ridgeline.passes.parallel.plan import head_spans
from ridgeline.passes.parallel.usable import check_arguments

GOOD: dict[str, Any] = {
    "model": nn.Linear(3, 3),
    "timeout": timedelta(seconds=5),
    "passes": PASSES[:2],
    "max_graphs": 1,
}


def half_loaded() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"model": None}, "expected a torch.nn.Module as model, found None"),
        ({"model": len}, r"as model, found <built-in function len> \(builtin"),
        ({"model": half_loaded()}, r"found 2 of 4 .* on the meta device \(1.weight\); load them"),
        ({"timeout": 5}, r"found 5 \(int\); pass timedelta\(seconds=5\)"),
        ({"passes": ("norm",)}, r"expected a sequence of ridgeline's passes .* 'norm' \(str\)"),
        ({"passes": "norm"}, r"found 'norm' \(str\)"),
        ({"passes": None}, "found None"),
    ],
)
def test_odd_arguments(odd: dict[str, Any], said: str) -> None:
    check_arguments(**GOOD)
    check_arguments(**GOOD | {"timeout": None, "passes": []})
    with pytest.raises(OptimizeError, match=said):
        check_arguments(**GOOD | odd)


@pytest.mark.parametrize("world", [2.0, True, 0, -1, "2"])
def test_odd_numbers_of_ranks(world: Any) -> None:
    with pytest.raises(Unparallel, match=f"1 or more, found {world!r}; pass an int"):
        plan_parallel(nn.Linear(3, 3), world)


def test_the_numbers_of_ranks_that_heads_allow_are_said() -> None:
    with pytest.raises(Unparallel, match=r"over 100 ranks; use at most 4 ranks$"):
        head_spans(4, 4, 100)
    with pytest.raises(Unparallel, match=r"use at most 2 ranks or 4 or 8$"):
        head_spans(8, 2, 3)


def test_one_rank_splits_nothing_and_compiles() -> None:
    model = nn.Linear(3, 3, dtype=torch.bfloat16)
    assert str(plan_parallel(model, 1)).splitlines()[0].endswith("1 rank: nothing is split")
    ((told),) = on_ranks(1, alone)
    assert "trace" not in told, told
    assert told["error"] <= 1e-6
    assert "tensor parallel over 1 rank: nothing is split" in told["notes"]


def test_a_part_is_not_split_again_nor_saved_as_a_model() -> None:
    for again, save in on_ranks(2, saved):
        assert "is split or optimised already" in again
        assert save.startswith("DropInError: expected a whole model to save, found one rank's part")
