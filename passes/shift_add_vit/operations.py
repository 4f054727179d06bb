"""Multiplications, additions and shifts of one call, counted, and their modelled energy.

Counted on the frozen form as it runs: products of linear layers, attention and convolutions, one
multiplication and one addition each (`torch.utils.flop_counter`); of a shift layer one shift and
one addition per weight, term and token, and a multiplication per scale; of additive attention
(N + M) D E additions, and per query one division and E multiplications by it. Norms, activations
and softmax are left out: they are the same in every form, but for softmax, which counts for less.

Energy, 45 nm, fp32: multiplication 3.7 pJ, addition 0.9 pJ, shift 0.13 pJ, and 100 pJ for each byte
of weights read from DRAM. Figures of an ASIC, which rank forms and say nothing of this machine.
Sources: Horowitz, ISSCC 2014; You et al., ShiftAddViT (2023), whose published sums leave out the
memory of additive layers; ours does not.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ridgeline.cost_model.energy import movement_joules, unit_joules
from ridgeline.passes.shift_add_vit.freeze import freeze


@dataclass(frozen=True, slots=True)
class Operations:
    """What one call takes. weight_bytes: of all parameters and buffers, each read once."""

    multiplications: int
    additions: int
    shifts: int
    weight_bytes: int

    @property
    def arithmetic_joules(self) -> float:
        """Energy of the operations alone, as fp32."""
        return (
            self.multiplications * unit_joules("multiply", "float32")
            + self.additions * unit_joules("add", "float32")
            + self.shifts * unit_joules("shift", "int32")
        )

    @property
    def joules(self) -> float:
        """With the weights' way from DRAM and through the chip's buffer."""
        return self.arithmetic_joules + movement_joules(self.weight_bytes)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.multiplications = self.additions = self.shifts = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if name == "ridgeline::quantized_linear":
            self._quantized_linear(out, *args, **kwargs)
        elif name == "ridgeline::binary_attention":
            self._binary_attention(*args[:3])
        elif name == "aten::_scaled_dot_product_flash_attention_for_cpu":  # not in torch's registry
            self._products(sdpa_flop_count(*(x.shape for x in args[:3])) // 2)
        elif func._overloadpacket in flop_registry:
            count = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            self._products(int(count) // 2)
        return out

    def _products(self, count: int) -> None:
        self.multiplications += count
        self.additions += count

    def _quantized_linear(
        self, out: Any, x: Any, packed: Any, scale: Any, *_: Any, **kw: Any
    ) -> None:
        products = math.prod(out.shape) * x.shape[-1]
        terms = kw.get("terms", 1)  # the dispatcher leaves defaults out
        if kw.get("codec") != "shift":
            self._products(products)
            return
        self.shifts += products * terms
        self.additions += products * terms
        self.multiplications += math.prod(out.shape) * scale.shape[1]

    def _binary_attention(self, query: Any, key: Any, value: Any) -> None:
        heads, rows, depth = math.prod(query.shape[:2]), query.shape[2], query.shape[3]
        length, width = value.shape[2:]
        self.additions += heads * (length + rows) * depth * (width + 1)
        self.multiplications += heads * rows * (width + 1)


@torch.no_grad()
def count_operations(model: nn.Module, *args: Any) -> Operations:
    """What one call ``model(*args)`` of a model in eval mode takes once it is frozen."""
    frozen = freeze(model)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operation per encoder layer
    try:
        with _Counter() as counter:
            frozen(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    held = {t.data_ptr(): t.nbytes for t in tree_leaves(list(frozen.state_dict().values()))}
    return Operations(
        counter.multiplications, counter.additions, counter.shifts, sum(held.values())
    )
