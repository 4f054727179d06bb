"""Seconds of a tensor-parallel transformer's prefill by every schedule of its communication.

Law. L layers, each attention (qkv, rotary, attention, o) and MLP (gate and up, activation, down) of
1/p of the heads and channels, with an all-reduce, a residual and a norm after either:

    in turn     L · (A(T) + M(T) + 2 R(T))           R: one way of `all_reduce` on [T, hidden]
    weave       L · sum of four stages, of tokens T = T0 + T1, each a kernel of computation beside
                one of communication on c thread blocks:  A0 | R1,  A1 | R0,  M0 | R1,  M1 | R0
    stage       C where C >= W',  else  C + (1 - C / W') W
                W: all cores;  W' = (1 + interference) · W on the cores that c blocks leave

A, M and W are `predict`'s kernels, which count waves of tiles, so a split that needs a wave more,
or blocks of communication that push a tile into one, cost what they cost; T0 is T/2 rounded up to
128, plus 0, 128 or 256. Attention of T1 reads T0's keys. Experts (MoE): each of E gets its mean
share of the tokens, so halves read all of the weights twice. launch="eager": a kernel starts a
launch call later, a layer's call takes its host time at least, and the woven layer two of them.

Constants (`FITTED`): factors on predicted GEMM, expert and attention times in a serving engine with
locked clocks; of all-reduce wire time inside a model; interference; the host's time of an MoE
layer. Fitted to Llama-3.3-70B on 8 H100 at 2048, 16384 and 32768 tokens and Mixtral-8x22B at 2048
and 16384 (TokenWeave's published prefill times); everything else is prediction. Left out:
embedding, logits of one token, sampling; imbalance of experts; overlap of GEMMs with collectives.
Source: TokenWeave (Gond et al., arXiv:2505.11329), section 3.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from ridgeline.cost_model import all_reduce
from ridgeline.cost_model.all_reduce import FUSED, InvalidSite, Links, links_of, refusals
from ridgeline.cost_model.predict import predict
from ridgeline.cost_model.target import Target
from ridgeline.ir.errors import RidgelineError

OFFSETS = (0, 128, 256)
WEAVE_BLOCKS = (2, 4, 8, 16)
LEAST_HALF = 128
"""Tokens of a half below which no tile is full."""
ATTENTION_LAUNCHES, MLP_LAUNCHES = 5, 3
"""Kernels: qkv, rotary, cache, attention, o; gate-up, activation, down."""
DENSE_LAUNCHES = ATTENTION_LAUNCHES + MLP_LAUNCHES + 4
"""With all-reduce and norm, twice."""
LAUNCH_S = 2.3e-6
"""What a kernel launched by a call of its own starts later than in a graph: the launch call, as in
the files of targets."""
MARGIN = 1.01
"""A weave must be predicted faster by this: what the split's own errors, which don't cancel, are
likely to be worth."""


LIBRARY = "fp16"
"""Of 16-bit products: in fp16 the laws were measured in serving engines' traces, with libraries of
TokenWeave's time, whose tiles on Hopper have a few widths only."""


class InvalidStack(RidgelineError):
    """Sizes that no transformer has, or that do not divide over the ranks."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A decoder's shape. intermediate: of the MLP, or of one expert; experts: 0 for a dense MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts: int = 0
    experts_per_token: int = 0


@dataclass(frozen=True, slots=True)
class Constants:
    """gemm, expert, attention: factors on `predict`; wire: on the time on the link; interference:
    of communication with computation beside it; moe_host_us: one MoE layer's launches."""

    gemm: float
    expert: float
    attention: float
    wire: float
    interference: float
    moe_host_us: float


FITTED = Constants(
    gemm=1.25,
    expert=1.63,
    attention=0.857,
    wire=0.858,
    interference=0.17,
    moe_host_us=624.0,
)


