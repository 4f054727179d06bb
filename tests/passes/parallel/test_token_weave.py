"""Two parts of the tokens in turn: the same results and caches, and two sends under way at once."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from gloo import on_ranks
from gloo.models import LAYERS
from gloo.work import compiled, measured, woven, woven_generation
from ridgeline.cost_model import choose_schedule, load_target
from ridgeline.ir.capture import capture
from ridgeline.ir.match import Reject
from ridgeline.ir.normalize import normalize
from ridgeline.passes.parallel.apart import apart
from ridgeline.passes.parallel.collectives import is_collective, normal_form
from ridgeline.passes.parallel.in_turn import in_turn
from ridgeline.passes.parallel.layers import all_reduce
from ridgeline.passes.parallel.parts import Parts
from ridgeline.passes.parallel.token_region import PART
from ridgeline.passes.parallel.token_weave import choose_cut, find_cut
from ridgeline.tools.fit_tensor_parallel import LLAMA

SUMS = 2 * LAYERS + 1


def fused(layers: int = LAYERS) -> dict[str, int]:
    """A scatter and a gather for each sum of a part, and the gather of its logits."""
    sums = 2 * layers + 1
    return {"all_to_all_single": 2 * sums, "all_gather_into_tensor": 2 * sums + 2}


def test_parts_of_sequences_and_their_caches() -> None:
    """Odd counts, padding, grouped heads, soft caps; what goes on from a prefill's cache."""
    cases = [
        {"family": "llama", "batch": 1, "lengths": [9, 8, 1], "layers": 2},
        {"family": "gpt2", "batch": 1, "lengths": [7]},
        {"family": "gemma2", "batch": 1, "lengths": [11]},
        {"family": "gqa", "batch": 2, "lengths": [8, 6], "padding": 2, "fuse": "never"},
        {"family": "llama", "batch": 5, "lengths": [3, 1]},
        {"family": "llama", "batch": 5, "lengths": [3, 1], "static": 8},
    ]
    first, second = on_ranks(2, woven, cases)
    assert "error" not in first, first
    assert [case["sent"] for case in first] == [case["sent"] for case in second]
    assert max(e for case in first for e in case["errors"]) <= 1e-6
    assert all(case["under way"] == 2 for case in first)
    *tokens, plain, sequences, static = first
    sizes = [[w.partition(";")[0] for w in case["woven"]] for case in (*tokens, plain)]
    cuts = [[(5, 4), (4, 4)], [(4, 3)], [(6, 5)], [(4, 4), (3, 3)]]
    assert sizes == [[f"tokens {a} + {b}" for a, b in case] for case in cuts]
    assert tokens[0]["refused"] == ["1 tokens, one of each sequence"]
    assert [case["sent"] for case in tokens] == [fused(2), fused(), fused()]
    assert plain["sent"] == {"all_reduce": 2 * SUMS, "all_gather_into_tensor": 2}
    assert sequences["woven"] == ["sequences 3 + 2"] * 2  # each a prefill and a step
    assert static["woven"] == ["sequences 3 + 2"]
    assert static["refused"] == [
        "5 tokens, one of each sequence, whose number is fixed in this graph"
    ]
    assert static["sent"] == sequences["sent"]
    assert sequences["sent"] == fused() | {"all_gather_into_tensor": 2 * SUMS + 1}


def test_four_ranks() -> None:
    """9 tokens as 5 and 4, so that shards of two rows and of one are padded."""
    for told in on_ranks(4, woven, [{"family": "llama", "batch": 1, "lengths": [9]}]):
        assert "error" not in told, told
        assert max(told[0]["errors"]) <= 1e-6
        assert (told[0]["sent"], told[0]["under way"]) == (fused(), 2)


def test_static_caches_are_written_part_by_part() -> None:
    for told in on_ranks(2, woven_generation):
        assert "error" not in told, told
        assert told["got"] == [told["expected"]] * 2
        assert told["woven"], told["refused"]


def test_inductor_keeps_the_order() -> None:
    for told in on_ranks(2, compiled, "llama", 40):
        assert "error" not in told, told
        assert max(told["errors"]) <= 1e-6
        assert told["captures"] == 1
        assert told["order"] == "s" + "sw" * (2 * (2 * 2 + 1) + 1) + "w"


def test_what_is_measured_is_decided_alike_on_all_ranks() -> None:
    first, second = on_ranks(2, measured)
    assert "error" not in first or first["error"] <= 1e-6, first
    assert first["decided"] == second["decided"]
    assert set(first["decided"]["allreduce_rms_norm"]) <= {None, "cost"}
    assert first["decided"]["token_weave"] in ([None], ["cost"])


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A group whose collectives do nothing: only graphs are looked at."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    """What a test does between two sums over the ranks."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        name = dist.group.WORLD.group_name
        return all_reduce(self.middle(all_reduce(x, name)), name)


def graph_of(middle: Callable[[Tensor], Tensor], batch: int, tokens: int = 70) -> fx.GraphModule:
    with torch.no_grad():
        x = torch.randn(batch, tokens, 8)
        module = normalize(capture(Model(middle).eval(), (x,)).program.module)
    normal_form(module)
    return module


def routed(x: Tensor) -> Tensor:
    """The two best experts of each token, as a mask."""
    best = x.topk(2, dim=-1).indices
    return torch.zeros_like(x).scatter(-1, best, 1.0)


def attended(x: Tensor, mask: Tensor | None) -> Tensor:
    q = x.unsqueeze(1)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask).squeeze(1)


def added(x: Tensor, fill: float) -> Tensor:
    """Attention with a number added where keys are excluded: those ahead, and the first."""
    kept = window(x, 0) & (torch.arange(x.shape[1]) > 0)
    mask = torch.where(kept, torch.zeros([]), fill)
    return torch.softmax(x @ x.mT + mask, -1) @ x


