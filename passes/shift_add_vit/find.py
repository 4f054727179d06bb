"""Which attentions and linear layers of a model can be reparameterised, and why others cannot.

Attentions are known by structure: `self_attn` of an `nn.TransformerEncoderLayer`; a module with
linear layers `qkv` (C -> 3 C) and `proj` (C -> C) and a number `num_heads`, as timm's ViTs have;
one with `q_proj`, `k_proj`, `v_proj` and `o_proj` or `out_proj`, as those of transformers have.
Whether such a module computes plain softmax attention is tried on random tokens, not assumed.
Linear layers are those of the blocks that hold such an attention: a ViT's embedding and head stay.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ridgeline.passes.shift_add_vit.additive_attention import AdditiveAttention, PairedAttention
from ridgeline.passes.shift_add_vit.mixture import MixtureOfPrimitives
from ridgeline.passes.shift_add_vit.shift_linear import ShiftLinear

PARTS = {"qkv", "proj", "attn_drop", "proj_drop", "q_norm", "k_norm", "norm"}
"""Modules that a ViT's attention may hold."""
SEPARATE = ("q_proj", "k_proj", "v_proj")
MATCH = 1e-4
"""Relative error up to which a module is taken to compute softmax attention, in fp32."""


@dataclass(frozen=True, slots=True)
class Place:
    """A module that can be replaced: its parent, and its name there and in the model."""

    parent: nn.Module
    name: str
    path: str

    @property
    def module(self) -> nn.Module:
        return getattr(self.parent, self.name)


def places(model: nn.Module) -> Iterator[Place]:
    """Every module of the model but itself, parents first."""
    for prefix, parent in model.named_modules():
        for name, child in parent.named_children():
            if child is not None:
                yield Place(parent, name, f"{prefix}.{name}" if prefix else name)


def is_attention(module: nn.Module) -> bool:
    """Is it an attention, by its class or what it holds, that is not additive yet?"""
    named = "attention" in type(module).__name__.lower() or hasattr(module, "qkv")
    return named and not isinstance(module, AdditiveAttention)


def additive(place: Place) -> AdditiveAttention | str:
    """What replaces an attention, sharing its projections, or why nothing can."""
    module = place.module
    if isinstance(module, nn.MultiheadAttention):
        return _of_multihead(place, module)
    if isinstance(getattr(module, "qkv", None), nn.Linear):
        return _of_packed(module)
    if all(isinstance(getattr(module, name, None), nn.Linear) for name in SEPARATE):
        return _of_separate(module)
    return (
        f"{type(module).__name__} is neither an nn.MultiheadAttention of an"
        " nn.TransformerEncoderLayer nor a module with linear layers `qkv` and `proj`, or `q_proj`,"
        " `k_proj`, `v_proj` and `o_proj`"
    )


def _of_multihead(place: Place, attention: nn.MultiheadAttention) -> AdditiveAttention | str:
    if not isinstance(place.parent, nn.TransformerEncoderLayer):
        return (
            "an nn.MultiheadAttention outside an nn.TransformerEncoderLayer may be cross attention"
        )
    if attention.dropout:
        return (
            f"dropout {attention.dropout} in attention has no counterpart; build it with dropout=0"
        )
    if not attention.batch_first:
        return "tokens come first; build the layer with batch_first=True"
    if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
        return "keys of another width, or further keys beside the tokens'"
    width, biased = attention.embed_dim, attention.in_proj_bias is not None
    weight = attention.in_proj_weight
    qkv = nn.Linear(width, 3 * width, biased, device=weight.device, dtype=weight.dtype)
    proj = nn.Linear(width, width, biased, device=weight.device, dtype=weight.dtype)
    qkv.weight, proj.weight = attention.in_proj_weight, attention.out_proj.weight
    if biased:
        qkv.bias, proj.bias = attention.in_proj_bias, attention.out_proj.bias
    return AdditiveAttention(qkv, proj, attention.num_heads)


def _of_packed(attention: nn.Module) -> AdditiveAttention | str:
    held = dict(attention.named_children())
    heads, qkv, proj = getattr(attention, "num_heads", None), held["qkv"], held.get("proj")
    if not isinstance(heads, int) or not isinstance(proj, nn.Linear):
        return "no linear layer `proj` or no number `num_heads` beside `qkv`"
    width = proj.in_features
    if qkv.out_features != 3 * width or width % heads:
        return (
            f"qkv has {qkv.out_features} outputs, where 3 x {width} in {heads} heads are expected"
        )
    others = sorted(set(held) - PARTS)
    others += [name for name, _ in (*attention.named_parameters(recurse=False),
                                    *attention.named_buffers(recurse=False))]  # fmt: skip
    if others:
        return f"holds {', '.join(others)}, whose part in attention is not known"
    drop = held.get("attn_drop", nn.Identity())
    rate = drop.p if isinstance(drop, nn.Dropout) else 0.0
    rate = getattr(attention, "attn_drop", rate) if "attn_drop" not in held else rate
    if rate:
        return f"dropout {rate} in attention has no counterpart; build it without"
    kept = {n: held[n] for n in ("q_norm", "k_norm", "norm", "proj_drop") if n in held}
    new = AdditiveAttention(qkv, proj, heads, **kept)
    if not _is_softmax(attention, new):
        return "does not compute softmax(q kᵀ / √D) v of its qkv, tried on random tokens"
    return new