def stack_of(config: Any) -> Stack:
    """The shape in a Hugging Face configuration (Llama, Qwen, Mistral, Mixtral, Qwen-MoE, Gemma).

    Raises InvalidStack where a size is missing.
    """
    text = getattr(config, "text_config", None) or config

    def size(*names: str, default: int | None = None) -> int:
        for name in names:
            value = getattr(text, name, None)
            if isinstance(value, int) and value > 0:
                return value
        if default is None:
            raise InvalidStack(
                f"expected {' or '.join(names)} in {type(text).__name__}, found none"
            )
        return default

    hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    experts = size("num_local_experts", "num_experts", default=0) if _routed(text) else 0
    mlp = ("moe_intermediate_size", "intermediate_size") if experts else ("intermediate_size",)
    return Stack(
        size("num_hidden_layers", "n_layer"),
        hidden,
        heads,
        size("num_key_value_heads", default=heads),
        size("head_dim", default=hidden // heads),
        size(*mlp, default=4 * hidden),
        experts,
        size("num_experts_per_tok", default=0) if experts else 0,
    )


def _routed(text: Any) -> bool:
    return any(getattr(text, name, None) for name in ("num_local_experts", "num_experts"))


@dataclass(frozen=True, slots=True)
class Schedule:
    """One alternative: seconds of the whole prefill, or None and the reason.

    blocks: thread blocks of the fused kernels (two numbers in a weave: beside attention, beside
    the MLP); split: tokens of the halves of a weave; waves: of the gate and up product on 128 x 128
    tiles, whole on all cores, and of the halves on those that the blocks leave.
    """

    name: str
    seconds: float | None
    reason: str = ""
    blocks: tuple[int, ...] = ()
    split: tuple[int, ...] = ()
    waves: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.name}: not here: {self.reason}"
        parts = [f"{self.name}: {self.seconds * 1e3:.1f} ms"]
        if self.split:
            parts.append(f"tokens {' + '.join(map(str, self.split))}")
        if self.waves:
            parts.append(f"waves {self.waves[0]} as {' + '.join(map(str, self.waves[1:]))}")
        if self.blocks:
            parts.append(f"thread blocks {', '.join(map(str, self.blocks))}")
        return ", ".join(parts) + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True, slots=True)
class ScheduleChoice:
    """chosen: a name in `schedules`, which hold every alternative; bound: seconds without any
    communication, which no schedule of this model computes the same result in."""

    chosen: str
    schedules: tuple[Schedule, ...]
    bound: float

    def __getitem__(self, name: str) -> Schedule:
        return next(schedule for schedule in self.schedules if schedule.name == name)

    def gain(self, over: str) -> float:
        """Seconds of the schedule `over` per second of the one chosen."""
        base, best = self[over].seconds, self[self.chosen].seconds
        if base is None or best is None:
            raise InvalidSite(f"{over} has no time here: {self[over].reason}")
        return base / best

    def __str__(self) -> str:
        return f"{self.chosen}\n" + "\n".join(f"  {schedule}" for schedule in self.schedules)


def waves(tokens: int, columns: int, cores: int, tile: int = 128) -> int:
    """Rounds in which `cores` finish the tiles of a [tokens, columns] product."""
    return ceil(ceil(tokens / tile) * ceil(columns / tile) / cores)


def wave_split(tokens: int, columns: int, cores: int, tile: int = 128) -> tuple[int, int]:
    """The sizes of two parts whose waves are fewest in sum, the most even of those, the first the
    larger: of the halves and of multiples of a tile around the middle. (1, 0) of one token."""
    half = ceil(tokens / (2 * tile)) * tile
    firsts = {half + k * tile for k in (-1, 0, 1, 2)} | {ceil(tokens / 2)}
    splits = [(a, tokens - a) for a in sorted(firsts) if 0 < a < tokens] or [(tokens, 0)]

    def cost(split: tuple[int, int]) -> tuple[int, int, int]:
        rounds = sum(waves(n, columns, cores, tile) for n in split)
        return rounds, abs(split[0] - split[1]), split[1]

    return min(splits, key=cost)


