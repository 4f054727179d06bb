"""Attention on this CPU: ridgeline's TVM kernels against torch's scaled_dot_product_attention.

Training is forward and backward through autograd on both sides.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.codegen.tvm import attention_training
from ridgeline.codegen.tvm.attention import attention
from ridgeline.cost_model import Attention, Work, load_target
from ridgeline.tools.predicted import log_timings
from ridgeline.tools.timing import Timings, interleave

BASELINE = "torch SDPA"
HEADS, DIM = 8, 64
QUERY_HEADS, KEY_HEADS = 9, 3  # SmolLM2-135M


def cases(rounds: int) -> Iterator[tuple[str, Timings]]:
    """(title, timings): causal prefill and training over lengths, decoding with grouped heads."""
    for dtype in (torch.float32, torch.bfloat16):
        for length in (512, 1024, 2048, 4096):
            yield f"causal, 8 heads of 64, S={length}, {dtype}", _causal(length, dtype, rounds)
        for length in (512, 1024, 2048, 4096):
            yield f"training, causal, S={length}, {dtype}", _training(length, dtype, rounds)
        for length in (512, 2048):
            yield f"decoding, 9 heads on 3, Sk={length}, {dtype}", _decode(length, dtype, rounds)


def _random(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


@torch.inference_mode()
def _causal(length: int, dtype: torch.dtype, rounds: int) -> Timings:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (_random(generator, dtype, 1, HEADS, length, DIM) for _ in range(3))
    functions = {
        BASELINE: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "ridgeline": lambda: attention(q, k, v, scale=DIM**-0.5, diagonal=0),
    }
    work = Attention(1, HEADS, HEADS, length, length, DIM, DIM, causal=True, dtype=dtype)
    return _logged(interleave(functions, baseline=BASELINE, rounds=rounds), work)


def _training(length: int, dtype: torch.dtype, rounds: int) -> Timings:
    generator = torch.Generator().manual_seed(0)
    shape = 1, HEADS, length, DIM
    operands = [_random(generator, dtype, *shape).requires_grad_() for _ in range(3)]
    grad = _random(generator, dtype, *shape)

    def step(forward: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(*operands), operands, grad)

    functions = {
        BASELINE: step(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True)),
        "ridgeline": step(lambda *x: attention_training.OP(*x, scale=DIM**-0.5, diagonal=0)[0]),
    }
    return interleave(functions, baseline=BASELINE, rounds=rounds)


@torch.inference_mode()
def _decode(length: int, dtype: torch.dtype, rounds: int) -> Timings:
    generator = torch.Generator().manual_seed(0)
    q = _random(generator, dtype, 1, QUERY_HEADS, 1, DIM)
    k, v = (_random(generator, dtype, 1, KEY_HEADS, length, DIM) for _ in range(2))
    functions = {
        BASELINE: lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "ridgeline": lambda: attention(q, k, v, scale=DIM**-0.5),
    }
    work = Attention(1, QUERY_HEADS, KEY_HEADS, 1, length, DIM, DIM, dtype=dtype)
    return _logged(interleave(functions, baseline=BASELINE, rounds=rounds), work)


def _logged(timings: Timings, work: Attention) -> Timings:
    """The timings, after both contenders stand in the log of predictions."""
    works = {
        BASELINE: Work((work,)),
        "ridgeline": Work((dataclasses.replace(work, library="ridgeline"),)),
    }
    log_timings(f"attention, {work.q} on {work.kv}", timings, works, load_target("cpu"))
    return timings
