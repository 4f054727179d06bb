"""Whole training runs through `optimize`: adapters on a quantised base, a Llama for 200 steps."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ridgeline
from ridgeline.passes.quantization.layer import QuantizedLinear

pytestmark = pytest.mark.filterwarnings("default")  # Inductor warns of its own parts

VOCABULARY, LENGTH = 256, 128  # a length at which the kernel trains faster than torch's


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}, use_cache=False))


def text(count: int, seed: int) -> Tensor:
    """Ids [count,LENGTH] that can be learnt: each is its predecessor's successor, most of the
    time."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCABULARY, (count, 1), generator=draw)
    ids = (start + 3 * torch.arange(LENGTH)) % VOCABULARY
    noise = torch.randint(VOCABULARY, ids.shape, generator=draw)
    return torch.where(torch.rand(ids.shape, generator=draw) < 0.1, noise, ids)


class Adapted(nn.Module):
    """y = base(x) + x A^T B^T, the base frozen (LoRA; Hu et al., 2021)."""

    def __init__(self, base: QuantizedLinear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_adapters_train_on_a_quantised_base():
    base = ridgeline.reparameterize(
        llama().eval(), "quantized_linear", bits=4, calibration=text(32, seed=1)
    )
    base.requires_grad_(False)
    for layer in base.model.layers:
        for name in ("q_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name)))
    fast = ridgeline.optimize(base.train(), target="cpu", strict=True)
    trained = [p for p in base.parameters() if p.requires_grad]
    assert len(trained) == 12
    codes = {n: b.clone() for n, b in base.named_buffers()}
    ids = text(2, seed=2)
    losses = [model(input_ids=ids, labels=ids).loss for model in (fast, base)]
    found, expected = (torch.autograd.grad(loss, trained) for loss in losses)
    for own, eager in zip(found, expected, strict=True):
        assert eager.norm() > 0
        assert (own - eager).norm() <= 1e-5 * eager.norm()
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        loss = fast(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss < losses[0] - 0.05
    assert all(torch.equal(b, codes[n]) for n, b in base.named_buffers())
    assert (fast.captures, fast.fallbacks) == (1, {})
    assert {d.rewrite for d in fast.plan.applied} >= {"flash_attention"}


def curve(model: nn.Module, owner: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(owner.parameters(), 2e-3)
    losses = []
    for i in range(steps):
        ids = text(2, seed=i)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_a_llama_learns_as_in_eager_for_200_steps():
    """The yardstick is eager itself, begun one rounding away."""
    model = llama().train()
    nudged, optimized = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for p in nudged.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps)
    fast = ridgeline.optimize(optimized, target="cpu", strict=True)
    found, eager, beside = (
        torch.tensor(curve(run, owner, 200), dtype=torch.float64)
        for run, owner in ((fast, optimized), (model, model), (nudged, nudged))
    )
    assert {d.rewrite for d in fast.plan.applied} >= {"flash_attention"}
    assert eager[-1] < 0.4 * eager[0]
    growth = (beside - eager).abs().cummax(0).values + 1e-6
    assert bool(((found - eager).abs() <= 10 * growth).all()), (found - eager).abs() / growth
    assert (fast.captures, fast.fallbacks) == (1, {})