def choose_schedule(
    stack: Stack,
    tokens: int,
    world: int,
    target: str | Target,
    *,
    topology: str | None = None,
    per_node: int = 8,
    launch: str = "graph",
    constants: Constants = FITTED,
) -> ScheduleChoice:
    """The fastest schedule of a prefill of `tokens` tokens of one prompt, with all schedules.

    target: a GPU's name, or its description. Deterministic. Raises InvalidStack, InvalidSite,
    UnknownTarget, InvalidTarget.
    """
    if tokens < 1 or launch not in ("graph", "eager"):
        raise InvalidSite(
            f"expected tokens and launch 'graph' or 'eager'; found {tokens}, {launch!r}"
        )
    _check(stack, world)
    links = links_of(target, world, topology=topology, per_node=per_node)
    # Inside a model the wire takes another share of the time than in a loop of nothing else.
    links = replace(links, bytes_per_s=links.bytes_per_s / constants.wire)
    layer = _Layer(stack, links, constants, launch)
    schedules = (*layer.in_turn(tokens), layer.weave(tokens))
    possible = [s for s in schedules if s.seconds is not None]
    best = min(possible, key=lambda s: (s.seconds or 0.0) * (MARGIN if s.name == "weave" else 1.0))
    return ScheduleChoice(best.name, schedules, layer.bound(tokens))


def _check(stack: Stack, world: int) -> None:
    sizes = (stack.layers, stack.hidden, stack.heads, stack.kv_heads, stack.head_dim)
    if min(*sizes, stack.intermediate) < 1 or stack.heads % stack.kv_heads:
        raise InvalidStack(f"expected positive sizes and whole groups of heads, found {stack}")
    if stack.heads % world or stack.intermediate % world:
        raise InvalidStack(
            f"expected heads and intermediate channels that divide by {world} ranks, found"
            f" {stack.heads} and {stack.intermediate}"
        )
    if bool(stack.experts) != bool(stack.experts_per_token):
        raise InvalidStack(f"expected experts and experts_per_token together, found {stack}")


