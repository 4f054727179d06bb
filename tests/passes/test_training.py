"""Training through `optimize`: compiled, with the gradients of the laws, by every usual recipe."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.utils.checkpoint import checkpoint

import ridgeline
from ridgeline.ir.gated import GATED_ACTIVATION
from ridgeline.ir.group_rational import GROUP_RATIONAL
from ridgeline.ir.layer_norm import ADD_LAYER_NORM
from ridgeline.ir.op import TransformError
from ridgeline.ir.rms_norm import ADD_RMS_NORM
from ridgeline.ir.rotary import ROTARY
from ridgeline.nn import GroupRational

pytestmark = pytest.mark.filterwarnings("default")  # Inductor warns of its own parts


class Block(nn.Module):
    """One of each operation that a trained block is rewritten to, so that no choice decides."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(32) + 0.5), nn.Parameter(torch.randn(32))
        self.qk, self.gate, self.up = (nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(32, 32))
        self.numerator = nn.Parameter(torch.randn(4, 6))
        self.denominator = nn.Parameter(0.3 * torch.rand(4, 4))
        angles = torch.outer(torch.arange(5.0), torch.rand(4))
        self.register_buffer("cos", angles.cos().repeat(1, 2)[None])
        self.register_buffer("sin", angles.sin().repeat(1, 2)[None])

    def forward(self, x: Tensor) -> Tensor:
        """x [B,5,32] -> the same."""
        y, total = ADD_RMS_NORM.overload(x, F.silu(x), self.scale, eps=1e-6)
        q, k = self.qk(y).unflatten(-1, (2, 4, 8)).permute(2, 0, 3, 1, 4)
        q, k = ROTARY.overload(q, k, self.cos, self.sin, interleaved=False)
        mixed = (q * k).transpose(1, 2).flatten(2)
        y, total = ADD_LAYER_NORM.overload(mixed, total, self.scale, self.shift, eps=1e-5)
        y = GATED_ACTIVATION.overload(self.gate(y), self.up(y), activation="gelu")
        return total + GROUP_RATIONAL.overload(y, self.numerator, self.denominator)


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(0)
    return Block().train()


@pytest.fixture(scope="module")
def fast(block: Block) -> nn.Module:
    return ridgeline.optimize(block, target="cpu", strict=True)


def draw(seed: int = 1) -> Tensor:
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))


def test_a_step_is_compiled_and_its_gradients_are_those_of_the_law(block, fast):
    x = draw()
    _, sources = run_fw_bw_and_get_code(lambda: fast(x).square())
    called = {word for word in "\n".join(sources).split() if "ops.ridgeline." in word}
    assert called  # fused into loops are all but the rational function, which has kernels
    assert all("group_rational" in word for word in called), called
    law = gradients(copy.deepcopy(block).double(), x.detach().double().requires_grad_())
    eager = gradients(block, x)
    for own, theirs, exact in zip(gradients(fast, x), eager, law, strict=True):
        error = (own.double() - exact).norm() / exact.norm()
        assert error <= 4 * (theirs.double() - exact).norm() / exact.norm() + 3e-7
    assert (fast.captures, fast.fallbacks) == (1, {})
    assert not any("did not compile" in note for note in fast.plan.notes)


def test_gradients_accumulate_and_steps_are_seen(block, fast):
    eager = copy.deepcopy(block)
    for model in (eager, fast):
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimiser.zero_grad()
            for seed in (2, 3):
                model(draw(seed)).square().mean().backward()
            optimiser.step()
    for own, theirs in zip(fast.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    assert fast.captures == 1


def test_checkpoints_recompute_the_compiled_graph(fast):
    x = draw()
    plain = gradients(fast, x)
    again = torch.autograd.grad(
        checkpoint(fast, x, use_reentrant=False).square().sum(), [x, *fast.parameters()]
    )
    torch.testing.assert_close(list(again), plain)
    assert fast.captures == 1


def test_a_parameter_may_be_frozen_and_thawed(block, fast):
    x = draw()
    block.zero_grad()
    try:
        block.gate.requires_grad_(False)
        fast(x).sum().backward()
        assert block.gate.weight.grad is None
        assert block.up.weight.grad is not None
        block.gate.requires_grad_(True)
        fast(x).sum().backward()
        assert block.gate.weight.grad is not None
    finally:
        block.gate.requires_grad_(True)
        block.zero_grad()


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_transforms_are_refused_by_operations(transform):
    """torch alone would lose the tangent of a jvp without a word."""
    a, b = torch.randn(2, 6), torch.rand(2, 4)

    def law(x: Tensor) -> Tensor:
        return GROUP_RATIONAL.overload(x, a, b)

    calls = {
        "grad": lambda x: torch.func.grad(lambda x: law(x).sum())(x),
        "jvp": lambda x: torch.func.jvp(law, (x,), (x,)),
        "vmap": torch.vmap(law),
    }
    with pytest.raises(TransformError, match=r"torch\.autograd\.grad"):
        calls[transform](torch.randn(3, 8))


def test_transforms_of_an_optimized_model_run_the_original_code():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).train()
    fast = ridgeline.optimize(model, target="cpu")
    parameters, x = dict(model.named_parameters()), torch.randn(3, 4)

    def loss(parameters: dict[str, Tensor], network: nn.Module) -> Tensor:
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    found, expected = (torch.func.grad(loss)(parameters, m) for m in (fast, model))
    torch.testing.assert_close(found, expected)
    assert fast.captures == 0
    (reason,) = fast.fallbacks.values()
    assert "torch.func transform" in reason


