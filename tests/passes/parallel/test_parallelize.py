"""Models on 2 and 4 gloo ranks against one process: outputs, residuals, and what is sent."""

import math

import pytest

from gloo import on_ranks
from gloo.families import of_other_names
from gloo.models import LAYERS, build
from gloo.work import generated, outputs, predicted_for
from ridgeline.passes.parallel import plan_parallel

CASES = [
    *((family, 2, LAYERS) for family in ("llama", "gqa", "gpt2", "gemma")),
    *((family, 4, LAYERS) for family in ("gqa", "gpt2", "gemma")),
    ("gemma2", 2, 2),
    ("llama", 4, 2),
]
"""Two layers have a residual between them, before one norm and before two."""
SITES = 2 * LAYERS + 1
"""Attention and MLP of each layer, and the embedding: each is a sum before a norm."""


@pytest.mark.parametrize(("family", "world", "layers"), CASES)
def test_outputs_and_residuals(family: str, world: int, layers: int) -> None:
    """14 tokens: 4 ranks get a shard that is padded. The residuals before each layer are results,
    and so gathered besides what the norms give."""
    sites = 2 * layers + 1
    given = (family, "float32", 2, 7, True, layers)
    for rank, told in enumerate(on_ranks(world, outputs, *given)):
        assert "error" not in told, told
        assert told["applied"] == ["allreduce_rms_norm"] * sites
        assert not told["refused"]
        assert told["logits"] <= 1e-6
        assert len(told["residuals"]) == layers + 1
        assert max(told["residuals"]) <= 1e-6
        gathers = sites + layers + 1  # and the logits
        assert told["sent"] == {"all_to_all_single": sites, "all_gather_into_tensor": gathers}
        assert told["unchanged"]
        plan = plan_parallel(build(family, layers=layers), world)
        assert told["bytes"] == plan.bytes_per_rank[rank]


def test_without_residuals_only_the_norms_are_gathered() -> None:
    for told in on_ranks(2, outputs, "gqa", "bfloat16", 2, 8, False):
        assert told["logits"] <= 5e-3
        gathers = SITES + 1
        assert told["sent"] == {"all_to_all_single": SITES, "all_gather_into_tensor": gathers}


@pytest.mark.parametrize("family", ["gqa", "gpt2", "gemma", "llama", "gemma2"])
def test_bfloat16_rounds_less_than_one_process(family: str) -> None:
    """Sums and residuals are fp32 on a shard: the error against fp64 is below one process's own.

    Both round by themselves, so where one process is 5e-3 from fp64 by itself, as in the last two
    families, they are as far apart as both errors together.
    """
    for told in on_ranks(2, outputs, family, "bfloat16", 2, 7, True, 2):
        here, one_process = told["exact"]
        assert here < one_process
        assert (one_process > 5e-3) == (family in ("llama", "gemma2"))
        bound = max(5e-3, 1.1 * math.hypot(here, one_process))
        assert told["logits"] <= bound
        assert max(told["residuals"]) <= bound


def test_projections_of_other_names() -> None:
    """OPT's MLP is its decoder layer's own, Phi's row of attention is `dense`; of T5 the MLPs are
    split, and BART attends over another model's states."""
    for told in on_ranks(2, of_other_names):
        assert "trace" not in told, told
        assert told["opt"]["kinds"] == ["mlp", "attention", "embedding", "lm_head"]
        assert told["phi"]["kinds"] == ["attention", "mlp", "embedding", "lm_head"]
        assert told["t5"]["kinds"] == ["mlp", "mlp", "embedding", "lm_head"]
        assert told["bart"]["kinds"] == ["mlp", "attention", "mlp", "attention", "attention"]
        for family, each in told.items():
            assert each["error"] <= 1e-6, family


def test_generation_goes_on_in_step() -> None:
    """The prompt's 10 tokens are split; a step's 2 tokens, one for each of 2 ranks, too."""
    for told in on_ranks(2, generated, "llama"):
        assert told["got"] == told["expected"]
        assert not told["fallbacks"]


def test_fewer_tokens_than_ranks_are_not_scattered() -> None:
    for told in on_ranks(4, generated, "gqa"):
        assert told["got"] == told["expected"]
        reasons = {reason for phase, reason in told["refused"] if phase == "decode"}
        assert reasons == {"2 tokens are fewer than 4 ranks"}


def test_the_cost_model_chooses_for_gpus_that_are_not_here() -> None:
    """14 rows are too few for a shard: every rank sums all of them, by one kernel."""
    pytest.importorskip("triton", reason="the fused kernel needs triton")
    for told in on_ranks(2, predicted_for, "h100"):
        (said,) = [note for note in told["notes"] if "predicted for h100" in note]
        assert "14 x 64 float32 on 2 ranks, predicted for h100: one_shot (nccl: " in said
        assert "multimem: " in said
        assert told["applied"] == []
        (kernel,) = told["kernels"]
        assert "ridgeline::all_reduce_norm one_shot_norm one_shot, rows of 64, 2 ranks" in kernel
        assert told["logits"] <= 1e-6


def test_a_gpu_without_links_is_not_predicted() -> None:
    for told in on_ranks(2, predicted_for, "mi300x"):
        (said,) = [note for note in told["notes"] if "14 x 64" in note]
        assert "the fused kernels' signals are PTX" in said
        assert told["kernels"] == []
        assert told["logits"] <= 1e-6
