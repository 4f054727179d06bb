"""Row-parallel sums in every form in use, at export's and at AOTAutograd's level."""

from gloo import on_ranks
from gloo.forms import BLOCKS, all_forms

LEVELS = [
    f"{form} {level}" for form in ("functional", "in place", "raw") for level in ("export", "aot")
]


def test_every_form_is_rewritten() -> None:
    for told in on_ranks(2, all_forms):
        assert "error" not in told, told
        for form in [*LEVELS, "dtensor aot"]:
            assert told[form]["error"] <= 1e-6, form
            assert told[form]["applied"] == BLOCKS, form
            sent = {"all_to_all_single": BLOCKS, "all_gather_into_tensor": BLOCKS}
            assert told[form]["sent"] == sent, form
        sequence = told["sequence aot"]
        assert sequence["error"] <= 1e-6
        # gate and up read one gather of each block; two more are of the last norm and the result
        gathers = BLOCKS + 2
        assert sequence["sent"] == {
            "reduce_scatter_tensor": BLOCKS,
            "all_gather_into_tensor": gathers,
        }
        assert f"{BLOCKS} all_gather of values gathered before are left out" in sequence["notes"][0]
