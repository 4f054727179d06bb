"""The model of one rank: a copy in which the split layers hold that rank's part of the weights.

    q, k, v, gate, up    rows [a, b) of W and b                    (column-parallel)
    packed q|k|v         the same rows of each of the three parts
    o, down              columns [a, b) of W, b whole              (`RowLinear`)
    embedding            rows [a, b), zeros beyond V               (`VocabularyEmbedding`)
    lm_head              the same                                  (`VocabularyHead`)

Everything else is shared with the caller's model, which is not changed: what is new in memory is
the rank's part alone, `ParallelPlan.bytes_per_rank` less what all ranks hold.
"""

from typing import Any

import torch
from torch import nn

from ridgeline.passes.copy_model import copy_model
from ridgeline.passes.parallel.layers import RowLinear, VocabularyEmbedding, VocabularyHead
from ridgeline.passes.parallel.layouts import COLUMN, ROW, VOCABULARY, Part
from ridgeline.passes.parallel.plan import ParallelPlan, Split, units


def shard(model: nn.Module, plan: ParallelPlan, rank: int, group: str) -> nn.Module:
    """The copy of `model` that rank `rank` runs, with collectives over the group of that name."""
    return _Sharder(plan, rank, group).model(copy_model(model))


def split_parameters(plan: ParallelPlan, model: nn.Module) -> dict[str, Part]:
    """Parameter name in the rank's model -> how it is split: by column, row or vocabulary."""
    names: dict[str, Part] = {}
    for split in plan.splits:
        module: Any = model.get_submodule(split.path)
        if not split.columns:
            part = Part(VOCABULARY, 0, path=split.path)
            names |= {f"{split.path}.{n}": part for n, _ in module.named_parameters()}
            continue
        for position, child in enumerate(split.columns):
            cuts, packed = _cuts(module, split, position), packed_parts(split)
            for n, parameter in getattr(module, child).named_parameters():
                dim = parameter.dim() - 1 if _transposed(getattr(module, child)) else 0
                names[f"{split.path}.{child}.{n}"] = Part(COLUMN, dim, cuts, packed, split.path)
        dim = 0 if _transposed(getattr(module, split.row)) else 1
        names[f"{split.path}.{split.row}.weight"] = Part(ROW, dim, path=split.path)
    return names


def packed_parts(split: Split) -> int:
    """How many parts lie one after the other in a column-parallel layer's output."""
    return 3 if split.kind == "attention" and len(split.columns) == 1 else 1


def _cuts(module: Any, split: Split, position: int) -> frozenset[int]:
    """The channels of a head and, of queries, those of the heads that read one key."""
    if split.kind != "attention":
        return frozenset()
    size, group = module.head_dim, units(split) // units(split, kv=True)
    return frozenset({size} if position else {size, size * group})


def _transposed(linear: Any) -> bool:
    return type(linear) is not nn.Linear


class _Sharder:
    """One rank's parts; a parameter that two modules share stays one."""

    def __init__(self, plan: ParallelPlan, rank: int, group: str) -> None:
        self.plan, self.rank, self.group = plan, rank, group
        self.made: dict[int, nn.Parameter] = {}
        self.kept: list[nn.Parameter] = []  # an id in `made` must not be given to another object

    def model(self, model: nn.Module) -> nn.Module:
        for split in self.plan.splits:
            if split.columns:
                self.block(model.get_submodule(split.path), split)
            else:
                self.vocabulary(model, split)
        return model

    def block(self, module: Any, split: Split) -> None:
        """Attention or MLP: its columns hold fewer rows, its row layer sums over the ranks."""
        width = self.unit(module, split)
        for position, name in enumerate(split.columns):
            spans = split.kv_spans if position and split.kv_spans else split.spans
            a, b = (width * end for end in spans[self.rank])
            self.columns(getattr(module, name), a, b, packed_parts(split))
        row = getattr(module, split.row)
        transposed = _transposed(row)
        a, b = (width * end for end in split.spans[self.rank])
        weight = self.part(row.weight, 0 if transposed else 1, a, b)
        setattr(module, split.row, RowLinear(weight, row.bias, self.group, transposed))
        if split.kind == "attention":
            self.heads(module, split)

    def unit(self, module: Any, split: Split) -> int:
        """Channels that one unit of the split has: the size of a head, or 1."""
        row = getattr(module, split.row)
        inner = row.weight.shape[0 if _transposed(row) else 1]
        return inner // units(split)

    def columns(self, linear: Any, a: int, b: int, packed: int) -> None:
        """Keep rows [a, b) of each of `packed` equal parts of the output."""
        transposed = _transposed(linear)
        weight, bias = linear.weight, linear.bias
        linear.weight = self.part(weight, 1 if transposed else 0, a, b, packed)
        if bias is not None:
            linear.bias = self.part(bias, 0, a, b, packed)
        setattr(linear, "nf" if transposed else "out_features", packed * (b - a))

    def heads(self, module: Any, split: Split) -> None:
        """The numbers of heads that forward may read from the module."""
        a, b = split.spans[self.rank]
        c, d = split.kv_spans[self.rank]
        heads, kv_heads = b - a, d - c
        local = {
            "num_heads": heads,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "num_key_value_groups": heads // kv_heads,
            "split_size": heads * module.head_dim,
        }
        for name, value in local.items():
            if hasattr(module, name):
                setattr(module, name, value)

    def vocabulary(self, model: nn.Module, split: Split) -> None:
        old: Any = model.get_submodule(split.path)
        a, b = split.spans[self.rank]
        weight = self.part(old.weight, 0, a, b)
        if split.kind == "embedding":
            scale = getattr(old, "embed_scale", None)
            new: nn.Module = VocabularyEmbedding(weight, a, scale, self.group)
        else:
            bias = None if old.bias is None else self.part(old.bias, 0, a, b)
            new = VocabularyHead(weight, bias, old.out_features, self.plan.world, self.group)
        new.train(old.training)
        model.set_submodule(split.path, new)

    def part(self, whole: nn.Parameter, dim: int, a: int, b: int, packed: int = 1) -> nn.Parameter:
        """[a, b) of `dim` of each of `packed` equal parts, in memory of its own, zeros beyond."""
        if id(whole) not in self.made:
            data = whole.detach().unflatten(dim, (packed, -1))
            size = data.shape[dim + 1]
            held = data.narrow(dim + 1, min(a, size), min(b, size) - min(a, size))
            shape = list(held.shape)
            shape[dim + 1] = b - a
            own = torch.zeros(shape, dtype=held.dtype, device=held.device)
            own.narrow(dim + 1, 0, held.shape[dim + 1]).copy_(held)
            own = own.flatten(dim, dim + 1)
            self.made[id(whole)] = nn.Parameter(own, requires_grad=whole.requires_grad)
            self.kept.append(whole)
        return self.made[id(whole)]
