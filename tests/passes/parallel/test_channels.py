"""What reads the heads, channels or vocabulary of other ranks is an error when it is compiled.

All readers are branches of one model, captured once for each number of ranks.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from ridgeline.ir.capture import capture
from ridgeline.ir.normalize import normalize
from ridgeline.passes.compiler import OptimizeError
from ridgeline.passes.parallel import Unparallel, plan_parallel
from ridgeline.passes.parallel.channels import follow
from ridgeline.passes.parallel.collectives import normal_form
from ridgeline.passes.parallel.compiler import ParallelCompiler
from ridgeline.passes.parallel.layouts import LayoutError, Part, propagate
from ridgeline.passes.parallel.shard import shard, split_parameters
from ridgeline.passes.parallel.shares import sees
from ridgeline.passes.parallel.usable import refuse_whole

HEADS, SIZE, WIDTH, HIDDEN, BATCH, LENGTH = 8, 6, 24, 80, 2, 5
"""8 query and 4 key-value heads of 6 channels, hidden states of 24, an MLP of 80 channels."""


class Values(NamedTuple):
    """What readers read: hidden states x [B, T, E]; queries, keys and values [B, H, T, D]; weights
    of attention [B, H, T, T]; its result y [B, T, H D]; channels h [B, T, I] of the MLP; `few`, the
    keys before they are repeated, and a cache of them [B, KV, S, D]."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    y: Tensor
    h: Tensor
    few: Tensor
    cache: Tensor


