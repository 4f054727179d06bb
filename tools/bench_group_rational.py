"""The rational function on this CPU: ridgeline's TVM kernels against eager PyTorch and Inductor.

x [8192, 768] fp32, 8 groups, degrees 5 and 4, form "abs_terms"; with a LayerNorm before it at three
sizes; and in the place of activations that it was fitted to. Every contender allocates its results
per call, and forward + backward runs through autograd, so that only the kernels differ.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import ridgeline.codegen.group_rational  # noqa: F401 - registers the kernels
from ridgeline.ir.group_rational import GROUP_RATIONAL
from ridgeline.ir.norm_rational import LAYER_NORM_RATIONAL
from ridgeline.ir.rational_fit import fit
from ridgeline.passes.rational_activation import ACTIVATIONS
from ridgeline.tools.timing import Timings, interleave

BASELINE = "Inductor, Horner"
ROWS, CHANNELS, GROUPS = 8192, 768, 8
NORMS = ((8192, 768), (1576, 192), (1632, 64))
"""Rows and channels: beyond the caches; eight images of KAT-T; the batch of `examples/kat.py`."""
NAMES = ("gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "relu")
ACTIVATION_ROWS = 256
"""Few enough that fp32 stays in the second-level cache."""


def horner(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The law by Horner's rule, as one would write it."""
    shape = x.shape
    x = x.unflatten(-1, (len(a), -1))
    z, c = x.abs(), b.abs()
    top, bottom = a[:, 5, None], c[:, 3, None]
    for i in (4, 3, 2, 1, 0):
        top = top * x + a[:, i, None]
    for i in (2, 1, 0):
        bottom = bottom * z + c[:, i, None]
    return (top / (1 + bottom * z)).reshape(shape)


def powers(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The law by explicit powers and a batched product, as in KAT's plain torch code."""
    shape, groups = x.shape, len(a)
    z = x.reshape(-1, groups, shape[-1] // groups).permute(1, 0, 2).reshape(groups, -1)
    of_x, of_z = [torch.ones_like(z)], [torch.ones_like(z)]
    for _ in range(a.shape[1] - 1):
        of_x.append(of_x[-1] * z)
        of_z.append(of_z[-1] * z.abs())
    top = torch.bmm(a.unsqueeze(1), torch.stack(of_x, 1)).squeeze(1)
    c = torch.cat((b.new_ones(groups, 1), b, b.new_zeros(groups, 1)), 1).abs()
    y = top / torch.bmm(c.unsqueeze(1), torch.stack(of_z, 1)).squeeze(1)
    return y.reshape(groups, -1, shape[-1] // groups).permute(1, 0, 2).reshape(shape)


def _functions() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    return {
        BASELINE: torch.compile(horner),
        "eager, Horner": horner,
        "eager, powers": powers,
        "ridgeline": GROUP_RATIONAL.overload,
    }


def _operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, CHANNELS, generator=generator)
    a, b = (0.3 * torch.randn(GROUPS, k, generator=generator) for k in (6, 4))
    return [t.requires_grad_() for t in (x, a, b)]


def _gradients(function: Callable[..., Tensor], operands: list[Tensor], grad: Tensor):
    return torch.autograd.grad(function(*operands), operands, grad)


def cases(rounds: int) -> Iterator[tuple[str, Timings]]:
    """(title, timings) of the forward alone, without autograd, and of forward and backward."""
    operands = _operands()
    grad = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(1))

    def forward(function) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: function(*operands))

    def both(function) -> Callable[[], object]:
        return lambda: _gradients(function, operands, grad)

    title = f"group_rational, {ROWS} x {CHANNELS} fp32, {GROUPS} groups"
    for name, work in (("forward", forward), ("forward and backward", both)):
        functions = {contender: work(f) for contender, f in _functions().items()}
        yield f"{title}: {name}", interleave(functions, baseline=BASELINE, rounds=rounds)


def norms(rounds: int) -> Iterator[tuple[str, Timings]]:
    """(title, timings) of LayerNorm and the rational function after it, without autograd."""
    generator = torch.Generator().manual_seed(0)
    a, b = (0.3 * torch.randn(GROUPS, k, generator=generator) for k in (6, 4))
    separate = {
        BASELINE: torch.compile(
            lambda x, w, c: horner(F.layer_norm(x, x.shape[-1:], w, c), a, b), dynamic=False
        ),
        "Inductor's LayerNorm, ridgeline's rational": torch.compile(
            lambda x, w, c: GROUP_RATIONAL.overload(F.layer_norm(x, x.shape[-1:], w, c), a, b),
            dynamic=False,
        ),
        "ridgeline": lambda x, w, c: LAYER_NORM_RATIONAL.overload(x, w, c, a, b, eps=1e-5),
    }
    for rows, channels in NORMS:
        shapes = ((rows, channels), (channels,), (channels,))
        given = [torch.randn(shape, generator=generator) for shape in shapes]
        functions = {
            name: torch.no_grad()(lambda f=f, given=given: f(*given))
            for name, f in separate.items()
        }
        title = f"LayerNorm and group_rational, {rows} x {channels} fp32, {GROUPS} groups"
        yield title, interleave(functions, baseline=BASELINE, rounds=rounds)


def activations(rounds: int) -> Iterator[tuple[str, Timings]]:
    """(title, timings) of activations and of rational functions fitted to them over |x| <= 4."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(ACTIVATION_ROWS, CHANNELS, generator=generator).to(dtype)
        for name, function in ACTIVATIONS.items():
            if name == "identity":
                continue
            found = fit(function, 5, 4, 4.0)
            a, b = (torch.tensor([c]).float() for c in (found.numerator, found.denominator))
            # Dynamo counts torch's own functions as one: past the eighth they would be eager.
            torch.compiler.reset()
            compiled = torch.compile(function, dynamic=False)
            functions = {
                "Inductor": lambda x=x, f=compiled: f(x),
                "ridgeline": lambda x=x, a=a, b=b: GROUP_RATIONAL.overload(x, a, b),
            }
            title = f"{name}, {ACTIVATION_ROWS} x {CHANNELS} {dtype}, as a rational function"
            quiet = {n: torch.no_grad()(f) for n, f in functions.items()}
            yield title, interleave(quiet, baseline="Inductor", rounds=rounds)


def errors() -> dict[str, tuple[float, float, float]]:
    """Relative Frobenius error of (dx, da, db) against float64, of each contender."""
    operands = _operands()
    grad = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(1))
    wide = [t.detach().double().requires_grad_() for t in operands]
    exact = _gradients(horner, wide, grad.double())
    found = {}
    for name, function in _functions().items():
        gradients = _gradients(function, operands, grad)
        found[name] = tuple(
            float((own.double() - law).norm() / law.norm())
            for own, law in zip(gradients, exact, strict=True)
        )
    return found
