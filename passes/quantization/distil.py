"""Tuning what surrounds the codes so that the whole model says what it said before.

Law: with p the unchanged model's distribution over the next token and p̂ the quantised one's,

    minimise   mean over tokens of KL(p ‖ p̂) = sum_v p_v (log p_v - log p̂_v)

over the scales and offsets of every quantised layer and the weights of the norms, the codes held;
with `codes`, over the codes too: each layer then has a latent weight, started at its dequantised
one, whose nearest codes are used, and the gradient passes straight through the rounding. For a
model without logits the loss is ‖y - ŷ‖² / ‖y‖² of its output.

Layers are fitted one at a time (`descent`) to what each one puts out; this makes them correct each
other's errors, which is what few bits need. Adam, linear warm-up over WARM_UP steps, cosine decay;
rates are relative to the mean size of what they move. Products in bf16 where the CPU or GPU has
them (autocast), parameters and loss in fp32. No label is used: the text only excites the model.
Sources: LLM-QAT and EfficientQAT (end-to-end tuning of scales); straight-through estimator.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ridgeline.ir.quantized_linear import powers, unpack_codes
from ridgeline.passes.quantization.calibrate import Batch, call, main_output
from ridgeline.passes.quantization.codec import QuantizationError, QuantizedWeight
from ridgeline.passes.quantization.layer import QuantizedLinear, replace_modules
from ridgeline.passes.quantization.levels import LINEAR, Levels, assemble, basis, stored

WARM_UP = 5
BETAS = (0.9, 0.95)

Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, the loss of the last step)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """steps of Adam on `batch` windows each; scale_rate, code_rate: of the parameters and of the
    latent weights (0: codes are held), as parts of their mean size; norm_rate: absolute."""

    steps: int = 100
    batch: int = 2
    scale_rate: float = 3e-3
    code_rate: float = 0.0
    norm_rate: float = 3e-4


def distil(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch],
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    seed: int = 0,
) -> None:
    """Tune `student`, whose linear layers are `QuantizedLinear`, in place against `teacher`.

    batches: one window each, a tensor [1,L] (or a tuple or dict of arguments); drawn in a seeded
    order, again and again. Raises QuantizationError where the student holds no layer that can be
    tuned, or the loss is not finite: the student is then as it was before.
    """
    layers = {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, QuantizedLinear) and module.quantized.scheme in LINEAR
    }
    if not layers or not batches:
        raise QuantizationError(
            f"distillation needs quantised layers and batches; found {len(layers)} layers with"
            f" tunable scales and {len(batches)} batches"
        )
    tuned = {name: _Tuned(layer, recipe.code_rate > 0) for name, layer in layers.items()}
    norms = _norm_weights(student)
    before = [p.detach().clone() for p in norms]
    required = {p: p.requires_grad for p in student.parameters()}
    for p in required:
        p.requires_grad_(False)
    replace_modules(student, {layers[name]: module for name, module in tuned.items()})
    for p in norms:
        p.requires_grad_(True)
    result: dict[str, QuantizedLinear] = layers
    try:
        _train(student, teacher, batches, recipe, list(tuned.values()), norms, progress, seed)
        result = {name: module.settled() for name, module in tuned.items()}
    except BaseException:
        with torch.no_grad():
            for p, old in zip(norms, before, strict=True):
                p.copy_(old)
        raise
    finally:
        replace_modules(student, {tuned[name]: module for name, module in result.items()})
        for p, flag in required.items():
            p.requires_grad_(flag)


def _train(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch],
    recipe: Recipe,
    tuned: "list[_Tuned]",
    norms: list[nn.Parameter],
    progress: Progress | None,
    seed: int,
) -> None:
    groups: list[dict[str, Any]] = [{"params": norms, "lr": recipe.norm_rate}] if norms else []
    for module in tuned:
        size = module.params.detach()[..., 0].abs().mean().item()
        groups.append({"params": [module.params], "lr": recipe.scale_rate * size})
        if module.latent is not None:
            groups.append({"params": [module.latent], "lr": recipe.code_rate * size})
    adam = torch.optim.Adam(groups, betas=BETAS)
    rates = [group["lr"] for group in adam.param_groups]
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    training = student.training
    student.eval()  # no dropout: two functions are compared
    for step in range(recipe.steps):
        decay = (1 + math.cos(math.pi * step / recipe.steps)) / 2
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * decay * min(1.0, (step + 1) / WARM_UP)
        adam.zero_grad(set_to_none=True)
        loss = 0.0
        for _ in range(recipe.batch):
            order = order or torch.randperm(len(batches), generator=draw).tolist()
            batch = batches[order.pop()]
            part = _loss(student, teacher, batch) / recipe.batch
            part.backward()
            loss += part.item()
        if not math.isfinite(loss):
            raise QuantizationError(
                f"the distillation loss became {loss} at step {step + 1}; lower the rates of the"
                " recipe, or look at the calibration data"
            )
        adam.step()
        if progress is not None:
            progress(step + 1, recipe.steps, loss)
    student.train(training)


def _loss(student: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
    device = next(student.parameters()).device.type
    with torch.autocast(device, torch.bfloat16):
        with torch.no_grad():
            expected = call(teacher, batch)
        actual = call(student, batch)
    (y, logits), (ours, _) = main_output(expected), main_output(actual)
    if logits:
        wanted, given = (t.float().log_softmax(-1) for t in (y, ours))
        return F.kl_div(given, wanted, log_target=True, reduction="none").sum(-1).mean()
    return (ours.float() - y.float()).square().sum() / y.float().square().sum().clamp_min(1e-20)


def _norm_weights(model: nn.Module) -> list[nn.Parameter]:
    """One-dimensional weights of modules that have no other: norms, by what they hold."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and weight.is_floating_point():
            found[id(weight)] = weight
    return list(found.values())