class Model(nn.Module):
    """Its result has one output for each reader, behind the row-parallel layer that is named."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = nn.Module(), nn.Module()
        self.attention.head_dim = SIZE
        for name, heads in {"q": HEADS, "k": HEADS // 2, "v": HEADS // 2}.items():
            setattr(self.attention, f"{name}_proj", nn.Linear(WIDTH, heads * SIZE))
        self.attention.o_proj = nn.Linear(HEADS * SIZE, WIDTH)
        self.mlp.up_proj, self.mlp.down_proj = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.embed = nn.Embedding(11, WIDTH)
        self.register_buffer("slopes", torch.rand(HEADS))
        self.register_buffer("scale", torch.rand(HIDDEN))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        own: Any = self.attention
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, SIZE).transpose(1, 2)
            for layer in (own.q_proj, own.k_proj, own.v_proj)
        )
        few, k, v = k, repeated(k), repeated(v)
        w = (q @ k.transpose(-1, -2) / SIZE**0.5).softmax(-1)
        given = Values(x, q, k, v, w, merged(w @ v), self.mlp.up_proj(x), few, cache)
        outputs = []
        for row, readers in ((own.o_proj, HEAD_READERS), (self.mlp.down_proj, CHANNEL_READERS)):
            outputs += [row(read(self, given)) for read in readers.values()]
        return (*outputs, *(read(self, given) for read in WEIGHT_READERS.values()))


def merged(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def repeated(k: Tensor) -> Tensor:
    b, heads, length, size = k.shape
    k = k[:, :, None].expand(b, heads, 2, length, size)
    return k.reshape(b, heads * 2, length, size)


def rotated(q: Tensor) -> Tensor:
    angles = torch.arange(q.shape[2])[:, None] * torch.rand(SIZE)
    turned = torch.cat((-q[..., SIZE // 2 :], q[..., : SIZE // 2]), -1)
    return q * angles.cos() + turned * angles.sin()


def flat_batches(g: Values) -> Tensor:
    b, heads, length, size = g.v.shape
    y = torch.bmm(g.w.reshape(b * heads, length, length), g.v.reshape(b * heads, length, size))
    return merged(y.view(b, heads, length, size))


def with_cache(g: Values, cache: Tensor) -> Tensor:
    """Keys and values of earlier tokens, kept by this rank for its heads."""
    keys = torch.cat((cache, g.few), 2)
    return merged(F.scaled_dot_product_attention(g.q, keys, keys, enable_gqa=True))


def static_cache(g: Values) -> Tensor:
    keys = g.cache.clone().index_copy(2, torch.arange(3), g.few[:, :, :3])
    return merged(F.scaled_dot_product_attention(g.q, repeated(keys), repeated(keys)))


def put_in_groups(g: Values) -> Tensor:
    """Keys repeated group by group, where the queries are repeated head by head."""
    b, heads, length, size = g.few.shape
    keys = torch.zeros_like(g.q)
    few = g.few[:, None].expand(b, 2, heads, length, size)
    keys[:, :, torch.arange(length)] = few.reshape(b, 2 * heads, length, size)
    return merged(g.q * keys)


def put(g: Values) -> Tensor:
    keys = torch.zeros_like(g.q)
    keys[:, :, torch.arange(g.q.shape[2])] = g.k
    return merged(g.q * keys[..., 1:2])


def written(g: Values) -> Tensor:
    """Its first head is seen before the heads are there."""
    keys = torch.zeros(g.q.shape)
    first = keys[:, 0]
    keys.copy_(g.q)
    return merged(g.v * first[:, None])


def slopes(count: int) -> Tensor:
    made = torch.zeros(count)
    made[1:] = 2.0 ** -torch.arange(1, count)
    return made[:, None, None]


Readers = dict[str, Callable[[Any, Values], Tensor]]
WRONG_OF_HEADS: Readers = {
    "slopes of a buffer": lambda m, g: merged((g.w * m.slopes[: g.w.shape[1], None, None]) @ g.v),
    "slopes by number": lambda m, g: merged(
        (g.w * 2.0 ** -torch.arange(g.w.shape[1])[:, None, None]) @ g.v
    ),
    "slopes written to zeros": lambda m, g: merged((g.w * slopes(g.w.shape[1])) @ g.v),
    "a number for each": lambda m, g: g.y * torch.rand(g.y.numel()).view_as(g.y),
    "put in another order": lambda m, g: put_in_groups(g),
    "seen before it was written": lambda m, g: written(g),
    "half of the bits": lambda m, g: merged(g.q.view(torch.int16).view(torch.float32)),
    "dropout": lambda m, g: merged(F.scaled_dot_product_attention(g.q, g.k, g.v, dropout_p=0.1)),
    "softmax": lambda m, g: merged(g.w.softmax(1) @ g.v),
    "mean": lambda m, g: merged((g.w - g.w.mean(1, keepdim=True)) @ g.v),
    "mean of heads and channels": lambda m, g: merged(g.q - g.q.mean((1, -1), keepdim=True)),
    "largest": lambda m, g: merged((g.w / g.w.amax(1, keepdim=True)) @ g.v),
    "roll": lambda m, g: merged(g.w.roll(1, 1) @ g.v),
    "flip": lambda m, g: merged(g.w @ g.v.flip(1)),
    "first head": lambda m, g: merged(g.q * g.k[:, :1]),
    "heads in another order": lambda m, g: merged(
        g.q * g.k.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    ),
    "heads inside": lambda m, g: (
        g.y.view(*g.y.shape[:2], SIZE, -1).transpose(-1, -2).reshape(g.y.shape)
    ),
    "norm of all heads": lambda m, g: g.y * g.y.pow(2).mean(-1, keepdim=True).rsqrt(),
    "cumsum": lambda m, g: g.y.cumsum(-1),
    "sort": lambda m, g: g.y.sort(-1).values,
    "every head with every other": lambda m, g: merged(
        torch.einsum("bhqd,bgqd->bhg", g.q, g.k).sum(2)[:, :, None, None] * g.v
    ),
    "talking heads": lambda m, g: merged(
        torch.einsum("bhqk,hg->bgqk", g.w, m.slopes[: g.w.shape[1], None].expand(-1, g.w.shape[1]))
        @ g.v
    ),
}
RIGHT_OF_HEADS: Readers = {
    "attention": lambda m, g: g.y,
    "sdpa": lambda m, g: merged(F.scaled_dot_product_attention(g.q, g.k, g.v, is_causal=True)),
    "rotary": lambda m, g: merged((rotated(g.q) @ rotated(g.k).mT).softmax(-1) @ g.v),
    "rotary in pairs": lambda m, g: merged(
        g.w @ repeated(torch.stack((-g.few[..., 1::2], g.few[..., ::2]), -1).flatten(-2))
    ),
    "norm of each head": lambda m, g: merged(F.rms_norm(g.q, (SIZE,), torch.rand(SIZE))),
    "mask": lambda m, g: merged(
        g.w.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool().expand_as(g.w), 0.0) @ g.v
    ),
    "scale of a token": lambda m, g: g.y * g.x.mean(-1, True).expand_as(g.y),
    "put": lambda m, g: put(g),
    "copied to zeros": lambda m, g: merged(torch.zeros(g.q.shape).copy_(g.q)[..., :1] * g.q),
    "pairs left open": lambda m, g: merged(
        g.q.reshape(*g.q.shape[:-1], -1, 2).cumsum(-1).flatten(-2)
    ),
    "bits": lambda m, g: merged(g.q.view(torch.int32).abs().view(torch.float32)),
    "gate": lambda m, g: g.y * m.attention.q_proj(g.x).sigmoid(),
    "einsum": lambda m, g: merged(torch.einsum("bhqk,bhkd->bhqd", g.w, g.v)),
    "flat batches": lambda m, g: flat_batches(g),
    "growing cache": lambda m, g: with_cache(g, g.cache),
    "sliding cache": lambda m, g: with_cache(g, g.cache[:, :, -2:]),
    "static cache": lambda m, g: static_cache(g),
    "groups of queries": lambda m, g: merged(
        (g.q.unflatten(1, (-1, 2)) * g.few[:, :, None]).flatten(1, 2)
    ),
    "tokens' largest": lambda m, g: merged(g.v.topk(2, 2).values.mean(2, keepdim=True) + g.v),
}
WRONG_OF_CHANNELS: Readers = {
    "buffer": lambda m, g: g.h * m.scale[: g.h.shape[-1]],
    "softmax": lambda m, g: g.h.softmax(-1),
    "mean": lambda m, g: g.h * (g.h > g.h.mean(-1, keepdim=True)),
    "standard deviation": lambda m, g: F.relu(g.h - g.h.std(-1, keepdim=True)),
    "norm": lambda m, g: F.rms_norm(g.h, g.h.shape[-1:]),
    "unit vectors": lambda m, g: F.normalize(g.h, dim=-1),
    "in rows of all tokens": lambda m, g: g.h * g.h.flatten(0, 1).mean(1).view(BATCH, LENGTH, 1),
    "halves": lambda m, g: torch.cat([g.h.chunk(2, -1)[0] * g.h.chunk(2, -1)[1].sigmoid()] * 2, -1),
    "largest of all": lambda m, g: g.h / g.h.abs().max(),
    "few": lambda m, g: g.h * (g.h >= g.h.topk(6, -1).values[..., -1:]),
    "any": lambda m, g: g.h * (g.h > 0).any(-1, keepdim=True),
    "softmax of groups": lambda m, g: g.h.view(*g.h.shape[:2], -1, 4).softmax(-2).flatten(-2),
    "transposed": lambda m, g: g.h.transpose(-1, -2).softmax(-2).transpose(-1, -2),
    "norm by einsum": lambda m, g: g.h / torch.einsum("bni,bni->bn", g.h, g.h)[..., None],
    "gram matrix": lambda m, g: g.h @ g.h.transpose(-1, -2) @ g.h,
    "shift": lambda m, g: F.pad(g.h, (1, 0))[..., :-1],
    "roll": lambda m, g: g.h - torch.roll(g.h, 1, -1),
    "convolution": lambda m, g: F.conv1d(
        g.h.flatten(0, 1)[:, None], torch.ones(1, 1, 3), padding=1
    )[:, 0].view(g.h.shape),
    "fourier": lambda m, g: torch.fft.rfft(g.h).abs().sum(-1, keepdim=True) + g.h,
    "one channel": lambda m, g: g.h * g.h[..., :1],
    "a channel of a number": lambda m, g: g.h * g.h.select(-1, 0)[..., None],
    "gathered": lambda m, g: g.h.gather(-1, g.h.argsort(-1)),
}
RIGHT_OF_CHANNELS: Readers = {
    "gelu": lambda m, g: F.gelu(g.h),
    "hardswish": lambda m, g: F.hardswish(g.h) + F.logsigmoid(g.h),
    "copied to new memory": lambda m, g: torch.empty_like(g.h).copy_(g.h) + g.h,
    "gated": lambda m, g: F.silu(g.h) * m.mlp.up_proj(g.x),
    "of tokens": lambda m, g: F.relu(g.h - g.h.mean(1, keepdim=True)).cumsum(1),
    "filled": lambda m, g: torch.where(g.h > 0, g.h, torch.zeros_like(g.h)),
    "groups": lambda m, g: g.h.view(*g.h.shape[:2], -1, 4).softmax(-1).flatten(-2),
    "flat tokens": lambda m, g: F.gelu(g.h.flatten(0, 1)).view(g.h.shape),
    "all channels": lambda m, g: g.h[..., :1000].square(),
    "scale of a token": lambda m, g: g.h * g.x.norm(dim=-1, keepdim=True),
    "in a row": lambda m, g: F.gelu(m.mlp.up_proj(m.mlp.down_proj(g.h))),
}
HEAD_READERS = {f"wrong {k}": v for k, v in WRONG_OF_HEADS.items()} | RIGHT_OF_HEADS
CHANNEL_READERS = {f"wrong {k}": v for k, v in WRONG_OF_CHANNELS.items()} | RIGHT_OF_CHANNELS
WEIGHT_READERS: Readers = {
    "of the embedding": lambda m, g: g.x + m.embed.weight.mean(0),
    "of the queries": lambda m, g: g.x + m.attention.q_proj.weight.mean(0),
    "rows of the queries": lambda m, g: g.x + m.attention.q_proj.weight[0],
    "of the output": lambda m, g: g.x + m.mlp.down_proj.weight.abs().amax(1),
    "of biases": lambda m, g: g.x * m.mlp.up_proj.bias.sum(),
}
PLACES = [
    *(("heads", name) for name in HEAD_READERS),
    *(("channels", name) for name in CHANNEL_READERS),
    *(("weights", f"wrong {name}") for name in WEIGHT_READERS),
]
Captured = tuple[fx.GraphModule, dict[str, Part]]


@pytest.fixture(scope="module", params=[(2, False), (4, False), (2, True), (4, True)])
def captured(request: pytest.FixtureRequest) -> Iterator[Captured]:
    """The graph of rank 0 of 2, and of 4 with one key-value head each; also of
    free sizes. Collectives do nothing."""
    world, dynamic = request.param
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    model = Model().eval()
    plan = plan_parallel(model, world)
    part = shard(model, plan, 0, dist.group.WORLD.group_name)
    inputs = torch.rand(BATCH, LENGTH, WIDTH), torch.rand(BATCH, HEADS // 2 // world, 7, SIZE)
    with torch.no_grad():
        module = normalize(capture(part, inputs, dynamic=dynamic).program.module)
    normal_form(module)
    yield module, split_parameters(plan, model)
    dist.destroy_process_group()


def written_by(node: fx.Node) -> fx.Node | None:
    """The memory that the operation writes, by its first name."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    into = node.args[0]
    while into.op == "call_function" and sees(into):
        into = into.args[0]
    return into


