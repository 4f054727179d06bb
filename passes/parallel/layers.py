"""The layers of a rank: where its part of a product meets the others'.

    row-parallel      y = sum over ranks r of x_r W_rᵀ, + b once
    vocabulary        y = sum over ranks of W_r[id - a_r] where a_r <= id < b_r, else 0
    head              y = (x W_0ᵀ + b_0 | ... | x W_{W-1}ᵀ + b_{W-1}) cut to V columns

Column-parallel layers need nothing: they stay what they are, with a part of their rows. All
collectives are functional ones (`torch.ops._c10d_functional`), which every level of capture sees.
Source: Shoeybi et al., Megatron-LM, 2019 (arXiv:1909.08053), section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

functional = torch.ops._c10d_functional


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of `x` over the ranks of the group of that name; x's shape and dtype."""
    return functional.wait_tensor(functional.all_reduce(x, "sum", group))


class RowLinear(nn.Module):
    """A linear layer of which this rank holds a part of the input channels.

    weight: [N, K_r], or [K_r, N] where `transposed` (transformers' Conv1D); bias: [N] or None.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, group: str, transposed: bool
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.group, self.transposed = group, transposed

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K_r] -> [..., N], equal on all ranks."""
        y = torch.matmul(x, self.weight) if self.transposed else F.linear(x, self.weight)
        y = all_reduce(y, self.group)
        return y if self.bias is None else y + self.bias


class VocabularyEmbedding(nn.Module):
    """An embedding of which this rank holds `weight` [R, H], the rows from `start` on.

    scale: what the rows are multiplied by, as Gemma does, or None. An id that no rank holds gives
    zeros: a rank cannot raise alone without leaving the others to wait.
    """

    def __init__(self, weight: nn.Parameter, start: int, scale: Tensor | None, group: str) -> None:
        super().__init__()
        self.weight, self.start, self.group = weight, start, group
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] integer -> [..., H], equal on all ranks."""
        local = ids - self.start
        away = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(away, 0), self.weight)
        y = all_reduce(rows.masked_fill(away.unsqueeze(-1), 0.0), self.group)
        return y if self.embed_scale is None else y * self.embed_scale.to(self.weight.dtype)


class VocabularyHead(nn.Module):
    """A linear layer of which this rank holds some outputs: `weight` [R, H], `bias` [R] or None."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        out_features: int,
        world: int,
        group: str,
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.world, self.group = out_features, world, group

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., out_features], equal on all ranks."""
        y = F.linear(x, self.weight, self.bias)
        parts = functional.wait_tensor(
            functional.all_gather_into_tensor(y.contiguous(), self.world, self.group)
        )
        # [W * first, ...] -> [..., W * R], the ranks' columns one after the other
        parts = parts.view(self.world, *y.shape).movedim(0, -2).flatten(-2)
        return parts[..., : self.out_features]
