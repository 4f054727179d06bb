"""The gated activation of a feed-forward layer as one operation.

Law, elementwise, for two tensors of one shape:

    y = act(gate) * up
    silu       act(x) = x σ(x)                   σ(x) = 1 / (1 + exp(-x))
    sigmoid    act(x) = σ(x)
    relu       act(x) = max(x, 0)
    gelu       act(x) = x (1 + erf(x / √2)) / 2
    gelu_tanh  act(x) = x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2

Arithmetic is fp32 (fp64 for fp64 inputs) with one rounding, of y. The two tensors may be the halves
of one packed tensor: strides are free. Source: Shazeer, GLU Variants Improve Transformer.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.ir.op import Op

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
TANH_SCALE, TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715


def reference(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """The law above in plain torch.

    gate, up: one shape and floating dtype, any strides; activation: a name of `ACTIVATIONS`.
    Returns a contiguous tensor of their shape and dtype.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    y = ACTIVATIONS[activation](gate.to(wide)) * up.to(wide)
    return y.to(gate.dtype).contiguous()


def _fake(gate, up, *, activation):
    return gate.new_empty(gate.shape)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.activation = keyword_only_inputs["activation"]


def _slope(x: Tensor, activation: str) -> Tensor:
    """d act / d x."""
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "gelu":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
    if activation == "gelu_tanh":
        t = torch.tanh(TANH_SCALE * (x + TANH_CUBIC * x**3))
        inner = TANH_SCALE * (1 + 3 * TANH_CUBIC * x * x)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner
    s = torch.sigmoid(x)
    return s * (1 - s) if activation == "sigmoid" else s * (1 + x * (1 - s))


def _backward(ctx, grad):
    """d gate = act'(gate) up dy;  d up = act(gate) dy."""
    gate, up = ctx.saved_tensors
    wide = torch.promote_types(gate.dtype, torch.float32)
    x, g = gate.to(wide), grad.to(wide)
    d_gate = (_slope(x, ctx.activation) * up.to(wide) * g).to(gate.dtype)
    return d_gate, (ACTIVATIONS[ctx.activation](x) * g).to(up.dtype)


GATED_ACTIVATION = Op(
    schema="gated_activation(Tensor gate, Tensor up, *, str activation) -> Tensor",
    reference=reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
