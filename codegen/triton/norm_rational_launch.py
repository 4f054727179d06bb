"""`ridgeline::layer_norm_rational` on GPUs: the norm kernel with a rational function at its end.

Law and operands: `ridgeline.ir.norm_rational`. Registered for the operation itself under torch's
CUDA key, which ROCm shares; what the kernel does not take, and everything where Triton is not
installed, runs by the reference.
"""

import torch
from torch import Tensor

from ridgeline.codegen.triton.group_rational_launch import available, single
from ridgeline.codegen.triton.norm_ops import MAX_SIZE, compile_norm
from ridgeline.codegen.triton.ops import device_arch
from ridgeline.ir.norm_rational import Operands, implement

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def _launch(operands: Operands, eps: float, form: str) -> Tensor | None:
    x, weight, bias, numerator, denominator = operands
    given = [t for t in operands if t is not None]
    narrow = {t.dtype for t in given} <= _DTYPES and numerator.dtype == denominator.dtype
    if not narrow or x.shape[-1] > MAX_SIZE or not x.numel() or not available():
        return None
    from ridgeline.codegen.triton.norm import norm

    a, b = single(numerator), single(denominator)
    arch, _ = device_arch(x.device.index)
    config = compile_norm(
        x.shape[-1],
        dtype=x.dtype,
        arch=arch,
        weight=None if weight is None else weight.dtype,
        bias=None if bias is None else bias.dtype,
        center=True,
        numerator=tuple(a.shape),
        denominator=tuple(b.shape),
        form=form,
        coefficient_dtype=a.dtype,
    ).config
    with torch.cuda.device(x.device):
        y, _ = norm(x, None, weight, bias, a, b, eps=eps, center=True, form=form, **config.launch())
    return y


implement("CUDA", _launch)
