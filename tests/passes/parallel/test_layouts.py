"""Layouts: what reads a value that a rank does not hold is an error when the graph is compiled."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.parallel.allreduce_rms_norm import Place, shard_tokens
from ridgeline.passes.parallel.collectives import count, merge_equal
from ridgeline.passes.parallel.layers import all_reduce
from ridgeline.passes.parallel.layouts import (
    COLUMN,
    ROW,
    Layout,
    LayoutError,
    Part,
    propagate,
)
from ridgeline.passes.parallel.token_region import find_regions

SPLITS = {"up.weight": Part(COLUMN), "up.bias": Part(COLUMN), "down.weight": Part(ROW)}
WORLD = 2


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[str]:
    """A group whose collectives do nothing: only graphs are looked at."""
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


class Model(nn.Module):
    """finish(model, x, partial sum of x's MLP), with a norm and a head."""

    def __init__(self, finish: Any, bias: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16, bias=bias)
        self.norm, self.head = nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 5)
        self.finish = finish

    def forward(self, x: Tensor) -> Any:
        return self.finish(self, x, self.down(F.gelu(self.up(x))))


def graph_of(finish: Any, length: int = 6, **options: Any) -> fx.GraphModule:
    model = Model(finish, **options).eval()
    with torch.no_grad():
        return normalize(capture(model, (torch.randn(2, length, 16),)).program.module)


def reduced(y: Tensor) -> Tensor:
    return all_reduce(y, dist.group.WORLD.group_name)


def block(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return model.head(model.norm(x + reduced(y)))


def rewritten(finish: Any, group: str, **options: Any) -> fx.GraphModule:
    module = graph_of(finish, **options)
    (region,), rejects = find_regions(module.graph, group, WORLD, propagate(module.graph, SPLITS))
    assert not rejects
    shard_tokens(module, region, Place(group, WORLD, 0, by_parts=False))
    return module


def test_layouts_of_a_block(group: str) -> None:
    module = graph_of(block)
    layouts = propagate(module.graph, SPLITS)
    (gelu,) = [n for n in module.graph.nodes if "gelu" in str(n.target)]
    (reduce,) = [n for n in module.graph.nodes if "all_reduce" in str(n.target)]
    assert layouts[gelu] is Layout.LOCAL
    assert layouts[reduce] is Layout.REPLICATED
    assert reduce.args[0].meta["layout"] is Layout.PARTIAL_SUM


def test_layouts_after_the_rewrite(group: str) -> None:
    module = rewritten(block, group)
    layouts = propagate(module.graph, SPLITS)
    (norm,) = [n for n in module.graph.nodes if "rms_norm" in str(n.target)]
    assert layouts[norm] is Layout.SHARDED_BY_TOKEN
    assert count(module.graph) == {"reduce_scatter_tensor": 1, "all_gather_into_tensor": 1}


@pytest.mark.parametrize(
    ("finish", "said"),
    [
        (lambda m, x, y: m.head(m.norm(x + y)), "which is the whole only once"),
        (lambda m, x, y: F.gelu(y), "'gelu' .* reads 'linear'"),
        (lambda m, x, y: y, "returns 'linear' .* a partial sum"),
        (lambda m, x, y: reduced(y) + F.gelu(m.up(x)).sum(-1, keepdim=True), "this rank's own"),
    ],
)
def test_a_partial_sum_is_not_read(finish: Any, said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        propagate(graph_of(finish).graph, SPLITS, results=1)


def test_a_bias_is_added_once() -> None:
    with pytest.raises(LayoutError, match="adds a bias to a partial sum"):
        propagate(graph_of(block, bias=True).graph, SPLITS)


def test_a_stale_residual_is_not_read(group: str) -> None:
    """A reader that is overlooked, and reads the shard in place of the gathered value."""
    module = rewritten(block, group)
    head = module.graph.output_node().args[0][0]
    (norm,) = [n for n in module.graph.nodes if "rms_norm" in str(n.target)]
    head.replace_input_with(head.args[0], norm)
    with pytest.raises(LayoutError, match=f"{head.name}.* of which this rank holds some tokens"):
        propagate(module.graph, SPLITS)


def test_a_shard_is_not_added_to_all_tokens(group: str) -> None:
    module = rewritten(block, group)
    (norm,) = [n for n in module.graph.nodes if "rms_norm" in str(n.target)]
    (x,) = module.graph.find_nodes(op="placeholder")
    total = norm.args[0]
    entry = next(a for a in total.args if "token_rows" in str(a.target))
    total.replace_input_with(entry, x)
    with pytest.raises(LayoutError, match="together with 'flat_0'"):
        propagate(module.graph, SPLITS)


def without_norm(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return model.head(x + reduced(y))


def largest(model: Model, x: Tensor, y: Tensor) -> Tensor:
    functional = torch.ops._c10d_functional
    y = functional.wait_tensor(functional.all_reduce(y, "max", dist.group.WORLD.group_name))
    return model.norm(x + y)


@pytest.mark.parametrize(
    ("finish", "said"),
    [
        (without_norm, "no norm reads .* row by row; 'linear'"),
        (largest, "takes the max over the ranks"),
    ],
)
def test_refusals_name_the_reason(finish: Any, said: str, group: str) -> None:
    graph = graph_of(finish).graph
    regions, (reject,) = find_regions(graph, group, WORLD, propagate(graph, SPLITS))
    assert not regions
    assert re.search(said, reject.reason)


def test_fewer_tokens_than_ranks_stay(group: str) -> None:
    module = graph_of(block, length=1)
    layouts = propagate(module.graph, SPLITS)
    regions, (reject,) = find_regions(module.graph, group, 4, layouts)
    assert not regions
    assert reject.reason == "2 tokens are fewer than 4 ranks"


@pytest.mark.parametrize("written", [False, True])
def test_gathers_of_a_value_that_is_written_in_between_stay_two(written: bool) -> None:
    functional, graph = torch.ops._c10d_functional, fx.Graph()

    def called(target, *args, rows: int = 4) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = torch.empty(rows, 8, device="meta")
        return node

    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, 8, device="meta")
    y = called(torch.ops.aten.relu.default, x)
    waits = []
    for i in range(2):
        gather = called(functional.all_gather_into_tensor.default, y, 2, "0", rows=8)
        waits.append(called(functional.wait_tensor.default, gather, rows=8))
        if written and not i:
            called(torch.ops.aten.add_.Tensor, y, 1)
    graph.output(tuple(waits))
    assert merge_equal(graph) == (not written)


def test_what_is_summed_is_this_ranks_own_where_nothing_is_declared() -> None:
    def both(model: Model, x: Tensor, y: Tensor) -> Tensor:
        return model.norm(x + reduced(y) + 0.1 * y)

    with pytest.raises(LayoutError, match=r"'mul'.* reads 'linear'.* \(linear_1\), which is this"):
        propagate(graph_of(both).graph, {}, results=1)
    propagate(graph_of(block).graph, {}, results=1)  # nothing but the sum reads it
    twice = graph_of(lambda model, x, y: reduced(reduced(y)) + reduced(y)).graph
    assert propagate(twice, {})[twice.output_node().args[0][0]] is Layout.REPLICATED
