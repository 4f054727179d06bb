"""Graphs over DTensors as graphs over one rank's tensors: what is sent is in them, and layouts."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from ridgeline.ir.local_graph import LocalGraph, local_graph
from ridgeline.ir.normalize import normalize
from ridgeline.ir.program import SHARDED, WEIGHT

pytestmark = pytest.mark.filterwarnings("default")  # Dynamo warns of its own parts


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    """A group whose collectives do nothing: only graphs are looked at."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def traced(**down: Any) -> tuple[nn.Module, Any]:
    """A column- and a row-parallel layer, and torch.compile's way to `seen` graphs of them."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)).eval()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel(**down)})
    seen: list[LocalGraph] = []

    def backend(gm: Any, example: Any) -> Any:
        seen.append(local_graph(gm, example))
        return gm

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True), seen


@torch.no_grad()
def test_linear_layers_are_put_together_again_and_their_parts_are_known() -> None:
    run, seen = traced()
    run(torch.randn(2, 3, 8)).sum()  # waits for it
    graph = normalize(seen[0].module).graph
    called = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert called.count("aten.linear.default") == 2
    assert called.count("_c10d_functional.all_reduce.default") == 1
    weights = [n for n in graph.find_nodes(op="placeholder") if WEIGHT in n.meta]
    assert [n.meta.get(SHARDED, "whole") for n in weights] == [0, 0, 1, "whole"]
    assert [list(n.meta["val"].shape) for n in weights] == [[3, 8], [3], [8, 3], [8]]


@torch.no_grad()
def test_results_are_distributed_again() -> None:
    run, seen = traced(output_layouts=Shard(1), use_local_output=False)
    whole = run(torch.randn(2, 4, 8))
    (result,) = seen[0].outputs([torch.zeros(2, 2, 8)])
    assert isinstance(result, DTensor)
    assert result.placements == whole.placements == (Shard(1),)
    assert result.shape == whole.shape == (2, 4, 8)
    assert result.to_local().shape == (whole.to_local() + 0).shape == (2, 2, 8)


@torch.no_grad()
def test_a_result_of_free_size_is_refused() -> None:
    run, seen = traced(use_local_output=False)
    x = torch.randn(2, 4, 8)
    torch._dynamo.mark_dynamic(x, 1)
    with pytest.raises(Exception, match=r"returns a DTensor of shape .*; return value.to_local"):
        run(x)
    assert not seen


@torch.no_grad()
def test_a_product_with_an_input_that_is_no_weight_stays_one() -> None:
    model = nn.Linear(8, 8, bias=False).eval()
    seen: list[LocalGraph] = []

    def backend(gm: Any, example: Any) -> Any:
        seen.append(local_graph(gm, example))
        return gm

    torch._dynamo.reset()
    torch.compile(lambda x, y: (x @ y.mT, x @ model.weight.mT), backend=backend)(
        torch.randn(3, 8), torch.randn(4, 8)
    )
    products = [str(n.target) for n in normalize(seen[0].module).graph.nodes]
    assert products.count("aten.matmul.default") == 1
    assert products.count("aten.linear.default") == 1
    assert not seen[0].distributed
