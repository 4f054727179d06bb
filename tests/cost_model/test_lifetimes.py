"""Live bytes by step: by hand, and against what torch allocates on this CPU."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.profiler import ProfilerActivity, profile

from ridgeline.cost_model import Lifetimes, Replaced, load_target
from ridgeline.cost_model.values import Values
from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize

FP32, BF16 = torch.float32, torch.bfloat16
BATCH, HEADS, LENGTH, SIZE = 2, 4, 256, 32
SCORES = BATCH * HEADS * LENGTH * LENGTH


class _Call(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *operands: torch.Tensor) -> torch.Tensor:
        return self.function(*operands)


class _Gated(nn.Module):
    """Two layers of a gated MLP around a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(*s) for s in ((64, 256), (64, 256), (256, 64)))
        self.norm = nn.RMSNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            y = self.norm(x)
            x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return x


def raw(q, k, v, mask):
    return torch.softmax(q @ k.transpose(-1, -2) * 0.125 + mask, -1) @ v


def upcast(q, k, v, mask):
    scores = q @ k.transpose(-1, -2) * 0.125 + mask
    return torch.softmax(scores, -1, dtype=FP32).to(q.dtype) @ v


def narrow_values(q, k, v, mask):
    """Of which torch's CPU has no kernel that stores no scores."""
    return F.scaled_dot_product_attention(q, k, v[..., :16], mask)


def fused(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask)


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(BATCH, HEADS, LENGTH, SIZE)] * 3 + [(BATCH, 1, LENGTH, LENGTH)]
    return tuple(torch.randn(shape, generator=draw).to(dtype) for shape in shapes)


@torch.no_grad()
def lifetimes(model: nn.Module, *args: torch.Tensor) -> Lifetimes:
    return Lifetimes(normalize(capture(model.eval(), args).program.module).graph)


@torch.no_grad()
def allocated(model: nn.Module, *args: torch.Tensor) -> int:
    """The most bytes that torch has allocated at once in a call of the compiled model."""
    compiled = torch.compile(model, dynamic=False)
    compiled(*args)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        compiled(*args)
    results = seen.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("function", [raw, upcast, narrow_values])
def test_the_peak_of_attention_is_what_torch_allocates(function, dtype):
    model, args = _Call(function), operands(dtype)
    predicted = lifetimes(model, *args).live_bytes(load_target("cpu")).max()
    assert predicted > SCORES * 4  # of which there are any
    assert predicted == pytest.approx(allocated(model, *args), rel=0.05)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.slow
def test_the_peak_of_a_gated_mlp_is_about_what_torch_allocates():
    model, x = _Gated(), torch.randn(8, 128, 64)
    predicted = lifetimes(model, x).live_bytes(load_target("cpu")).max()
    rows = 8 * 128 * 4
    assert predicted == rows * (2 * 256 + 2 * 64)  # gate, up, the normalised and the sum
    assert predicted == pytest.approx(allocated(model, x), rel=0.2)


def test_a_step_by_hand():
    """Views and casts of inputs are nobody's; a value lives to its last reader."""

    def function(x, w):
        a = x @ w  # 24 floats
        b = torch.relu(a.reshape(4, 6) + 1.0)  # one kernel, which takes the place of `a`
        c = b @ b.transpose(0, 1)  # 16, beside 24
        return c, c.sum()  # 16 and 1

    found = lifetimes(_Call(function), torch.randn(4, 5), torch.randn(5, 6))
    live = found.live_bytes(load_target("a100"))
    by_name = dict(zip((n.name for n in found.nodes), live, strict=True))
    assert by_name["matmul"] == by_name["relu"] == 4 * 24
    assert by_name["matmul_1"] == 4 * (24 + 16)
    assert by_name["output"] == 4 * 17


