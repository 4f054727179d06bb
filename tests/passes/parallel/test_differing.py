"""Ranks whose code, options, libraries or weights are not the same are told so, all of them."""

import pytest

from gloo import on_ranks
from gloo.differing import changed_in_place, other_code, other_options

ATTENTION = "'scaled_dot_product_attention' at "
CODE = {
    "activation": ("'silu' at ", " in model.layers.0.mlp.act_fn differs (rank 0: aten.silu"),
    "scale": (ATTENTION, " in model.layers.0.self_attn differs (rank 0: ..."),
    "nothing": ("right",),
}
"""What is another on rank 1 -> what all say."""


def test_code_that_differs_is_named() -> None:
    for told in on_ranks(2, other_code):
        assert "error" not in told, told
        assert told.keys() == CODE.keys()
        for name, words in CODE.items():
            assert told[name].startswith(("right", "RankMismatch: "))
            assert all(word in told[name] for word in words), told[name]


OPTIONS = ["passes", "lowering", "max_graphs", "fuse", "weave", "target", "transformers"]


def test_options_and_libraries_that_differ_are_named() -> None:
    for told in on_ranks(2, other_options):
        assert "error" not in told, told
        assert [*told] == OPTIONS
        for name, said in told.items():
            assert said.startswith("RankMismatch: ")
            assert f"and found: {name} differs (rank 0: " in said


WEIGHT = "weight model.layers.1.input_layernorm.weight differs (rank 0: "
CHANGED = {
    "first": "right",
    "changed on one": WEIGHT,
    "changed on both": "right",
    "dropped on one": "what is run differs (rank 0: graph 0, rank 1: a new graph)",
    "dropped on both": WEIGHT,
    "at last": "right",
}


@pytest.fixture(scope="module")
def changed() -> list[dict[str, str]]:
    return on_ranks(2, changed_in_place)


@pytest.mark.parametrize("attempt", CHANGED)
def test_weights_that_are_changed_on_one_rank(attempt: str, changed: list[dict]) -> None:
    for told in changed:
        assert "error" not in told, told
        assert CHANGED[attempt] in told[attempt]
        assert told[attempt].startswith(("right", "RankMismatch: "))


def test_what_to_do_is_said(changed: list[dict]) -> None:
    for told in changed:
        assert "set it on all ranks, or call refresh() on all" in told["dropped on one"]
        assert "change them on all ranks alike" in told["changed on one"]