class _Layer:
    """One layer on one rank."""

    def __init__(self, stack: Stack, links: Links, constants: Constants, launch: str) -> None:
        self.stack, self.links, self.c = stack, links, constants
        self.target, self.world = links.target, links.world
        self.saved = all_reduce.EAGER_S if launch == "graph" else 0.0
        self.added = LAUNCH_S if launch == "eager" else 0.0
        host = DENSE_LAUNCHES * links.target.eager_launch_s
        if stack.experts:
            host = constants.moe_host_us * 1e-6
        self.host = host if launch == "eager" else 0.0
        self.row = stack.hidden * 2

    def gemm(self, m: int, n: int, k: int, reserved: int, batch: int = 1) -> float:
        return predict(
            self.target, "gemm", LIBRARY, reserved=reserved, m=m, n=n, k=k, batch=batch
        ).seconds

    def stream(self, op: str, rows: int, width: int, reserved: int) -> float:
        return predict(self.target, op, "bf16", reserved=reserved, rows=rows, width=width).seconds

    def attention(self, queries: int, keys: int, reserved: int = 0) -> float:
        s, p = self.stack, self.world
        heads, kv_heads = s.heads // p, max(1, s.kv_heads // p)
        products = self.gemm(queries, (heads + 2 * kv_heads) * s.head_dim, s.hidden, reserved)
        products += self.gemm(queries, s.hidden, heads * s.head_dim, reserved)
        shape = {
            "batch": 1, "heads": heads, "kv_heads": kv_heads, "head_dim": s.head_dim,
            "q_len": queries, "kv_len": keys,
        }  # fmt: skip
        scores = predict(self.target, "attn_prefill", "bf16", reserved=reserved, **shape).seconds
        turned = self.stream("rope", queries, (heads + kv_heads) * s.head_dim, reserved)
        launched = ATTENTION_LAUNCHES * self.added
        return self.c.gemm * products + self.c.attention * scores + turned + launched

    def mlp(self, tokens: int, reserved: int = 0) -> float:
        s, width = self.stack, self.stack.intermediate // self.world
        rows, batch, factor = tokens, 1, self.c.gemm
        if s.experts:
            rows, batch = ceil(tokens * s.experts_per_token / s.experts), s.experts
            factor = self.c.expert
        products = self.gemm(rows, 2 * width, s.hidden, reserved, batch)
        products += self.gemm(rows, s.hidden, width, reserved, batch)
        gate = self.stream("silu_mul", tokens * max(1, s.experts_per_token), width, reserved)
        return factor * products + gate + MLP_LAUNCHES * self.added

    def _busy(self, tokens: int) -> float:
        return self.attention(tokens, tokens) + self.mlp(tokens)

    def _norm(self, tokens: int) -> float:
        return all_reduce.norm_seconds(tokens * self.row, self.links.target) - self.saved

    def bound(self, tokens: int) -> float:
        seconds = self._busy(tokens) + 2 * self._norm(tokens)
        return self._schedule("bound", seconds).seconds or 0.0

    def in_turn(self, tokens: int) -> list[Schedule]:
        """A schedule for each way of `all_reduce`, one kernel after the other."""
        refused, links = refusals(self.links, self.stack.hidden), self.links
        size, saved = tokens * self.row, self.saved
        busy, norm = self._busy(tokens), self._norm(tokens)
        plain = {
            "nccl": all_reduce.nccl_seconds(size, links) - saved + norm,
            "multimem_all_reduce": all_reduce.multimem_seconds(size, links) - saved + norm,
            "sequence_parallel": all_reduce.sequence_parallel_seconds(size, links) - 3 * saved,
        }
        out = []
        for name in all_reduce.WAYS:
            if name in refused:
                out.append(Schedule(name, None, refused[name]))
            elif name in FUSED:
                blocks, fused = all_reduce.best_blocks(name, tokens, self.row, links)
                out.append(self._schedule(name, busy + 2 * (fused - saved), blocks=(blocks,)))
            else:
                out.append(self._schedule(name, busy + 2 * plain[name]))
        return out

    def _schedule(self, name: str, seconds: float, calls: int = 1, **fields: Any) -> Schedule:
        return Schedule(name, self.stack.layers * max(seconds, calls * self.host), **fields)

    def weave(self, tokens: int) -> Schedule:
        """The fastest split in two, on the fused kernel that the links allow."""
        refused = refusals(self.links, self.stack.hidden)
        way = next((name for name in ("multimem", "two_shot") if name not in refused), None)
        if way is None:
            return Schedule("weave", None, refused["two_shot"])
        splits = _splits(tokens)
        if not splits:
            least = f"expected {2 * LEAST_HALF} tokens or more to split, found {tokens}"
            return Schedule("weave", None, least)
        fused = functools.cache(
            lambda part, blocks: (
                all_reduce.fused_seconds(way, part, self.row, self.links, blocks) - self.saved
            )
        )
        best: tuple[float, tuple[int, int], tuple[int, int]] | None = None
        for split in splits:
            by_blocks = {}
            for blocks in WEAVE_BLOCKS:
                sent = [fused(part, blocks) for part in split]
                beside = (sent[1], sent[0])  # each half runs beside the other's communication
                keys = (split[0], tokens)
                by_blocks[blocks] = (
                    sum(
                        self._stage(functools.partial(self.attention, q, k), blocks, other)
                        for q, k, other in zip(split, keys, beside, strict=True)
                    ),
                    sum(
                        self._stage(functools.partial(self.mlp, q), blocks, other)
                        for q, other in zip(split, beside, strict=True)
                    ),
                )
            a, m = (min(WEAVE_BLOCKS, key=lambda b: by_blocks[b][i]) for i in (0, 1))
            found = by_blocks[a][0] + by_blocks[m][1], split, (a, m)
            best = found if best is None else min(best, found)
        assert best is not None
        seconds, split, blocks = best
        counted: tuple[int, ...] = ()
        if not self.stack.experts:
            cores, wide = self.links.target.cores, 2 * self.stack.intermediate // self.world
            halves = (waves(part, wide, cores - blocks[1]) for part in split)
            counted = (waves(tokens, wide, cores), *halves)
        return self._schedule("weave", seconds, calls=2, blocks=blocks, split=split, waves=counted)

    def _stage(self, work: Any, blocks: int, communication: float) -> float:
        slowed = (1 + self.c.interference) * work(reserved=blocks)
        if communication >= slowed:
            return communication
        return communication + (1 - communication / slowed) * work()


def _splits(tokens: int) -> Sequence[tuple[int, int]]:
    half = ceil(tokens / 256) * 128
    found = ((half + offset, tokens - half - offset) for offset in OFFSETS)
    return [(a, b) for a, b in found if min(a, b) >= LEAST_HALF]