def test_autocast_through_torch_compile():
    """The graph that Dynamo gives on is traced under the caller's autocast, casts and all."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(32, 64), GroupRational(64, 4), nn.Linear(64, 8)).train()
    fast = torch.compile(model, backend="ridgeline", options={"target": "cpu"})
    x, exact = torch.randn(16, 32), copy.deepcopy(model).double()

    def step(network: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = network(x)
            assert y.dtype == torch.bfloat16
        return list(torch.autograd.grad(y.float().square().sum(), list(network.parameters())))

    law = torch.autograd.grad(exact(x.double()).square().sum(), list(exact.parameters()))
    for own, eager, value in zip(step(fast), step(model), law, strict=True):
        assert own.dtype == torch.float32
        error = (own.double() - value).norm() / value.norm()
        assert error <= 2 * (eager.double() - value).norm() / value.norm() + 4e-3


def test_autocast_through_optimize():
    """Its casts are in the graph: the products are bf16, the gradients the parameters' dtype."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0),
        *(GroupRational(32, 4), nn.Linear(32, 8)),
    ).train()
    fast = ridgeline.optimize(model, target="cpu", strict=True)
    x, exact = torch.randn(2, 16, 32), copy.deepcopy(model).double()
    law = torch.autograd.grad(exact(x.double()).square().sum(), list(exact.parameters()))

    def step(network: nn.Module, inside: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = network(x)
            assert y.dtype == torch.bfloat16
            loss = y.float().square().sum()
            if inside:  # discouraged by torch, and possible
                return list(torch.autograd.grad(loss, list(network.parameters())))
        return list(torch.autograd.grad(loss, list(network.parameters())))

    for inside in (False, True):
        found, eager = step(fast, inside), step(model, inside)
        for own, theirs, value in zip(found, eager, law, strict=True):
            assert own.dtype == torch.float32
            error = (own.double() - value).norm() / value.norm()
            assert error <= 2 * (theirs.double() - value).norm() / value.norm() + 4e-3
    assert (fast.captures, fast.fallbacks) == (1, {})
    assert not any("did not compile" in note for note in fast.plan.notes)


class Grouped(nn.Module):
    """Grouped-query attention as transformers spells it: keys that a rotation made fp32 are cast by
    autocast after they are repeated, values are not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        turn = torch.linspace(-1, 1, 8)  # float32, as the tables of a rotation
        k, v = (
            t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(t.shape[0], 4, -1, 8)
            for t in (k * turn, v)
        )
        return nn.functional.scaled_dot_product_attention(q * turn, k, v, is_causal=True)


@pytest.mark.parametrize("training", [False, True])
def test_keys_cast_after_their_repetition_are_grouped_query_attention(training):
    torch.manual_seed(0)
    model, x = Grouped().train(training), torch.randn(2, 128, 32)
    fast, exact = (
        ridgeline.optimize(model, target="cpu", strict=True),
        copy.deepcopy(model).double(),
    )
    results = []
    for run, owner, low in ((exact, exact, False), (fast, model, True), (model, model, True)):
        own = x.to(next(owner.parameters()).dtype)
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = run(own)
        assert y.dtype == (torch.bfloat16 if low else torch.float64)
        found = [y.double()]
        if training:
            found += torch.autograd.grad(y.double().square().sum(), list(owner.parameters()))
        results.append([t.double() for t in found])
    for law, own, eager in zip(*results, strict=True):
        assert (own - law).norm() <= 2 * (eager - law).norm() + 4e-3 * law.norm()
    assert [d.rewrite for d in fast.plan.applied].count("flash_attention") == 1
    assert (fast.captures, fast.fallbacks) == (1, {})


class Causal(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("length", [17, 512])
def test_a_training_step_is_weighed_with_its_backward(length):
    operands = [torch.randn(2, 4, length, 16, requires_grad=True) for _ in range(3)]
    plan = ridgeline.optimize(Causal().train(), tuple(operands), target="cpu").plan
    (decision,) = plan.applied
    assert decision.rewrite == "flash_attention"
    products = 2 * 4 * length * (length + 1) // 2 * (16 + 16)
    assert decision.after.flops == 7 * products
