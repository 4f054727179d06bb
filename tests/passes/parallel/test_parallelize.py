"""Models on 2 and 4 gloo ranks against one process: outputs, residuals, and what is sent."""

import pytest
from gloo import on_ranks
from gloo.models import LAYERS, build
from gloo.work import generated, outputs

from ridgeline.passes.parallel import plan_parallel

FAMILIES = ("llama", "gqa", "gpt2", "gemma", "gemma2")
SITES = 2 * LAYERS + 1
"""Attention and MLP of each layer, and the embedding: each is a sum before a norm."""


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_residuals(family: str, world: int) -> None:
    """14 tokens: 4 ranks get a shard that is padded."""
    for rank, told in enumerate(on_ranks(world, outputs, family, "float32", 2, 7)):
        assert "error" not in told, told
        assert told["applied"] == ["allreduce_rms_norm"] * 2 * SITES  # two graphs
        assert told["logits"] <= 1e-6
        assert told["residuals"] <= 1e-6
        assert told["sent"] == {"all_to_all_single": SITES, "all_gather_into_tensor": SITES + 1}
        assert not told["refused"]
        assert told["unchanged"]
        assert told["bytes"] == plan_parallel(build(family), world).bytes_per_rank[rank]
