"""Autocast as nodes: the graph runs without autocast and gives what the model gives under it."""

import pytest
import torch
from torch import Tensor, nn

from ridgeline.ir.autocast import active, disabled
from ridgeline.ir.capture import CaptureError, capture

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Regions(nn.Module):
    """Products, sums, norms and regions of another autocast, one inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.block = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        with torch.autocast("cpu", enabled=False):
            z = self.linear(y.float())
            with torch.autocast("cpu"):
                u = self.linear(z)
        z, rest = self.block(z), torch.cat([u, z], 1)[:, :5]
        return z + u + torch.einsum("bik,bjk->bij", x, z)[..., :1].softmax(1) + rest


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Regions().train()  # nn.TransformerEncoderLayer's fast path in eval() knows no autocast


def draw() -> Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


def casts(graph: torch.fx.Graph) -> list[torch.dtype]:
    found = graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype)
    return [node.args[1] for node in found]


@pytest.mark.parametrize("low", LOW)
def test_the_graph_gives_what_the_model_gives_under_autocast(model, low):
    x = draw()
    with torch.no_grad(), torch.autocast("cpu", dtype=LOW[low]):
        captured = capture(model, (x,), dynamic=False)
        expected = model(x)
    graph = captured.program.module.graph
    assert LOW[low] in casts(graph)
    assert not any("autocast" in str(node.target) for node in graph.nodes)
    with torch.no_grad():
        (found,) = captured.program.module(x)
    assert torch.equal(found, expected)  # bit by bit: the same operations on the same dtypes
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.op == "call_function":
            args = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with value.fake_mode:
                assert node.target(*args[0], **args[1]).dtype == value.dtype, node


def test_a_region_inside_the_model_needs_no_autocast_outside(model):
    x = draw()
    with torch.no_grad():
        captured, expected = capture(model, (x,)), model(x)
        assert torch.equal(captured.program.module(x)[0], expected)
    assert casts(captured.program.module.graph).count(torch.bfloat16) == 3  # z, weight, bias


def test_a_weight_is_cast_once_as_autocast_caches_it(model):
    x = draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = capture(model, (x,)).program.module.graph
    weight = next(n for n in graph.find_nodes(op="get_attr") if n.target == "linear.weight")
    assert [n.target for n in weight.users].count(torch.ops.aten.to.dtype) == 1


class Inherited(nn.Module):
    """Regions that name no dtype, inside ones that do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            y = x @ x.transpose(1, 2)
            with torch.autocast("cpu"):
                y = y + x @ x.transpose(1, 2)
            with torch.autocast("cpu", enabled=False):
                z = x @ x.transpose(1, 2)
                with torch.autocast("cpu"):
                    z = z + x @ x.transpose(1, 2)
        return y + z


def test_a_region_without_a_dtype_has_the_one_around_it():
    x = draw()
    with torch.no_grad():
        captured, expected = capture(Inherited(), (x,)), Inherited()(x)
        assert torch.equal(captured.program.module(x)[0], expected)
    assert set(casts(captured.program.module.graph)) == {torch.float16}
    fast = torch.compile(Inherited(), backend="ridgeline", options={"target": "cpu"})
    with torch.no_grad():
        torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)


def test_regions_of_dynamos_graph_have_their_own_dtypes(model):
    """It is traced without them: what reads their results must be cast all the same."""
    torch._dynamo.reset()
    fast, x = torch.compile(model, backend="ridgeline", options={"target": "cpu"}), draw()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        found, expected = fast(x), model(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


class Calls(nn.Module):
    """One function of x."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.tensordot(x, x, dims=([2], [2])),
        lambda x: torch.inner(x, x[0]),
        lambda x: torch.baddbmm(x @ x.transpose(1, 2), x, x.transpose(1, 2), beta=0.5),
        lambda x: torch.nn.functional.mse_loss(x.bfloat16(), x[:1].bfloat16().expand_as(x)),
        lambda x: x.int() @ x.int().transpose(1, 2),
        lambda x: x.double() @ x.double().transpose(1, 2),
        lambda x: x.bfloat16().cumsum(1),
        lambda x: torch.nn.functional.rms_norm(x.bfloat16(), (32,), torch.ones(32)),
        lambda x: torch.einsum("bij,bij->bij", x, x),  # no product of matrices in it
        lambda x: torch.einsum("bii->bi", x[:, :, :5]),
        lambda x: torch.inner(x[0, 0], x[0, 0]),
        lambda x: (x.clone().unsqueeze_(0) @ x.transpose(1, 2)).squeeze_(0),
        lambda x: (x[0] @ x[0].t()).t_() @ x[0],
        lambda x: x.clone().baddbmm_(x, torch.ones(2, 32, 32)),
    ],
)
def test_every_policy(function):
    model, x = Calls(function), draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured, expected = capture(model, (x,)), model(x)
    (found,) = captured.program.module(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


CELL = nn.GRUCell(32, 32)
LSTM = [torch.ones(32, 32), torch.ones(32, 8)]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: CELL(x[0], x[1]), "gru_cell"),
        (
            lambda x: torch.lstm(
                x, [torch.zeros(1, 2, 8)] * 2, LSTM, False, 1, 0.0, False, False, True
            )[0],
            "lstm",
        ),
        (lambda x: nn.functional.bilinear(x, x, torch.ones(3, 32, 32)), "bilinear"),
        (torch.linalg.pinv, "linalg_pinv"),
    ],
)
def test_what_cannot_be_written_as_casts_is_named(function, name):
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(CaptureError, match=rf"{name}.*cannot be written as casts"),
    ):
        capture(Calls(function), (draw(),))


def test_the_state_is_the_callers():
    assert active() == ()
    with torch.autocast("cpu", dtype=torch.float16):
        assert active() == (("cpu", torch.float16),)
        with disabled():
            assert active() == ()


def test_grad_mode_inside_a_region_is_refused():
    """Dissolving the region must not lose it: gradients would flow where the model stops them."""
    linear = nn.Linear(32, 32)

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            with torch.no_grad():
                still = linear(x)
            return still * linear(x)

    model = Calls(function).train()
    model.linear = linear
    with pytest.raises(CaptureError, match="grad mode inside an autocast region"):
        capture(model, (draw(),))