class _Tuned(nn.Module):
    """A `QuantizedLinear` while it is tuned: params [R,G,P] and, where codes move, a latent weight
    [N,K] (columns as stored)."""

    def __init__(self, layer: QuantizedLinear, moving: bool) -> None:
        super().__init__()
        weight = layer.quantized
        scale = powers(weight.scale) if weight.codec_name == "binary" else weight.scale.float()
        parts = [scale if scale.dim() == 3 else scale.unsqueeze(-1)]
        if weight.offset is not None:
            parts.append(weight.offset.float().unsqueeze(-1))
        self.layer, self.weight, self.codec = layer, weight, weight.codec
        self.params = nn.Parameter(torch.cat(parts, -1))
        self.register_buffer("table", basis(self.codec).to(scale.device), persistent=False)
        codes = unpack_codes(weight.packed, weight.bits, weight.in_features)
        self.register_buffer("codes", codes, persistent=False)
        plain = replace(weight, row_scale=None, permutation=None)
        self.latent = nn.Parameter(plain.dequantize()) if moving else None

    def forward(self, x: Tensor) -> Tensor:
        if self.latent is not None:
            self.codes = _recoded(
                self.latent.detach(), self.params.detach(), self.table, self.codec
            )
        weight = _Weigh.apply(self.params, self.latent, self.codes, self.table, self.codec)
        held = self.weight
        read = x if held.permutation is None else x[..., held.permutation.long()]
        y = F.linear(read, weight.to(x.dtype))
        if held.row_scale is not None:
            y = y * held.row_scale.to(y.dtype)
        return y if self.layer.bias is None else y + self.layer.bias.to(y.dtype)

    def settled(self) -> QuantizedLinear:
        """The tuned layer, its parameters rounded to what storage holds."""
        held, codec = self.weight, self.codec
        dtype = held.scale.dtype if held.scale.is_floating_point() else torch.float16
        params = stored(self.params.detach(), codec, dtype)
        codes = self.codes
        if self.latent is not None:
            codes = _recoded(self.latent.detach(), params, self.table, codec)
        weight: QuantizedWeight = assemble(
            codes, params, codec, dtype, held.row_scale, held.permutation
        )
        return QuantizedLinear(weight, self.layer.bias, self.layer.multiply)


def _grouped(x: Tensor, group_size: int) -> Tensor:
    """[N,K] -> [N,G,g], a short last group filled with zeros."""
    return F.pad(x, (0, -x.shape[1] % group_size)).unflatten(1, (-1, group_size))


def _per_row(levels: Tensor, codec: Any, rows: int) -> Tensor:
    """[R,G,.] -> [N,G,.]"""
    return levels.repeat_interleave(codec.group_rows, 0)[:rows] if codec.group_rows > 1 else levels


def _recoded(latent: Tensor, params: Tensor, table: Tensor, codec: Any) -> Tensor:
    """uint8 [N,K]: the codes nearest to the latent weight."""
    groups = _grouped(latent, codec.group_size)
    levels = _per_row(params @ table.T, codec, len(latent)).flatten(0, 1)
    codes, _ = Levels(levels).nearest(groups.flatten(0, 1))
    return codes.to(torch.uint8).view(len(latent), -1)[:, : latent.shape[1]].contiguous()


class _Weigh(torch.autograd.Function):
    """ŵ [N,K] of params and codes; the gradient reaches params exactly, the latent weight straight
    through."""

    @staticmethod
    def forward(ctx, params, latent, codes, table, codec):
        ctx.save_for_backward(codes, table)
        ctx.codec, ctx.moving = codec, latent is not None
        levels = _per_row(params @ table.T, codec, len(codes))
        return levels.gather(2, _grouped(codes, codec.group_size).long()).flatten(1)[
            :, : codes.shape[1]
        ]

    @staticmethod
    def backward(ctx, *grads):
        codes, table = ctx.saved_tensors
        codec, grad = ctx.codec, grads[0].float()
        signs = table[_grouped(codes, codec.group_size).int()]
        d_rows = torch.einsum("ngk,ngkp->ngp", _grouped(grad, codec.group_size), signs)
        if codec.group_rows > 1:
            d_rows = F.pad(d_rows, (0, 0, 0, 0, 0, -len(d_rows) % codec.group_rows))
            d_rows = d_rows.unflatten(0, (-1, codec.group_rows)).sum(1)
        return d_rows, (grad if ctx.moving else None), None, None, None