def _of_separate(attention: nn.Module) -> AdditiveAttention | str:
    held = dict(attention.named_children())
    heads = getattr(attention, "num_attention_heads", getattr(attention, "num_heads", None))
    proj = held.get("o_proj", held.get("out_proj"))
    if not isinstance(heads, int) or not isinstance(proj, nn.Linear):
        return "no linear layer `o_proj` or `out_proj`, or no number of heads, beside `q_proj`"
    parts = [held[name] for name in SEPARATE]
    sizes = {(part.in_features, part.out_features) for part in parts}
    width = proj.in_features
    if sizes != {(width, width)} or width % heads:
        return f"projections of shapes {sorted(sizes)}, where {width} -> {width} is expected of all"
    others = sorted(set(held) - {*SEPARATE, "o_proj", "out_proj"})
    if others:
        return f"holds {', '.join(others)}, whose part in attention is not known"
    if getattr(attention, "is_causal", False):
        return "is causal, and additive attention sees all tokens"
    rates = (getattr(attention, name, 0.0) for name in ("attention_dropout", "dropout"))
    rate = max(r for r in rates if isinstance(r, float | int))
    if rate:
        return f"dropout {rate} in attention has no counterpart; build it without"
    new = PairedAttention(_packed(parts), proj, heads)
    if not _is_softmax(attention, new):
        return "does not compute softmax(q kᵀ / √D) v of its projections, tried on random tokens"
    return new


@torch.no_grad()
def _packed(parts: Sequence[nn.Linear]) -> nn.Linear:
    """Linear layers of one input as one; a bias that one lacks is 0."""
    like = parts[0].weight
    rows = sum(part.out_features for part in parts)
    biased = any(part.bias is not None for part in parts)
    new = nn.Linear(like.shape[1], rows, biased, device=like.device, dtype=like.dtype)
    new.weight.copy_(torch.cat([part.weight for part in parts]))
    if biased:
        zeros = like.new_zeros(like.shape[0])
        new.bias.copy_(torch.cat([zeros if p.bias is None else p.bias for p in parts]))
    return new


@torch.no_grad()
def _is_softmax(attention: nn.Module, new: AdditiveAttention) -> bool:
    """Does the module compute softmax attention of the parts that `new` shares with it?"""
    tried = copy.deepcopy(attention).float().eval()
    parts = copy.deepcopy(new).float().eval()
    parameter = parts.qkv.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, parts.qkv.in_features, generator=generator).to(parameter.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    parts._attend = attend  # pyright: ignore[reportAttributeAccessIssue]
    try:
        found = tried(x)
    except (TypeError, ValueError, RuntimeError):
        return False
    expected = parts(x)
    if isinstance(parts, PairedAttention):
        found, expected = (out[0] if isinstance(out, tuple) else out for out in (found, expected))
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return bool((found - expected).norm() <= MATCH * expected.norm())


def linear_refusal(place: Place, model: nn.Module) -> str | None:
    """Why a linear layer of a block cannot be replaced; None where it can."""
    module = place.module
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, whose own code may read the weight"
    if not bool(torch.isfinite(module.weight).all()):
        return "the weight is infinite or NaN; repair the checkpoint"
    if module.weight.dtype == torch.float64:
        return "the weight is float64; use float32, bfloat16 or float16"
    owners = [
        name
        for name, other in model.named_modules(remove_duplicate=False)
        if getattr(other, "weight", None) is module.weight
    ]
    if len(owners) > 1:
        return f"the weight is shared by {', '.join(owners)}"
    return None


def linears(model: nn.Module, attentions: Iterable[str]) -> Iterator[Place]:
    """The linear layers of the blocks that hold an attention.

    attentions: paths of those; the block is what holds one, or it itself where that is the model.
    """
    blocks = {path.rpartition(".")[0] or path for path in attentions}
    for place in places(model):
        inside = any(place.path.startswith(f"{block}.") for block in blocks)
        made = isinstance(place.parent, MixtureOfPrimitives | ShiftLinear)
        if inside and not made and isinstance(place.module, nn.Linear):
            yield place
