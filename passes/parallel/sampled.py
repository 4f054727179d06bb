"""What a rank says of the inputs of a call, by which others tell whether theirs are the same.

Of each cache, which holds this rank's heads: how many sequences and tokens it has. Of each other
tensor: dtype, shape, strides; and where it is on the CPU, of values:

    integers, booleans   the sum of x_i r_i mod 2^64 for random r, of all up to `EXACT` values
    floats               the sum of x_i cos(i), and |x|; which of them are not finite or `LARGE`, as
                         entries of a mask are, is said exactly, and they count as 0 in the sum
    of more values       `SAMPLED` of them, spread over the tensor, the last among them

An expanded dimension counts as one, and nothing is copied whole. Tensors on a device are not read:
that would wait for it. Everything else in the arguments is said as it is; of a device, its type,
as each rank has one of its own.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ridgeline.ir import caches
from ridgeline.ir.call import Call

SAMPLED, EXACT = 4096, 2**16
LARGE = 1e8
"""No activation; a quarter of the largest number where a dtype ends before that."""


def facts_of(call: Call) -> dict[str, str]:
    """What must be equal on all ranks, by its name."""
    structure, leaves = _in_order(call)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    plain = [x for x in leaves if not isinstance(x, Tensor) and not caches.is_cache(x)]
    addresses = list(map(id, tensors))
    facts = {
        "structure of arguments": structure,
        "arguments that are no tensors": ", ".join(map(_plain, plain)),
        "shapes of inputs": ", ".join(f"{_name(x)}{list(x.shape)}" for x in tensors),
        "strides of inputs": ", ".join(str(list(x.stride())) for x in tensors),
        "devices of inputs": ", ".join(x.device.type for x in tensors),
        "inputs that are one": str(list(map(addresses.index, addresses))),
    }
    own = set(addresses)
    facts["lengths of caches"] = _of_caches([x for x in call.flat if id(x) not in own])
    read = [x for x in tensors if _is_read(x)]
    facts["integers in inputs"] = ", ".join(_integers(x) for x in read if not _is_float(x))
    facts["numbers in inputs that are large or not finite"] = ", ".join(
        _extremes(values, limit) for values, limit in map(_floats, filter(_is_float, read))
    )
    return facts


def sums_of(call: Call, slots: int) -> list[tuple[float, float]]:
    """(sum, norm) of each input of floats, folded into so many."""
    sums = [(0.0, 0.0)] * slots
    tensors = [x for x in _in_order(call)[1] if isinstance(x, Tensor)]
    floats = [x for x in tensors if _is_read(x) and _is_float(x)]
    for i, (values, limit) in enumerate(map(_floats, floats)):
        values = values.masked_fill(_are_extreme(values, limit), 0.0)
        total, norm = sums[i % slots]
        total += float(values @ _waves(len(values)))
        sums[i % slots] = total, math.hypot(norm, float(values.norm()))
    return sums


def _in_order(call: Call) -> tuple[str, list[Any]]:
    """Structure and leaves, dictionaries in the order of their keys: a model that makes one from a
    set of names, as transformers does of masks, has another order in each process."""
    structure, places = _places_in_order(call.spec)
    return structure, [call.leaves[place] for place in places]


@functools.lru_cache(maxsize=256)
def _places_in_order(spec: TreeSpec) -> tuple[str, list[int]]:
    places, ordered = tree_flatten(_ordered(tree_unflatten(range(spec.num_leaves), spec)))
    return repr(ordered), places


def _ordered(x: Any) -> Any:
    if type(x) is dict:
        return {key: _ordered(x[key]) for key in sorted(x, key=repr)}
    return type(x)(map(_ordered, x)) if type(x) in (tuple, list) else x


def _of_caches(held: Sequence[Tensor]) -> str:
    """What is the same of caches on all ranks: of keys and values [B, heads, S, D] all sizes but
    the heads, of other tensors the first, and counts of tokens; once for layers alike."""
    counts = [x.reshape(-1) for x in held if not x.is_floating_point() and _is_read(x)]
    told = map(str, torch.cat(counts).tolist() if counts else [])
    alike = groupby((x.dtype, x.shape) for x in held if x.is_floating_point())
    sizes = (
        f"{str(dtype).removeprefix('torch.')}{_apart_from_heads(shape)} x {len([*same])}"
        for (dtype, shape), same in alike
    )
    return ", ".join((*sizes, *(f"{count} x {len([*same])}" for count, same in groupby(told))))


def _apart_from_heads(shape: torch.Size) -> list[int]:
    return [shape[0], *shape[2:]] if len(shape) == 4 else [*shape[:1]]


def _plain(leaf: object) -> str:
    return leaf.type if isinstance(leaf, torch.device) else f"{type(leaf).__name__} {leaf!r}"


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _is_read(x: Tensor) -> bool:
    """A subclass may send where its values are read."""
    return x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter)


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _integers(x: Tensor) -> str:
    values = _some(x, EXACT).to(torch.int64)
    total = int((values * _random()[: len(values)]).sum())
    return f"{values[:8].tolist()}... ({total % 2**64:016x})"


def _floats(x: Tensor) -> tuple[Tensor, float]:
    """Values [n] of x in float64, and from where on they are extreme."""
    values = _some(x, SAMPLED)
    if x.is_complex():
        values = torch.view_as_real(values.resolve_conj()).flatten()
    return values.double(), min(LARGE, torch.finfo(x.dtype).max / 4)


def _are_extreme(values: Tensor, limit: float) -> Tensor:
    return ~(values.abs() < limit)  # NaN too


def _extremes(values: Tensor, limit: float) -> str:
    """How many, and a digest of where they are: NaN, which infinity, or a large number's sign."""
    where = _are_extreme(values, limit).nonzero().flatten()
    if not len(where):
        return "0"
    them = values[where]
    kinds = them.sign().nan_to_num(0.0) * (1 + them.isinf())
    data = where.numpy().tobytes() + kinds.numpy().tobytes()
    return f"{len(where)} ({hashlib.blake2b(data, digest_size=6).hexdigest()})"


def _some(x: Tensor, most: int) -> Tensor:
    """Up to `most` values [n] of x, all; of more, `SAMPLED`. An expanded dimension counts as 1."""
    x = x.detach()
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x.reshape(-1) if x.numel() <= most else x[_places(x.shape)]


@functools.lru_cache(maxsize=64)
def _places(shape: torch.Size) -> tuple[Tensor, ...]:
    """Where the samples of such a tensor are: an odd step does not stay in a few columns."""
    count = shape.numel()
    at = torch.arange(SAMPLED, device="cpu") * (count // SAMPLED | 1) % count
    at[-1] = count - 1
    return torch.unravel_index(at, shape)


@functools.cache
def _random() -> Tensor:
    ends = torch.iinfo(torch.int64)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(ends.min, ends.max, (EXACT,), generator=generator, device="cpu")


@functools.cache
def _all_waves() -> Tensor:
    return torch.arange(2 * SAMPLED, dtype=torch.float64, device="cpu").cos()


def _waves(count: int) -> Tensor:
    return _all_waves()[:count]
