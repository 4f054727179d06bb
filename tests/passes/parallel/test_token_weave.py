"""Two halves of a batch in turn: the same results and caches, and two sends under way at once."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from gloo import on_ranks
from gloo.models import LAYERS
from gloo.work import measured, woven
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.parallel.layers import all_reduce
from ridgeline.passes.parallel.token_weave import refusal

SENDS = 2 * (2 * LAYERS + 1) + 1
"""A scatter and a gather for each sum, and the gather of the logits."""


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_halves_and_their_caches(family: str) -> None:
    """5 sequences, so halves of 2 and 3; two steps go on from the woven prefill's cache."""
    for told in on_ranks(2, woven, family, 5, "always"):
        assert "error" not in told, told
        assert max(told["errors"]) <= 1e-6
        assert told["woven"] == [f"two halves of the batch in {SENDS + 1} segments each"] * 2
        assert sum(told["sent"].values()) == 2 * SENDS
        assert told["under way"] == 2


def test_not_woven_one_send_is_under_way() -> None:
    for told in on_ranks(2, woven, "llama", 3, "always"):
        assert told["refused"] == ["3 sequences are fewer than 4"] * 2
        assert sum(told["sent"].values()) == SENDS
        assert told["under way"] == 1


def test_what_is_measured_is_decided_alike_on_all_ranks() -> None:
    first, second = on_ranks(2, measured)
    assert first["error"] <= 1e-6
    assert first["decided"] == second["decided"]
    assert set(first["decided"]["allreduce_rms_norm"]) <= {None, "cost"}
    assert first["decided"]["token_weave"] in ([None], ["cost"])


class Model(nn.Module):
    """A sum over the ranks, and what a test does with it."""

    def __init__(self, finish) -> None:
        super().__init__()
        self.finish = finish

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(all_reduce(x, dist.group.WORLD.group_name))


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A group whose collectives do nothing: only graphs are looked at."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def routed(x: Tensor) -> Tensor:
    """The two best experts of each token, as a mask."""
    best = x.topk(2, dim=-1).indices
    return torch.zeros_like(x).scatter(-1, best, 1.0)


@pytest.mark.parametrize(
    ("finish", "batch", "reason"),
    [
        (routed, 6, "routes tokens"),
        (lambda x: x - x.mean(0), 6, "reduces the sequences of the batch to one value"),
        (lambda x: x.transpose(0, 1), 6, "a result, is not one part a sequence"),
        (torch.relu, 1, "the batch is one sequence"),
        (torch.relu, 2, "2 sequences are fewer than 4"),
    ],
)
def test_refusals(finish, batch: int, reason: str, group: None) -> None:
    model = Model(finish).eval()
    with torch.no_grad():
        module = normalize(capture(model, (torch.randn(batch, 7, 8),)).program.module)
    reject = refusal(module)
    assert reject is not None
    assert reason in reject.reason
