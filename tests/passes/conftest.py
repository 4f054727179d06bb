"""Attention rewritten wherever it is found, whatever it would cost: what does the graph compute?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ridgeline.cost_model import load_target
from ridgeline.ir.attention import ATTENTION
from ridgeline.ir.call import flatten
from ridgeline.ir.capture import Captured, capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.apply import apply
from ridgeline.passes.base import Candidate, Setting
from ridgeline.passes.certify import EQUIVALENCE_LIMIT, equivalence
from ridgeline.passes.flash_attention import FLASH_ATTENTION
from ridgeline.passes.propose import Refusal, propose
from ridgeline.passes.weights import WeightStore


class Function(nn.Module):
    """A function as a module, so that it can be captured."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The rewritten graph of one captured call, every candidate applied and certified."""

    captured: Captured
    graph_module: fx.GraphModule
    candidates: list[Candidate]
    refusals: list[Refusal]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the rewritten graph computes for such a call."""
        call = flatten(args, kwargs)
        assert self.captured.guards.accept(call.flat), "another graph would be captured"
        return self.captured.finish(call, self.graph_module(*call.flat))

    @property
    def attentions(self) -> list[fx.Node]:
        """The `ridgeline::attention` calls in the rewritten graph."""
        graph = self.graph_module.graph
        return list(graph.find_nodes(op="call_function", target=ATTENTION.overload))

    @property
    def reasons(self) -> str:
        """Why sites were refused, one reason a line."""
        return "\n".join(f"{r.by}: {r.reject.reason}" for r in self.refusals)


@pytest.fixture(scope="session")
def as_module() -> Callable[[Callable[..., Any]], nn.Module]:
    """A function -> a module in eval mode that calls it."""
    return lambda function: Function(function).eval()


@pytest.fixture(scope="session")
def rewrite() -> Callable[..., Rewritten]:
    """(function or module, args, kwargs) -> its graph with every attention rewritten."""

    def build(
        model: Callable[..., Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Rewritten:
        module = model if isinstance(model, nn.Module) else Function(model).eval()
        captured = capture(module, args, kwargs)
        program = captured.program
        normalize(program.module)
        setting = Setting(load_target("a100"), program.training, 0.0, _unobserved, WeightStore())
        candidates, refusals = propose((FLASH_ATTENTION,), program.module, setting)
        for candidate in candidates:
            assert equivalence(candidate, {}).relative_error <= EQUIVALENCE_LIMIT
        return Rewritten(captured, apply(program.module, candidates), candidates, refusals)

    return build


def _unobserved(node: fx.Node) -> Tensor:
    raise AssertionError(f"{node.name}: a rewrite equal in real arithmetic reads no values")


ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest difference, relative to the largest entry, between two spellings of one function."""


@pytest.fixture(scope="session")
def assert_equal() -> Callable[..., None]:
    """(got, expected, factor=1): same structure and dtypes, values within `factor` roundings."""

    def check(got: Any, expected: Any, *, factor: float = 1.0) -> None:
        if not isinstance(expected, Tensor):
            assert type(got) is type(expected)
            for a, b in zip(got, expected, strict=True):
                check(a, b, factor=factor)
            return
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        finite = expected.isfinite()
        assert torch.equal(got.isfinite(), finite)
        largest = expected[finite].abs().max().item() if finite.any() else 0.0
        allowed = factor * ROUNDING.get(expected.dtype, 0.0) * largest
        torch.testing.assert_close(got[finite], expected[finite], atol=allowed, rtol=0)

    return check