def test_parts_and_writes_in_place_are_of_the_value_they_are_of():
    def function(x, w):
        a, b = (x @ w).chunk(2, -1)  # one value of 24 floats, two views
        c = a @ b.transpose(0, 1)  # 16 beside it
        c.add_(1.0)
        return c @ x  # 20 beside `c`

    found = lifetimes(_Call(function), torch.randn(4, 5), torch.randn(5, 6))
    live = dict(zip(found.nodes, found.live_bytes(load_target("a100")), strict=True))
    by_name = {node.name: size for node, size in live.items()}
    assert any(getattr(n.target, "__name__", "") == "getitem" for n in found.nodes)
    assert any(n.name.startswith("add_") for n in found.nodes)
    assert by_name["matmul_1"] == 4 * (24 + 16)
    assert by_name["matmul_2"] == 4 * (16 + 20)


def test_what_a_site_alone_reads_is_freed():
    found = lifetimes(_Call(raw), *operands(FP32))
    target = load_target("h100")
    inner = [n for n in found.nodes if n.op == "call_function"]
    result = 4 * BATCH * HEADS * LENGTH * SIZE
    whole = found.live_bytes(target)
    assert whole.max() == 4 * SCORES + result
    site = Replaced(tuple(inner), (inner[-1],))
    assert found.live_bytes(target, [site]).max() == result
    half = Replaced(tuple(inner[-2:]), (inner[-1],))  # softmax and product: the scores stay
    assert found.live_bytes(target, [half]).max() == 4 * SCORES + result


def test_what_a_site_changes_is_found_in_as_many_steps_however_long_the_program():
    """So that all sites of a program take a time in proportion to it."""
    looked_at = []
    for repeats in (4, 8):

        def function(x, w, repeats=repeats):
            for _ in range(repeats):
                x = x + torch.softmax(x @ x.transpose(-1, -2) + w, -1) @ x
            return x

        found = lifetimes(_Call(function), torch.randn(2, 8, 8), torch.randn(8, 8))
        calls = [n for n in found.nodes if "softmax" in n.name]
        site = Replaced((calls[1],), (calls[1],))
        looked_at.append(len(Values(found.facts, (), (site,), found._values)._here))
    assert looked_at[0] == looked_at[1] < 10


