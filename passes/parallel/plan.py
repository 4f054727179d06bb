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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ridgeline.ir.errors import RidgelineError
from ridgeline.passes.parallel.plain import changed, is_embedding, is_linear, opaque_forward

ATTENTION = (
    *((row, ("q_proj", "k_proj", "v_proj")) for row in ("o_proj", "out_proj", "dense")),
    ("c_proj", ("c_attn",)),
)
MLP = (
    *(("down_proj", ("gate_proj", "up_proj")), ("down_proj", ("up_proj",))),
    *(("c_proj", ("c_fc",)), ("fc2", ("fc1",)), ("wo", ("wi_0", "wi_1")), ("wo", ("wi",))),
)
"""The row-parallel layer and the column-parallel ones before it; the first that is there counts."""
BESIDE = (
    *("self_attn", "self_attn_layer_norm", "encoder_attn", "encoder_attn_layer_norm"),
    "final_layer_norm",
)
"""What comes before or after an MLP whose layers are a decoder layer's own, as OPT's and BART's."""
SAID = 12
"""Lines of layers, at most, in an error."""
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

    @property
    def equal(self) -> bool:
        """Does every rank hold as many heads and channels?"""
        spans = [span for split in self.splits for span in (split.spans, split.kv_spans)]
        return all(len({b - a for a, b in each}) <= 1 for each in spans)

    def digest(self) -> str:
        """SHA-256 over the whole plan: equal on two ranks if and only if their plans are."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def __str__(self) -> str:
        kinds = [split.kind for split in self.splits]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        ranks = "1 rank" if self.world == 1 else f"{self.world} ranks"
        lines = [f"tensor parallel over {ranks}: {counts or 'nothing is split'}"]
        lines += [
            f"  held by all: {path or 'the model'}: {reason}" for path, reason in self.refused
        ]
        lines += [
            f"  rank {rank}: {held / 1e6:,.1f} MB of {self.bytes_whole / 1e6:,.1f} MB"
            for rank, held in enumerate(self.bytes_per_rank)
        ]
        return "\n".join(lines)


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
        more = [n for n in range(2 * kv_heads, heads + 1, kv_heads) if heads % n == 0]
        raise Unparallel(
            f"{heads} query and {kv_heads} key-value heads do not divide over {world} ranks; "
            f"use at most {' or '.join((f'{kv_heads} ranks', *map(str, more)))}"
        )
    kv = tuple((r * kv_heads // world, r * kv_heads // world + 1) for r in range(world))
    return even_spans(heads, world), kv


def named(
    module: nn.Module, table: tuple[tuple[str, tuple[str, ...]], ...]
) -> tuple[str, tuple[str, ...]] | None:
    """The first names of `table` all of which `module` has a layer of."""
    children = module._modules
    for row, columns in table:
        if all(children.get(name) is not None for name in (row, *columns)):
            return row, columns
    return None


def kept_whole(module: nn.Module, names: Sequence[str]) -> str | None:
    """Why the layers of these names, or the module itself, are not what a split of them computes;
    None where they are."""
    for name in names:
        layer: Any = module.get_submodule(name)
        if why := changed(layer):
            return f"{name} {why}"
        if not is_linear(layer):
            return f"no split is known of {name}, a {type(layer).__name__}"
    why = opaque_forward(module)
    return why and f"it {why}"


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
    if reason := foreign(module, (row, *columns, *BESIDE)):
        return reason
    if getattr(module, "activation_sparsity", 0):  # Gemma 3n: a threshold by mean and deviation
        return "its activation reads all channels of a row"
    out = getattr(module, row)
    width = out.weight.numel() // out_features(out)
    if width < world or any(out_features(getattr(module, name)) != width for name in columns):
        return f"{row} reads {width} channels, and its producers write another number or too few"
    return Split(path, "mlp", columns, row, even_spans(width, world))


def ends_of(model: nn.Module) -> dict[str, Any]:
    getters = {"embedding": "get_input_embeddings", "lm_head": "get_output_embeddings"}
    ends = {kind: getattr(model, getter, lambda: None)() for kind, getter in getters.items()}
    return {kind: module for kind, module in ends.items() if module is not None}


def vocabulary(
    model: nn.Module, world: int, whole: Sequence[str] = ()
) -> tuple[list[Split], list[tuple[str, str]]]:
    paths = {id(module): path for path, module in model.named_modules()}
    known = {"embedding": is_embedding, "lm_head": lambda module: type(module) is nn.Linear}
    found = ends_of(model)
    if kept := [paths[id(m)] for m in found.values() if asked(paths[id(m)], whole)]:
        # Both ends: they may have one weight.
        reason = f"{' and '.join(kept)} is to be on every rank, and no end is split without another"
        return [], [(paths[id(module)], reason) for module in found.values()]
    for kind, module in found.items():
        why = changed(module)
        if why or not known[kind](module):
            reason = f"no split is known of the {kind}, a {type(module).__name__}"
            reason = f"the {kind} {why}" if why else reason
            return [], [(paths[id(module)], reason) for module in found.values()]
    return [
        Split(paths[id(module)], kind, (), "", padded_spans(module.weight.shape[0], world))
        for kind, module in found.items()
    ], []


def asked(path: str, whole: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in whole)


def check_whole(model: nn.Module, whole: Any) -> None:
    """Raise Unparallel where one of `whole` is no attention, MLP or end: a part of one, as
    "mlp.up_proj", would be split all the same."""
    if isinstance(whole, str) or not isinstance(whole, Sequence):
        example = [whole] if isinstance(whole, str) else []
        raise Unparallel(f"expected a list of names, found {whole!r}; pass whole={example!r}")
    ends, names = [*map(id, ends_of(model).values() if whole else ())], (*ATTENTION, *MLP)
    known = [p for p, m in model.named_modules() if named(m, names) or id(m) in ends]
    for name in whole:
        if not isinstance(name, str):
            raise Unparallel(f"expected names of modules in whole, found {name!r}; pass strings")
        if not any(asked(path, [name]) for path in known):
            near = ", ".join(get_close_matches(name, known, cutoff=0)) or "none, it has none"
            raise Unparallel(
                f"expected a name of an attention, MLP or end, found {name!r}, which none of them"
                f" has; near it: {near}"
            )


def plan_parallel(model: nn.Module, world: int, whole: Sequence[str] = ()) -> ParallelPlan:
    """How `model` (a causal language model, on any device, also meta) is split over `world` ranks.

    whole: paths of attentions, MLPs, the embedding or the head that every rank is to hold, or
        patterns of them, as "model.layers.*.mlp".

    On one rank nothing is split.

    Raises:
        Unparallel: `world` is no number of ranks, no layer can be split, or `whole` has what names
            no attention, MLP or end (on one rank too).
    """
    if not isinstance(model, nn.Module):
        raise Unparallel(f"expected a torch.nn.Module, found a {type(model).__name__}")
    if isinstance(world, bool) or not isinstance(world, int) or world < 1:
        raise Unparallel(f"expected a number of ranks, 1 or more, found {world!r}; pass an int")
    check_whole(model, whole)
    sizes = {id(p): p.nbytes for p in model.parameters()}
    if world == 1:
        return ParallelPlan(1, (), (), (sum(sizes.values()),), sum(sizes.values()))
    splits: list[Split] = []
    refused: list[tuple[str, str]] = []
    for path, module in model.named_modules():
        for kind, table in ((attention, ATTENTION), (mlp, MLP)):
            if names := named(module, table):
                row, columns = names
                held = "as was asked for" if asked(path, whole) else ""
                answer = held or kept_whole(module, (row, *columns))
                answer = answer or kind(path, module, row, columns, world)
                if isinstance(answer, Split):
                    splits.append(answer)
                else:
                    refused.append((path, answer))
    ends, kept = vocabulary(model, world, whole)
    at_odds = cut_twice(model, (*splits, *ends))
    refused += at_odds.items()
    splits, ends = ([s for s in found if s.path not in at_odds] for found in (splits, ends))
    kept += unknown(model, splits, ends, (*refused, *kept))
    if not splits:
        why = "; ".join(f"{path}: {reason}" for path, reason in (*refused, *kept)[:SAID])
        known = ", ".join(f"{'/'.join(columns)} + {row}" for row, columns in (*ATTENTION, *MLP))
        raise Unparallel(
            f"no attention or MLP of {type(model).__name__} can be split over {world} ranks"
            f" ({why or 'it has no linear layers'}); known names are {known}"
        )
    plan = (*splits, *ends)
    per_rank = tuple(rank_bytes(model, plan, sizes, rank) for rank in range(world))
    return ParallelPlan(world, plan, (*refused, *kept), per_rank, sum(sizes.values()))


def cut_twice(model: nn.Module, splits: Sequence[Split]) -> dict[str, str]:
    """Modules that share a parameter which each would cut in another way, with the reason."""
    known: dict[int, tuple[Any, Split, str]] = {}
    found: dict[str, str] = {}
    for split in splits:
        for name, parameter, *cut in cuts(model.get_submodule(split.path), split):
            other_cut, other, other_name = known.setdefault(id(parameter), (cut, split, name))
            if other_cut != cut:
                for a, b, here, there in (
                    (split, other, name, other_name),
                    (other, split, other_name, name),
                ):
                    found[a.path] = (
                        f"its {here} is {b.path}.{there} too, of which a rank would hold another"
                        " part; clone one of them to have both split"
                    )
    return found


def cuts(module: Any, split: Split) -> Iterator[tuple[str, nn.Parameter, int, Any]]:
    """Name, parameter, dimension and each rank's range of units of all that a split cuts."""
    if not split.columns:
        yield from ((name, p, 0, split.spans) for name, p in module.named_parameters())
        return
    for position, name in enumerate(split.columns):
        layer: Any = module.get_submodule(name)
        spans = split.kv_spans if position and split.kv_spans else split.spans
        for kind, parameter in layer.named_parameters():
            dim = int(kind == "weight" and type(layer) is not nn.Linear)
            yield f"{name}.{kind}", parameter, dim, spans
    row: Any = module.get_submodule(split.row)
    yield f"{split.row}.weight", row.weight, int(type(row) is nn.Linear), split.spans