def branch(captured: Captured, kind: str, name: str) -> fx.Graph:
    """The graph of one output alone."""
    whole, graph = captured[0].graph, fx.Graph()
    result = whole.output_node().args[0][PLACES.index((kind, name))]
    needed, copies, count = {result}, {}, 0
    while count < len(needed):  # what is written to, after it was read, is found last
        count = len(needed)
        for node in reversed(whole.nodes):
            if node in needed or written_by(node) in needed:
                needed.update((node, *node.all_input_nodes))
    for node in whole.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output((copies[result],))
    return graph


@pytest.mark.parametrize(("kind", "name"), [p for p in PLACES if p[1].startswith("wrong")])
def test_what_reads_other_ranks_parts_is_an_error(captured: Captured, kind: str, name: str) -> None:
    with pytest.raises(LayoutError, match=r"at .*test_channels.py:\d+ .*whole=\['"):
        follow(branch(captured, kind, name), captured[1])


@pytest.mark.parametrize(("kind", "name"), [p for p in PLACES if not p[1].startswith("wrong")])
def test_what_each_index_computes_by_itself_is_none(
    captured: Captured, kind: str, name: str
) -> None:
    graph = branch(captured, kind, name)
    propagate(graph, captured[1])
    assert follow(graph, captured[1])


