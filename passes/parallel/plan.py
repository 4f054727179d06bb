"""Which weights of a transformer are split over W ranks, and how many bytes each rank then holds.

    attention   q, k, v by whole heads (rows of the weight), o by the same heads (columns)
    MLP         gate, up by intermediate channel (rows), down by the same channels (columns)
    embedding   by vocabulary, ceil(V / W) rows a rank, the last rank padded with zeros
    lm_head     as the embedding, with whose weight it may be tied

A query head stays beside the key-value head that it reads: with K >= W key-value heads the ranks
get whole groups, K // W or one more; with K < W each key-value head is held by W / K ranks. Every
other parameter is held by all. Only shapes are read, so a model on the meta device can be planned.

Source: Shoeybi et al., Megatron-LM, 2019 (arXiv:1909.08053), section 3.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ridgeline.ir.errors import RidgelineError

ATTENTION = (("o_proj", ("q_proj", "k_proj", "v_proj")), ("c_proj", ("c_attn",)))
MLP = (
    *(("down_proj", ("gate_proj", "up_proj")), ("down_proj", ("up_proj",))),
    ("c_proj", ("c_fc",)),
)
"""The row-parallel layer and the column-parallel ones before it; the first that is there counts."""
HEAD_NORMS = ("q_norm", "k_norm")


class Unparallel(RidgelineError):
    """A model or a number of ranks for which no split of the weights is known."""


@dataclass(frozen=True, slots=True)
class Split:
    """One module that is split: `spans[r]` is the half-open range of units that rank r holds.

    A unit is a query head (attention), a channel (mlp) or a row (embedding, lm_head);
    `kv_spans` are the ranges of key-value heads, for attention only.
    """

    path: str
    kind: str
    columns: tuple[str, ...]
    row: str
    spans: tuple[tuple[int, int], ...]
    kv_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """What each of `world` ranks holds: the splits, the modules and layers that are held by all,
    with the reason, bytes a rank."""

    world: int
    splits: tuple[Split, ...]
    refused: tuple[tuple[str, str], ...]
    bytes_per_rank: tuple[int, ...]
    bytes_whole: int

    def digest(self) -> str:
        """SHA-256 over the whole plan: equal on two ranks if and only if their plans are."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def __str__(self) -> str:
        kinds = [split.kind for split in self.splits]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        lines = [f"tensor parallel over {self.world} ranks: {counts}"]
        lines += [
            f"  held by all: {path or 'the model'}: {reason}" for path, reason in self.refused
        ]
        lines += [
            f"  rank {rank}: {held / 1e6:,.1f} MB of {self.bytes_whole / 1e6:,.1f} MB"
            for rank, held in enumerate(self.bytes_per_rank)
        ]
        return "\n".join(lines)


def is_linear(module: object) -> bool:
    """An `nn.Linear`, or transformers' Conv1D, whose weight is (in, out)."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def is_embedding(module: Any) -> bool:
    """An `nn.Embedding` that only looks rows up, or Gemma's, which multiplies them by a scale."""
    scaled = type(module).__name__.endswith("TextScaledWordEmbedding")
    return (type(module) is nn.Embedding or scaled) and module.max_norm is None


def out_features(linear: Any) -> int:
    return linear.weight.shape[0 if type(linear) is nn.Linear else 1]