def window(x: Tensor, ahead: int) -> Tensor:
    """Which keys a row reads: those up to `ahead` after it."""
    at = torch.arange(x.shape[1])
    return at[None, :] <= at[:, None] + ahead


REFUSED: list[tuple[Callable[[Tensor], Tensor], int, int, str]] = [
    (routed, 6, 7, "routes tokens"),
    (routed, 1, 70, "routes tokens"),
    (lambda x: x - x.mean(0), 6, 7, "reads all tokens at once"),
    (lambda x: x - x.mean(1, keepdim=True), 1, 70, "'mean' at"),
    (lambda x: x.cumsum(1), 1, 70, "'cumsum' at"),
    (lambda x: x.flip(1), 1, 70, "'flip' at"),
    (lambda x: attended(x, None), 1, 70, "lets tokens read those after them"),
    (lambda x: attended(x, window(x, 1)), 1, 70, "not known to be causal"),
    (lambda x: torch.softmax(x @ x.mT, -1) @ x, 1, 70, "reads all tokens at once"),
    (lambda x: added(x, -3e38), 1, 70, "a row may keep none"),
    (torch.relu, 1, 1, "1 tokens, one of each sequence"),
    (torch.relu, 3, 1, "3 sequences are fewer than 4"),
    (torch.relu, 1, 63, "63 tokens of a sequence are fewer than 64"),
]


@pytest.mark.parametrize(("middle", "batch", "tokens", "reason"), REFUSED)
def test_refusals(middle, batch: int, tokens: int, reason: str, group: None) -> None:
    reject = find_cut(graph_of(middle, batch, tokens).graph, asked=False)
    assert isinstance(reject, Reject)
    assert reason in reject.reason


class Flat(nn.Module):
    """All tokens of all sequences in one dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(x.flatten(0, 1), dist.group.WORLD.group_name)


@pytest.mark.parametrize(
    ("model", "dynamic", "reason"),
    [
        (Flat(), True, "420 tokens in a dimension of size s"),
        (Model(torch.relu), False, "420 tokens, a size that is fixed in this graph"),
        (Flat(), False, "420 tokens, a size that is fixed in this graph"),
    ],
)
def test_sizes_that_are_no_tokens(
    model: nn.Module, dynamic: bool, reason: str, group: None
) -> None:
    with torch.no_grad():
        x = torch.randn(6, 70, 8)
        module = normalize(capture(model.eval(), (x,), dynamic=dynamic).program.module)
    normal_form(module)
    reject = find_cut(module.graph, asked=True)
    assert isinstance(reject, Reject)
    assert reject.reason.startswith(reason)


def test_rows_that_keep_no_key_are_nobodys_where_none_is_read(group: None) -> None:
    cut = find_cut(graph_of(lambda x: added(x, -torch.inf), 1).graph, asked=False)
    assert not isinstance(cut, Reject)


def test_waits_are_late_and_sends_by_turns(group: None) -> None:
    module = graph_of(lambda x: attended(x, window(x, 0)), 1)
    cut = find_cut(module.graph, asked=False)
    assert not isinstance(cut, Reject)
    woven = apart(module, Parts(module.graph, cut.symbol), cut)
    in_turn(woven.graph)
    woven.graph.lint()
    kinds = {"all_reduce": "send", "wait_tensor": "wait", "scaled_dot_product_attention": "read"}
    order = [
        (kinds[n.target._opname], n.meta[PART])
        for n in woven.graph.nodes
        if getattr(n.target, "_opname", "") in kinds
    ]
    assert order == [
        *(("send", 0), ("send", 1)),
        *(("wait", 0), ("read", 0), ("send", 0)),
        *(("wait", 1), ("read", 1), ("send", 1)),
        *(("wait", 0), ("wait", 1)),
    ]
    assert sum(map(is_collective, woven.graph.nodes)) == 4
    with torch.no_grad():
        x = torch.randn(1, 71, 8)
        assert torch.allclose(woven(x)[0], attended(x, window(x, 0)), atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [(1024, (512, 512)), (1152, (640, 512)), (100, (50, 50))],
)
def test_the_cut_is_where_waves_are_full(tokens: int, sizes: tuple[int, int], group: None) -> None:
    """By hand for 8192 columns on 132 cores: 4 = 2 + 2 waves, 5 = 3 + 2, and a part of a tile."""
    weight = torch.randn(8192, 8)
    module = graph_of(lambda x: F.linear(x, weight)[..., :8], 1, tokens)
    cut = find_cut(module.graph, asked=False)
    assert not isinstance(cut, Reject)
    chosen = choose_cut(module.graph, cut, 2, load_target("h100"), None)
    assert chosen.cut.sizes(tokens) == sizes
    assert f"tokens {sizes[0]} + {sizes[1]}; 8192 columns take" in chosen.said
    assert chosen.wins is None
    assert "config does not say its shape" in chosen.told


def test_a_gpus_cut_is_that_of_its_fastest_schedule(group: None) -> None:
    """Llama-3.3-70B's shape: a prefill that gains is cut there; one of too few tokens is not."""
    for tokens, wins in ((4096, True), (100, False)):
        module = graph_of(torch.relu, 1, tokens)
        cut = find_cut(module.graph, asked=False)
        assert not isinstance(cut, Reject)
        chosen = choose_cut(module.graph, cut, 8, load_target("h100"), LLAMA)
        assert chosen.wins is wins
        schedule = choose_schedule(LLAMA, tokens, 8, "h100")["weave"]
        assert str(schedule) in chosen.told
        if wins:
            assert chosen.cut.sizes(tokens) == schedule.split