def test_a_layer_is_kept_whole() -> None:
    model = Model()
    plan = plan_parallel(model, 2, whole=["ml*", "embed"])
    assert [split.path for split in plan.splits] == ["attention"]
    assert dict(plan.refused)["mlp"] == "as was asked for"
    assert "embed is to be on every rank" in dict(plan.refused)["embed"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("whole", "said"),
    [
        *((["mpl"], "'mpl', which none .* near it: mlp"), ("ml*", r"pass whole=\['ml\*'\]")),
        *((["mlp.up_proj"], "'mlp.up_proj', .* near it: mlp"), (["mlp.*"], "near it: mlp")),
        *((["embed", 3], "found 3"), (None, "expected a list of names, found None")),
    ],
)
def test_what_is_kept_whole_has_a_name(world: int, whole: Any, said: str) -> None:
    with pytest.raises(Unparallel, match=said):
        plan_parallel(Model(), world, whole=whole)
    with pytest.raises(OptimizeError, match="no whole with split=False"):
        refuse_whole(whole)


def test_a_graph_that_was_refreshed_meanwhile_fits_no_call() -> None:
    compiler: Any = object.__new__(ParallelCompiler)
    compiler._accepts, compiler.meeting = {}, SimpleNamespace(meet=lambda *given: given[-1])
    graph = SimpleNamespace(captured=SimpleNamespace(program=object()))
    assert not compiler.meet("", SimpleNamespace(flat=()), list)(graph)


class OneHead(nn.Module):
    """Channels of this rank's only head, seen in a shape of four dimensions, one of them open."""

    def __init__(self, *last: int) -> None:
        super().__init__()
        self.proj, self.last = nn.Linear(WIDTH, SIZE, bias=False), last

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).reshape(*x.shape[:2], *self.last)


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_open_dimension_of_one_may_be_more_in_one_process(dynamic: bool) -> None:
    x, graphs = torch.rand(BATCH, LENGTH, WIDTH), []
    for last in ((SIZE, -1), (-1, SIZE)):
        program = capture(OneHead(*last), (x,), dynamic=dynamic).program
        graphs.append(normalize(program.module).graph)
    name = next(n.target for n in graphs[0].nodes if n.op == "get_attr")
    parts = {str(name): Part("column", 0, frozenset({SIZE}), 1, "attention")}
    with pytest.raises(LayoutError, match="whose sizes may be others in one process"):
        follow(graphs[0], parts)
    assert follow(graphs[1], parts)