def unknown(
    model: nn.Module,
    splits: Sequence[Split],
    ends: Sequence[Split],
    refused: Sequence[tuple[str, str]],
) -> list[tuple[str, str]]:
    """The linear layers, and the stacked weights of experts, that are in no module whose layers'
    names are known, with the bytes that every rank holds of them. Layers that differ in numbers
    alone share a line."""
    named = {f"{s.path}.{name}" for s in splits for name in (*s.columns, s.row)}
    named |= {split.path for split in ends}
    inside = tuple(f"{path}." for path, _ in refused if path)
    found: dict[tuple[str, str], list[int]] = {}
    for path, module in model.named_modules():
        what = _no_split_of(module)
        if what is None or path in named or path in dict(refused) or path.startswith(inside):
            continue
        held = sum(p.nbytes for p in module.parameters(recurse=False))
        found.setdefault((re.sub(r"\b\d+\b", "*", path), what), []).append(held)
    return [
        (path, f"{what}; {len(held)} of {sum(held) / 1e6:,.1f} MB on every rank")
        for (path, what), held in found.items()
    ]


def _no_split_of(module: nn.Module) -> str | None:
    """Why a module that no split covers is held whole; None where it is not worth a line."""
    if isinstance(module, nn.Linear) or is_linear(module):
        return "no split of a layer of this name is known"
    conv = isinstance(module, nn.modules.conv._ConvNd)
    if not conv and any(p.dim() > 2 and len(p) > 1 for p in module.parameters(recurse=False)):
        return "experts, each a matrix of one weight, are not split (no expert parallelism)"
    return None


def rank_bytes(model: nn.Module, splits: Sequence[Split], whole: dict[int, int], rank: int) -> int:
    """Bytes of parameters on one rank; a weight that two modules share counts once."""
    held = dict(whole)
    for split in splits:
        for _, parameter, dim, spans in cuts(model.get_submodule(split.path), split):
            a, b = spans[rank]
            total = spans[-1][1] if split.columns else parameter.shape[dim]
            held[id(parameter)] = parameter.nbytes * (b - a) // total
    return sum(held.values())


def units(split: Split, *, kv: bool = False) -> int:
    """How many units (heads, channels) all ranks hold together, each counted once."""
    return (split.kv_spans if kv else split.spans)[-1][1]
