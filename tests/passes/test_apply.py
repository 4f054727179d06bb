"""Rewriting leaves nothing of the old site behind."""

import torch
import torch.nn.functional as F
from torch import Tensor


def test_the_replaced_attention_is_gone(rewrite):
    """Torch takes attention for impure, so dead code elimination alone would keep and run it."""

    def model(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True).sin().sum()

    done = rewrite(model, (torch.randn(3, 2, 16, 8),))
    called = [str(n.target) for n in done.graph_module.graph.nodes if n.op == "call_function"]
    assert called == ["ridgeline.attention.default", "aten.sin.default", "aten.sum.default"]
