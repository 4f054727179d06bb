"""A product with a rational function on one side: bytes, operations, and what recomputing costs."""

import dataclasses

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from ridgeline.cost_model import Gemm, Stream, Work, estimate, load_target, work_of
from ridgeline.cost_model.operations import operations
from ridgeline.ir.linear_rational import LINEAR_RATIONAL, SIDES

BRAIN = torch.bfloat16


def product(m: int, n: int, k: int, side: str | None = None, terms: int = 10) -> Gemm:
    """The library's, or ours with a rational function on a side."""
    plain = Gemm(m, n, k, dtype=BRAIN, bias=True)
    if side is None:
        return plain
    return dataclasses.replace(plain, library="ridgeline", **{f"{side}_terms": terms})


def seconds(target: str, *kernels) -> float:
    return estimate(Work(kernels), load_target(target)).seconds


@pytest.mark.parametrize("side", SIDES)
def test_the_operation_counts_as_a_product_that_reads_and_writes_once(side):
    graph = fx.Graph()
    groups = {"output": 4, "input": 2}[side]
    shapes = ((2, 5, 6), (8, 6), (8,), (groups, 6), (1, 4))
    with FakeTensorMode():
        values = [torch.empty(s, dtype=BRAIN) for s in shapes]
        result = torch.empty(2, 5, 8, dtype=BRAIN)
    nodes = [graph.placeholder(f"x{i}") for i in range(5)]
    for node, value in zip(nodes, values, strict=True):
        node.meta["val"] = value
    call = graph.call_function(LINEAR_RATIONAL.overload, tuple(nodes), {"side": side})
    call.meta["val"] = result
    assert work_of(call).kernels == (product(10, 8, 6, side),)
    assert sum(product(10, 8, 6, side).bytes.values()) == 2 * (10 * 6 + 8 * 6 + 8 + 10 * 8)
    plain, fused = operations(product(10, 8, 6)), operations(product(10, 8, 6, side))
    elements = 10 * (8 if side == "output" else 6)
    assert fused["divide", "float32"] - plain["divide", "float32"] == elements
    assert fused["multiply", "float32"] - plain["multiply", "float32"] == 10 * elements


@pytest.mark.parametrize("target", ["a100", "h100", "mi300x"])
def test_a_function_of_the_input_is_paid_for_in_every_column_of_tiles(target):
    """That of the output once, whatever the layer's width: both against the product alone."""
    tokens, k = 1 << 15, 1024

    def extra(side: str, n: int) -> float:
        alone = product(tokens, n, k, side, terms=0)
        return seconds(target, product(tokens, n, k, side)) - seconds(target, alone)

    assert extra("input", 4096) > 3 * extra("input", 1024) > 3 * extra("input", 256)
    per_column = [extra("output", n) / n for n in (1024, 4096)]
    assert per_column[0] == pytest.approx(per_column[1], rel=0.1)
    assert extra("input", 4096) > 4 * extra("output", 4096)


def test_ours_is_no_better_than_the_library_without_a_function():
    for shape in ((12608, 3072, 768), (64, 4096, 4096), (1, 4096, 4096), (4096, 4096, 16384)):
        for target in ("a100", "h100", "b200", "mi300x", "l4"):
            ours = product(*shape, "output", terms=0)
            assert seconds(target, ours) >= seconds(target, product(*shape))


@pytest.mark.parametrize(
    ("target", "shape", "pays"),
    [
        ("h100", (12608, 768, 192), True),
        ("h100", (12608, 3072, 4096), False),
        ("a100", (1576, 768, 192), True),
        ("a100", (1576, 3072, 768), False),
    ],
)
def test_a_narrow_layer_gains_by_the_function_of_its_output(target, shape, pays):
    moved = float(2 * shape[0] * shape[1])
    apart = Stream(moved, moved, 20 * shape[0] * shape[1], BRAIN)
    before = seconds(target, product(*shape), apart)
    assert (seconds(target, product(*shape, "output")) < before) == pays