class _Mixed(nn.Module):
    """Views, chains, reductions, writes, casts and results of several readers, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, cache: torch.Tensor):
        kept, mask = [], mask * 2.0 - 1.0
        for i in range(3):
            y = self.norm(x)
            q, k = y.view(2, 8, 4, 4).transpose(1, 2), self.down(y).view(2, 8, 4, 4).transpose(1, 2)
            scores = torch.softmax((q @ k.transpose(-1, -2) + mask).to(BF16), -1).to(FP32)
            z = (scores @ k).transpose(1, 2).reshape(2, 8, 16)
            grown = torch.cat([cache, k], 2)
            k = k + F.scaled_dot_product_attention(q, grown, grown[..., :2]).sum(-1, keepdim=True)
            x = x + self.down(z) * z.sum(-1, keepdim=True).tanh() + k.transpose(1, 2).flatten(2)
            kept += [grown] if i else []
        return x, *kept


def _sites(nodes: list[fx.Node], draw: random.Random) -> list[Replaced]:
    """Of some calls, each with some of those that it reads."""
    found, taken = list[Replaced](), set[fx.Node]()
    for _ in range(draw.randint(1, 5)):
        site, stack = set[fx.Node](), [draw.choice(nodes)]
        while stack and len(site) < 6:
            node = stack.pop()
            site.add(node)
            read = [n for n in node.all_input_nodes if n.op == "call_function"]
            stack += draw.sample(read, draw.randint(0, len(read)))
        if taken.isdisjoint(site):
            taken |= site
            ordered = tuple(n for n in nodes if n in site)
            outs = tuple(n for n in ordered if not site.issuperset(n.users))
            found.append(Replaced(ordered, outs))
    return found


@pytest.mark.parametrize("target", ["h100", "cpu"])
def test_what_sites_change_is_found_around_them(target):
    """As without looking there alone."""
    machine, draw = load_target(target), random.Random(0)
    args = torch.randn(2, 8, 16), torch.randn(8, 8), torch.randn(2, 4, 3, 4)
    graph = lifetimes(_Mixed(), *args).graph
    caches = [n for n in graph.nodes if n.op == "call_function" and "cat" in str(n.target)]
    found = Lifetimes(graph, caches[1:])
    calls = [n for n in graph.nodes if n.op == "call_function"]
    changed = 0
    for _ in range(300):
        sites = _sites(calls, draw)
        whole = Lifetimes(graph, caches[1:])
        whole._values = Values(whole.facts, whole.elsewhere, sites)
        expected = whole.live_bytes(machine)
        assert (found.live_bytes(machine, sites) == expected).all()
        changed += (expected != found.live_bytes(machine)).any()
    assert changed > 200


@pytest.mark.parametrize(
    ("target", "function", "dtype", "stored"),
    [
        ("a100", fused, FP32, 0),
        ("a100", fused, BF16, 0),
        ("a100", fused, torch.float64, 2 * 8),
        ("cpu", fused, BF16, 0),
        ("cpu", fused, torch.float64, 0),
        ("cpu", narrow_values, BF16, 2 * 4),
        ("v100", fused, torch.float16, 0),
    ],
)
def test_where_torch_stores_scores(target, function, dtype, stored):
    args = operands(dtype)
    live = lifetimes(_Call(function), *args).live_bytes(load_target(target)).max()
    values = args[2].shape[-1] // (2 if function is narrow_values else 1)
    assert live == stored * SCORES + dtype.itemsize * BATCH * HEADS * LENGTH * values


@pytest.mark.parametrize(
    ("target", "masked"),
    [("a100", True), ("a100", False), ("h100", True), ("b200", True), ("cpu", True)],
)
def test_grouped_heads_with_a_mask_store_scores_on_gpus_before_hopper(target, masked):
    """Flash attention takes no mask there, and the other kernel no groups; cuDNN takes both."""

    def grouped(q, k, v, mask):
        mask = mask if masked else None
        return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], mask, enable_gqa=True)

    live = lifetimes(_Call(grouped), *operands(BF16)).live_bytes(load_target(target)).max()
    result, repeated = BATCH * HEADS * LENGTH * SIZE, 4 * 2 * BATCH * HEADS * LENGTH * SIZE
    stored = masked and target == "a100"
    assert live == 2 * result + (8 * SCORES + repeated if stored else 0)


@pytest.mark.parametrize("rank", [2, 3])
def test_attention_without_batch_or_heads_stores_one_heads_scores(rank):
    rows = torch.zeros((LENGTH, SIZE) if rank == 2 else (BATCH, LENGTH, SIZE))
    found = lifetimes(_Call(F.scaled_dot_product_attention), rows, rows, rows)
    batch = 1 if rank == 2 else BATCH
    live = found.live_bytes(load_target("a100")).max()
    assert live == 4 * batch * LENGTH * (2 * LENGTH + SIZE)


def test_a_long_chain_is_one_kernel():
    """Beyond what Python's stack holds."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = torch.zeros(8, device="meta")
    for _ in range(3000):
        node = graph.call_function(torch.ops.aten.sin.default, (node,))
        node.meta["val"] = torch.zeros(8, device="meta")
    graph.output((node,))
    live = Lifetimes(graph).live_bytes(load_target("a100"))
    assert list(live) == [0.0] * 3000 + [32.0, 32.0]


def test_sizes_beyond_64_bits():
    """The largest that can be asked about; what follows them is exact all the same."""
    graph = fx.Graph()
    node, small = graph.placeholder("x"), torch.zeros(3, device="meta")
    node.meta["val"] = small
    large = torch.zeros((), device="meta").expand(2**20, 2**15, 2**24)
    for target, value in ((torch.ops.aten.mm, large), (torch.ops.aten.bmm, large)):
        node = graph.call_function(target.default, (node, node))
        node.meta["val"] = value
    for _ in range(2):
        node = graph.call_function(torch.ops.aten.mm.default, (node, node))
        node.meta["val"] = small
    graph.output((node,))
    live = Lifetimes(graph).live_bytes(load_target("a100"))
    one = 4 * 2**59
    assert list(live) == [0, one, 2 * one, one + 12, 24, 12]