def even_spans(count: int, world: int) -> tuple[tuple[int, int], ...]:
    """`count` units over `world` ranks in order, sizes that differ by one at most."""
    return tuple((count * r // world, count * (r + 1) // world) for r in range(world))


def padded_spans(count: int, world: int) -> tuple[tuple[int, int], ...]:
    """ceil(count / world) units a rank; what passes `count` is padding."""
    size = -(-count // world)
    return tuple((r * size, (r + 1) * size) for r in range(world))


def head_spans(
    heads: int, kv_heads: int, world: int
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """The query heads and the key-value heads of each rank.

    Raises:
        Unparallel: fewer key-value heads than ranks, and no whole number of ranks for each.
    """
    if kv_heads >= world:
        kv, group = even_spans(kv_heads, world), heads // kv_heads
        return tuple((a * group, b * group) for a, b in kv), kv
    if world % kv_heads or heads % world:
        raise Unparallel(
            f"{heads} query and {kv_heads} key-value heads do not divide over {world} ranks; "
            f"use at most {kv_heads} ranks, or a multiple of {kv_heads} that divides {heads}"
        )
    kv = tuple((r * kv_heads // world, r * kv_heads // world + 1) for r in range(world))
    return even_spans(heads, world), kv


def named(
    module: nn.Module, table: tuple[tuple[str, tuple[str, ...]], ...]
) -> tuple[str, tuple[str, ...]] | None:
    for row, columns in table:
        if all(is_linear(getattr(module, name, None)) for name in (row, *columns)):
            return row, columns
    return None


def foreign(module: nn.Module, known: tuple[str, ...]) -> str | None:
    """A parameter of `module` outside the layers `known`: it might belong to what is split."""
    for name, _ in module.named_parameters():
        if name.partition(".")[0] not in known:
            return f"the parameter {name} is not known to allow a split"
    return None


def attention(
    path: str, module: Any, row: str, columns: tuple[str, ...], world: int
) -> Split | str:
    dim = getattr(module, "head_dim", None)
    if not isinstance(dim, int):
        return "the size of a head is not known (no attribute head_dim)"
    norms = [getattr(module, name, None) for name in HEAD_NORMS]
    weights = [getattr(norm, "weight", None) for norm in norms]
    if any(weight is not None and weight.numel() != dim for weight in weights):
        return "a norm reads more than one head at a time"
    if reason := foreign(module, (row, *columns, *HEAD_NORMS)):
        return reason
    out = getattr(module, row)
    inner = out.weight.numel() // out_features(out)
    heads = inner // dim
    if len(columns) == 1:
        packed = getattr(module, columns[0])
        # GPT-2's Conv1D holds q | k | v; GPT-BigCode's nn.Linear has q, k, v head by head.
        if type(packed) is nn.Linear or out_features(packed) != 3 * inner:
            return f"{columns[0]} is not known to hold all queries, all keys, then all values"
        kv_heads = heads
    else:
        query, key, value = (out_features(getattr(module, name)) for name in columns)
        if query != inner or key != value or key % dim or heads % (key // dim):
            return f"{query}, {key}, {value} rows are not heads of {dim} that {row} reads"
        kv_heads = key // dim
    try:
        spans, kv_spans = head_spans(heads, kv_heads, world)
    except Unparallel as error:
        return str(error)
    return Split(path, "attention", columns, row, spans, kv_spans)


def mlp(path: str, module: Any, row: str, columns: tuple[str, ...], world: int) -> Split | str:
    if reason := foreign(module, (row, *columns)):
        return reason
    if getattr(module, "activation_sparsity", 0):  # Gemma 3n: a threshold by mean and deviation
        return "its activation reads all channels of a row"
    out = getattr(module, row)
    width = out.weight.numel() // out_features(out)
    if width < world or any(out_features(getattr(module, name)) != width for name in columns):
        return f"{row} reads {width} channels, and its producers write another number or too few"
    return Split(path, "mlp", columns, row, even_spans(width, world))


def vocabulary(
    model: nn.Module, world: int, whole: Sequence[str] = ()
) -> tuple[list[Split], list[tuple[str, str]]]:
    ends: dict[str, Any] = {"embedding": None, "lm_head": None}
    for kind, getter in (
        ("embedding", "get_input_embeddings"),
        ("lm_head", "get_output_embeddings"),
    ):
        ends[kind] = getattr(model, getter, lambda: None)()
    paths = {id(module): path for path, module in model.named_modules()}
    known = {"embedding": is_embedding, "lm_head": lambda module: type(module) is nn.Linear}
    found = {kind: module for kind, module in ends.items() if module is not None}
    if kept := [paths[id(m)] for m in found.values() if asked(paths[id(m)], whole)]:
        # Both ends: they may have one weight.
        reason = f"{' and '.join(kept)} is to be on every rank, and no end is split without another"
        return [], [(paths[id(module)], reason) for module in found.values()]
    odd = [kind for kind, module in found.items() if not known[kind](module)]
    if odd:
        reason = f"no split is known of the {odd[0]}, a {type(found[odd[0]]).__name__}"
        return [], [(paths[id(module)], reason) for module in found.values()]
    return [
        Split(paths[id(module)], kind, (), "", padded_spans(module.weight.shape[0], world))
        for kind, module in found.items()
    ], []


def asked(path: str, whole: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in whole)


def plan_parallel(model: nn.Module, world: int, whole: Sequence[str] = ()) -> ParallelPlan:
    """How `model` (a causal language model, on any device, also meta) is split over `world` ranks.

    whole: paths of attentions, MLPs, the embedding or the head that every rank is to hold, or
        patterns of them, as "model.layers.*.mlp".

    Raises:
        Unparallel: `world` is below 2, no layer can be split, or no module has a name in `whole`.
    """
    if world < 2:
        raise Unparallel(f"expected 2 ranks or more, found {world}; run the model as it is")
    splits: list[Split] = []
    refused: list[tuple[str, str]] = []
    paths = [path for path, _ in model.named_modules()]
    if unmet := [p for p in whole if not any(asked(path, [p]) for path in paths)]:
        raise Unparallel(f"expected names of modules, found {unmet[0]!r}, which no module has")
    for path, module in model.named_modules():
        for kind, table in ((attention, ATTENTION), (mlp, MLP)):
            if names := named(module, table):
                held = "as was asked for" if asked(path, whole) else ""
                answer = held or kind(path, module, *names, world)
                if isinstance(answer, Split):
                    splits.append(answer)
                else:
                    refused.append((path, answer))
    if not splits:
        why = "; ".join(f"{path}: {reason}" for path, reason in refused)
        raise Unparallel(
            f"no attention or MLP of {type(model).__name__} can be split over {world} ranks "
            f"({why or 'none has projections of a known name'})"
        )
    ends, kept = vocabulary(model, world, whole)
    plan = (*splits, *ends)
    kept += unknown(model, splits, ends, (*refused, *kept))
    whole = {id(p): p.nbytes for p in model.parameters()}
    per_rank = tuple(rank_bytes(model, plan, whole, rank) for rank in range(world))
    return ParallelPlan(world, plan, (*refused, *kept), per_rank, sum(whole.values()))


def unknown(
    model: nn.Module,
    splits: Sequence[Split],
    ends: Sequence[Split],
    refused: Sequence[tuple[str, str]],
) -> list[tuple[str, str]]:
    """The linear layers that are in no module whose layers' names are known, with the bytes that
    every rank holds of them. Layers that differ in numbers alone share a line."""
    named = {f"{s.path}.{name}" for s in splits for name in (*s.columns, s.row)}
    named |= {split.path for split in ends}
    inside = tuple(f"{path}." for path, _ in refused if path)
    found: dict[str, list[int]] = {}
    for path, module in model.named_modules():
        if not is_linear(module) or path in named:
            continue
        if path not in dict(refused) and not path.startswith(inside):
            held = sum(p.nbytes for p in module.parameters())
            found.setdefault(re.sub(r"\b\d+\b", "*", path), []).append(held)
    return [
        (
            path,
            f"no split of a layer of this name is known; {len(held)} of"
            f" {sum(held) / 1e6:,.1f} MB on every rank",
        )
        for path, held in found.items()
    ]


def rank_bytes(
    model: nn.Module, splits: tuple[Split, ...], whole: dict[int, int], rank: int
) -> int:
    """Bytes of parameters on one rank; a weight that two modules share counts once."""
    held = dict(whole)
    for split in splits:
        module: Any = model.get_submodule(split.path)
        a, b = split.spans[rank]
        if not split.columns:
            count = module.weight.shape[0]
            held[id(module.weight)] = module.weight.nbytes // count * (b - a)
            if getattr(module, "bias", None) is not None:
                held[id(module.bias)] = module.bias.nbytes // count * (b - a)
            continue
        for position, name in enumerate(split.columns):
            kv = split.kv_spans and position
            c, d = split.kv_spans[rank] if kv else (a, b)
            total = units(split, kv=bool(kv))
            for parameter in getattr(module, name).parameters():
                held[id(parameter)] = parameter.nbytes * (d - c) // total
        weight = getattr(module, split.row).weight
        held[id(weight)] = weight.nbytes * (b - a) // units(split)
    return sum(held.values())


def units(split: Split, *, kv: bool = False) -> int:
    """How many units (heads, channels) all ranks hold together, each counted once."""
    return (split.kv_spans if kv else split.spans)[-1][1]
