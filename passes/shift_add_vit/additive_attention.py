"""Self-attention whose products are additions: binary codes instead of softmax, and a convolution.

Law, with q, k, v = the packed projection of x, per head:

    y = projection(norm(binary_attention(q, k, v, θq, θk) + conv(v)))

`binary_attention` is `ridgeline.ir.binary_attention`: linear in the tokens. conv is depthwise over
the tokens, zero at first; it stands in for what is local in softmax attention, which sums of
nearly equal weights cannot express. θ [H,D] are running means of q and k over the tokens seen in
training, and so are σ, their mean distances from θ, in which the straight-through gradient counts:
the codes of q / σ and θ / σ are those of q and θ, and their gradient reaches |q - θ| <= 2 σ.

Source: You et al., ShiftAddViT (2023), section 4.1 (its threshold is the mean of the batch at hand,
in eval too; the convolution is shared by the channels of a head; a further normalisation follows).
"""

import torch
from torch import Tensor, nn

from ridgeline.ir.binary_attention import BINARY_ATTENTION
from ridgeline.passes.shift_add_vit.errors import ShiftAddError

MOMENTUM = 0.05
"""Weight of a new batch in the running statistics, once 1 / MOMENTUM batches were seen."""
REACH = 2.0
"""How many mean deviations from the threshold the gradient of a code reaches."""
KERNEL = 9
"""Tokens that the convolution sees."""


class CodeStatistics(nn.Module):
    """Running mean and mean absolute deviation of x [B,H,N,D] per head and channel.

    Buffers mean, spread fp32 [H,D], and batches, the number of those seen.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(heads, head_dim))
        self.register_buffer("spread", torch.ones(heads, head_dim))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in one batch; the first few count equally."""
        wide = x.detach().float()
        self.batches += 1
        weight = (1 / self.batches).clamp_min(MOMENTUM)
        self.mean += weight * (wide.mean((0, 2)) - self.mean)
        deviation = (wide - self.mean.unsqueeze(1)).abs().mean((0, 2))
        self.spread += weight * (deviation - self.spread)

    @property
    def unit(self) -> Tensor:
        """What the gradient's reach of 1 is in x's units, [H,D], > 0."""
        return (REACH * self.spread).clamp_min(1e-6)


class AdditiveAttention(nn.Module):
    """Self-attention of tokens x [B,N,C] -> [B,N,C].

    qkv, proj: the trained projections C -> 3 C, rows of queries, keys and values one upon the
    other, heads within each, and C -> C. q_norm, k_norm: applied to queries and keys [B,H,N,D];
    norm: to the heads' joint output [B,N,C]; proj_drop: after proj.
    As `nn.MultiheadAttention` it also takes the three equal tensors that
    `nn.TransformerEncoderLayer` passes, and then returns (output, None).
    Masks are not defined here: with one a call raises ShiftAddError.
    """

    # what nn.TransformerEncoderLayer reads before it calls; no bias keeps it off its fused code
    batch_first, _qkv_same_embed_dim, in_proj_weight, in_proj_bias = True, False, None, None

    def __init__(
        self,
        qkv: nn.Linear,
        proj: nn.Linear,
        num_heads: int,
        *,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        norm: nn.Module | None = None,
        proj_drop: nn.Module | None = None,
    ) -> None:
        super().__init__()
        channels = proj.in_features
        self.num_heads, self.head_dim = num_heads, channels // num_heads
        self.qkv, self.proj = qkv, proj
        self.q_norm, self.k_norm = q_norm or nn.Identity(), k_norm or nn.Identity()
        self.norm, self.proj_drop = norm or nn.Identity(), proj_drop or nn.Identity()
        options = {"device": proj.weight.device, "dtype": proj.weight.dtype}
        self.conv = nn.Conv1d(
            channels, channels, KERNEL, padding=KERNEL // 2, groups=channels, bias=False, **options
        )
        nn.init.zeros_(self.conv.weight)
        self.queries = CodeStatistics(num_heads, self.head_dim).to(proj.weight.device)
        self.keys = CodeStatistics(num_heads, self.head_dim).to(proj.weight.device)

    def forward(
        self,
        x: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        need_weights: bool = False,
        average_attn_weights: bool = True,
    ) -> Tensor | tuple[Tensor, None]:
        """x [B,N,C] -> [B,N,C], or a pair with None where key and value are passed."""
        if attn_mask is not None or key_padding_mask is not None or is_causal or need_weights:
            raise ShiftAddError(
                "additive attention has neither masks nor weights to return: call the model without"
                " them, or name this attention in `ignore` of ridgeline.reparameterize"
            )
        as_multihead = key is not None or value is not None
        if as_multihead and (key is not x or value is not x):
            raise ShiftAddError(
                "additive attention takes one tensor as query, key and value; name this attention"
                " in `ignore` of ridgeline.reparameterize"
            )
        batch, tokens, channels = x.shape
        packed = self.qkv(x)
        parts = packed.view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        mixed = self._attend(query, key, value).transpose(1, 2).reshape(batch, tokens, channels)
        values = packed[..., 2 * channels :].transpose(1, 2)
        mixed = mixed + self.conv(values).transpose(1, 2)
        out = self.proj_drop(self.proj(self.norm(mixed)))
        return (out, None) if as_multihead else out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        thresholds = self.queries.mean, self.keys.mean
        if self.training:
            self.queries.update(query)
            self.keys.update(key)
            units = self.queries.unit, self.keys.unit
            query, key = (
                x / unit.unsqueeze(1).to(x.dtype)
                for x, unit in zip((query, key), units, strict=True)
            )
            thresholds = tuple(t / unit for t, unit in zip(thresholds, units, strict=True))
        return BINARY_ATTENTION.overload(query, key, value, *thresholds)

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads of {self.head_dim}"


class PairedAttention(AdditiveAttention):
    """The same, called as the attentions of transformers' ViTs are, and returning what they do."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: object
    ) -> tuple[Tensor, None]:
        """hidden_states [B,N,C] -> ([B,N,C], None); options other than a request for weights are
        those of the attention that this replaces, and not read."""
        weights = bool(options.get("output_attentions"))
        out = super().forward(hidden_states, attn_mask=attention_mask, need_weights=weights)
        assert isinstance(out, Tensor)
        return out, None
