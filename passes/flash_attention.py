"""Attention in any of its spellings -> `ridgeline::attention` (FlashAttention-2).

Law: see `ridgeline.ir.attention`. The rewrite is equal in real arithmetic; scores are formed in
fp32 and never written to memory. A mask proven causal becomes a diagonal, one proven to keep
everything disappears, any other stays as it is. A column of sinks beside the scores (gpt-oss) is
taken where it holds one number per head, and so is a soft cap of the scores (Gemma 2).
Source: Dao, FlashAttention-2; the value preconditions are proven by `ridgeline.ir.masks`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor, fx

from ridgeline.cost_model import Attention, Work, work_of
from ridgeline.ir.attention import ATTENTION
from ridgeline.ir.layout import heads_side_by_side
from ridgeline.ir.masks import Mask, analyse
from ridgeline.ir.match import Reject, Site
from ridgeline.ir.normalize import is_cast
from ridgeline.ir.provenance import said
from ridgeline.ir.sizes import numbers
from ridgeline.ir.symbolic import shape_of
from ridgeline.passes.attention_spellings import patterns
from ridgeline.passes.base import Candidate, Pass, Setting
from ridgeline.passes.operands import (
    four_dimensions,
    length_difference,
    narrowest,
    one_batch,
    one_dimension,
    put,
)

aten = torch.ops.aten
MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of `ridgeline::attention`, as nodes of the program.

    key is [B,Hk,Sk,D], or its transpose [B,Hk,D,Sk] when `transposed`; key and value are cast to
    the dtype of query where theirs is another.
    sinks holds a number per head, or one for all of them, in any shape.
    diagonal: None, an integer, or "Sk - Sq" taken from the shapes at run time.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    transposed: bool
    mask: fx.Node | None
    sinks: fx.Node | None
    scale: float
    diagonal: int | str | None
    soft_cap: float | None


def _sizes(node: fx.Node, rank: int = 0) -> list[sympy.Expr]:
    """[batch, heads, length, features] of an operand; missing ones are heads 1, then batch 1.

    rank: the dimensions that it is broadcast to before.
    """
    one = sympy.Integer(1)
    sizes = shape_of(node)
    sizes = [one] * (rank - len(sizes)) + sizes
    if len(sizes) == 3:
        return [sizes[0], one, *sizes[1:]]
    return [one] * (4 - len(sizes)) + sizes


def accepts(site: Site, setting: Setting) -> list[Candidate] | Reject:
    """Check dtypes, ranks and head counts; settle the mask; state the work on both sides."""
    query = site.bind["query"]
    key, transposed = _untransposed(site)
    given = (query, key, site.bind["value"])
    key, value = _without_repeat(key, transposed), _without_repeat(given[2], False)
    if refusal := _shapes_refused(site, query, key, value, transposed, given):
        return refusal
    if refusal := _mask_refused(site, query) or _sinks_refused(site, query):
        return refusal
    given = site.bind.get("mask")  # one for all layers
    if given not in setting.proofs:
        setting.proofs[given] = analyse(given)
    mask: Mask = setting.proofs[given]
    if site.pattern.startswith("sdpa_causal"):
        mask = Mask(sympy.Integer(0), None)
    q_len, k_len = _sizes(query)[2], _sizes(site.bind["value"])[2]
    diagonal = _diagonal(mask, q_len, k_len)
    rest = mask.rest
    if mask.diagonal is not None and diagonal is None:  # a triangle that no argument can express
        rest = site.bind["mask"]
    sinks = narrowest(site.bind["sinks"]) if "sinks" in site.bind else None
    scale, soft_cap = site.literals.get("scale", 1.0), site.literals.get("soft_cap")
    if soft_cap is not None:  # what the tanh reads is scaled by scale / soft_cap
        scale *= soft_cap
    if soft_cap == 0:
        return Reject("scores are capped at 0", site.outs[0], "leave out the factor of 0")
    call = Call(query, key, value, transposed, rest, sinks, scale, diagonal, soft_cap)
    before, after = sum((work_of(n) for n in site.nodes), Work()), _work(call, site)
    fused = any(isinstance(kernel, Attention) for kernel in before.kernels)
    if fused and setting.training:
        before, after = _with_backward(before), _with_backward(after)
    return [
        Candidate(
            rewrite=FLASH_ATTENTION,
            site=site,
            call=call,
            before=before,
            after=after,
            preconditions=_proven(site, mask, diagonal, rest),
        )
    ]


def _untransposed(site: Site) -> tuple[fx.Node, bool]:
    """The key as [B,Hk,Sk,D] where the graph has it, else its transpose and True."""
    if "key" in site.bind:
        return site.bind["key"], False
    key_t = site.bind["key_t"]
    rank = key_t.meta["val"].dim()
    if key_t.target is aten.transpose.int and key_t.args[1:] == (rank - 2, rank - 1):
        return key_t.args[0], False
    return key_t, True


def _without_repeat(node: fx.Node, transposed: bool) -> fx.Node:
    """x behind ``reshape(expand(unsqueeze(x, 2)))``, transformers' `repeat_kv`, and behind a cast
    of that, which autocast makes; or the node."""
    if is_cast(node):
        repeated = node.args[0]
        thin = _without_repeat(repeated, transposed)  # pyright: ignore[reportArgumentType]
        return node if thin is repeated else thin
    if transposed or node.target not in (aten.reshape.default, aten.view.default):
        return node
    wide = node.args[0]
    if wide.target is not aten.expand.default:
        return node
    thin = wide.args[0]
    if thin.target is not aten.unsqueeze.default or thin.args[1] != 2:
        return node
    x = thin.args[0]
    if x.meta["val"].dim() != 4:
        return node
    batch, heads, length, dim = shape_of(x)
    repeats = shape_of(wide)[2]
    regular = shape_of(node) == [batch, heads * repeats, length, dim]
    return x if regular and shape_of(wide) == [batch, heads, repeats, length, dim] else node


def _shapes_refused(
    site: Site,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    transposed: bool,
    given: tuple[fx.Node, ...],
) -> Reject | None:
    """given: query, key and value as the site reads them."""
    operands = {"query": query, "key": key, "value": value}
    ranks = {name: n.meta["val"].dim() for name, n in operands.items()}
    if len(set(ranks.values())) > 1 or not 2 <= ranks["query"] <= 4:
        return Reject(
            f"operands have ranks {ranks}; the kernel reads [batch, heads, length, head_dim], or"
            " [batch, length, head_dim], or one matrix each",
            site.outs[0],
            "reshape query, key and value to four dimensions",
        )
    dtypes = {str(n.meta["val"].dtype).removeprefix("torch.") for n in given}
    if len(dtypes) > 1 or dtypes == {"float64"}:
        return Reject(
            f"operands have dtypes {sorted(dtypes)}; one of float32, bfloat16, float16 is needed",
            site.outs[0],
            "cast query, key and value to one dtype",
        )
    heads, kv_heads, v_heads = (_sizes(n)[1] for n in operands.values())
    if kv_heads != v_heads or not (kv_heads.is_Integer and kv_heads > 0 and heads % kv_heads == 0):
        return Reject(
            f"{heads} query heads read {kv_heads} key and {v_heads} value heads",
            site.outs[0],
            "make the number of query heads a multiple of the key/value heads",
        )
    dims = (_sizes(query)[3], _sizes(key)[2 if transposed else 3], _sizes(value)[3])
    if dims[0] != dims[1] or not all(d.is_Integer and d <= MAX_HEAD_DIM for d in dims):
        return Reject(
            f"head dimensions are {dims}; at most {MAX_HEAD_DIM} fits the kernel's registers",
            site.outs[0],
            f"use head dimensions of at most {MAX_HEAD_DIM}",
        )
    batches = {_sizes(n)[0] for n in operands.values()} - {sympy.Integer(1)}
    if len(batches) > 1:
        return Reject(
            f"batch sizes {batches} are broadcast against each other",
            site.outs[0],
            "expand query, key and value to one batch size",
        )
    return None


def _mask_refused(site: Site, query: fx.Node) -> Reject | None:
    if "mask" not in site.bind:
        return None
    mask = site.bind["mask"]
    dtype = mask.meta["val"].dtype
    # In `scores + mask` a boolean counts as 0 or 1; only the fused call reads it as "keep".
    boolean = dtype == torch.bool and site.pattern.startswith("sdpa_masked")
    if not (boolean or dtype.is_floating_point):
        return Reject(
            f"the mask, {said(mask)}, is {dtype} and is added to the scores as a number",
            mask,
            "add a floating mask, or exclude with masked_fill(~mask, -inf)",
        )
    (batch, heads, q_len, _), (other, _, k_len, _) = _sizes(query), _sizes(site.bind["value"])
    batch = other if batch == 1 else batch
    rank = query.meta["val"].dim()
    sizes = shape_of(mask)
    whole = [batch, heads, q_len, k_len] if rank == 4 else [batch, q_len, k_len][3 - rank :]
    scores = whole[max(rank - len(sizes), 0) :]
    fused = site.pattern.startswith("sdpa_masked")
    if len(sizes) > rank or not all(
        size in (1, full) or (fused and _must_be_equal(size, own, full))
        for size, own, full in zip(sizes, mask.meta["val"].shape, scores, strict=True)
    ):
        return Reject(
            f"the mask, {said(mask)}, of shape {sizes} widens scores of shape {whole}",
            mask,
            "expand query, key and value to the mask's batch and heads",
        )
    return None


def _must_be_equal(size: sympy.Expr, own: int | torch.SymInt, full: sympy.Expr) -> bool:
    """Two free sizes, such as those of a cache and of the padding mask beside it, of which the
    first is never 1: the fused call itself raises unless they are equal.
    """
    return not isinstance(own, int) and not full.is_Integer and bool((size - 1).is_positive)


def _sinks_refused(site: Site, query: fx.Node) -> Reject | None:
    if "sinks" not in site.bind:
        return None
    sinks, rank = narrowest(site.bind["sinks"]), len(shape_of(site.bind["sinks"]))
    batch, heads, rows, _ = _sizes(sinks, rank)
    if batch != 1 or rows != 1 or heads not in (1, _sizes(query)[1]):
        return Reject(
            f"the sinks, {said(sinks)}, of shape {shape_of(sinks)} are not one number per head",
            sinks,
            "expand one number per head over batch and queries",
        )
    return None


def _diagonal(mask: Mask, q_len: sympy.Expr, k_len: sympy.Expr) -> int | str | None:
    if mask.diagonal is None:
        return None
    if mask.diagonal.is_Integer:
        return int(mask.diagonal)
    return "Sk - Sq" if sympy.expand(mask.diagonal - (k_len - q_len)) == 0 else None


def _proven(
    site: Site, mask: Mask, diagonal: int | str | None, rest: fx.Node | None
) -> tuple[str, ...]:
    scale, cap = site.literals.get("scale", 1.0), site.literals.get("soft_cap")
    proven = [f"softmax over the last dimension, scale {scale * (cap or 1.0):g}"]
    if cap is not None:
        proven.append(f"scores capped by {cap:g} tanh(z / {cap:g}) before any mask")
    if diagonal is not None:
        proven.append(f"the mask keeps j <= i + ({diagonal}) for every size")
    if "mask" in site.bind:
        proven.append(f"{said(rest)} stays as mask" if rest else "nothing else is masked")
    if "sinks" in site.bind:
        proven.append("one sink per head, whose weight is dropped")
    return tuple(proven)


def _work(call: Call, site: Site) -> Work:
    def hints(node: fx.Node) -> list[int]:
        sizes = list(numbers(node.meta["val"].shape))
        return [sizes[0], 1, *sizes[1:]] if len(sizes) == 3 else [1] * (4 - len(sizes)) + sizes

    (batch, heads, q_len, dim), value = hints(call.query), hints(site.bind["value"])
    return Work(
        (
            Attention(
                batch=max(batch, value[0]),
                heads=heads,
                kv_heads=hints(call.value)[1],
                q=q_len,
                kv=value[2],
                head_dim=dim,
                value_dim=value[3],
                causal=call.diagonal is not None,
                dtype=call.query.meta["val"].dtype,
                masked=call.mask is not None,
                sinks=call.sinks is not None,
                library="ridgeline",
            ),
        )
    )


def _with_backward(work: Work) -> Work:
    """The attention kernels of a training step. Attention in raw operations is weighed by its
    forward alone, on both sides."""
    kernels = (
        dataclasses.replace(kernel, backward=True) if isinstance(kernel, Attention) else kernel
        for kernel in work.kernels
    )
    return Work(tuple(kernels))


def apply(
    candidate: Candidate, copied: Mapping[fx.Node, fx.Node], module: fx.GraphModule
) -> fx.Node:
    """Put one `ridgeline::attention` where the site's output is computed."""
    call: Call = candidate.call
    out = copied[candidate.site.outs[0]]
    graph, rank = module.graph, call.query.meta["val"].dim()
    with graph.inserting_before(out):
        dtype = call.query.meta["val"].dtype
        key, value = (
            x if x.meta["val"].dtype == dtype else put(graph, aten.to.dtype, x, dtype)
            for x in (copied[call.key], copied[call.value])
        )
        if call.transposed:
            key = put(graph, aten.transpose.int, key, rank - 2, rank - 1)
        query, key, value = one_batch(
            graph,
            [four_dimensions(graph, x) for x in (copied[call.query], key, value)],
        )
        mask = copied[call.mask] if call.mask is not None else None
        if mask is not None and rank == 3 and mask.meta["val"].dim() == 3:
            mask = four_dimensions(graph, mask)
        diagonal = call.diagonal
        if diagonal == "Sk - Sq":
            diagonal = length_difference(graph, query, key)
        arguments = (query, key, value, mask)
        if call.sinks is not None:
            heads = query.meta["val"].shape[1]
            arguments += (one_dimension(graph, copied[call.sinks], heads),)
        new = graph.call_function(
            ATTENTION.overload,
            arguments,
            {"scale": call.scale, "diagonal": diagonal, "soft_cap": call.soft_cap},
        )
        new.meta = dict(out.meta)
        new.meta["val"] = _fake(query, value)
        result = new
        for _ in range(4 - rank):
            result = put(graph, aten.squeeze.dim, result, 1 if rank == 3 else 0)
        if out.meta["val"].dtype != result.meta["val"].dtype:  # a final cast was seen through
            result = put(graph, aten.to.dtype, result, out.meta["val"].dtype)
    result.meta = {**out.meta, "val": result.meta["val"]}
    out.replace_all_uses_with(result)
    return new


def _fake(query: fx.Node, value: fx.Node) -> Tensor:
    shape = (*query.meta["val"].shape[:-1], value.meta["val"].shape[-1])
    return heads_side_by_side(query.meta["val"], shape)


FLASH_ATTENTION = Pass(
    name="flash_attention",
    op=ATTENTION,
    exactness="reassociating",
    patterns=patterns,
    accepts=accepts,
    apply=apply,
    rounding={"float32": 2e-6, "bfloat16": 4e-3, "float16": 6e-4},
)
