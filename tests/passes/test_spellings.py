"""Attention spelled at random: always rewritten once and equal; spoilt, still equal."""

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

B, H, S, D = 2, 4, 5, 8
INF = float("inf")

few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

SCALES = {
    "on the query": lambda q, k: (q * 0.3) @ k.transpose(-1, -2),
    "on the query, divided": lambda q, k: (q / 3) @ k.transpose(2, 3),
    "on the key": lambda q, k: q @ (0.3 * k).transpose(-2, -1),
    "on the transposed key": lambda q, k: q @ (k.transpose(-2, -1) * 0.3),
    "on both": lambda q, k: (q * 0.5) @ (k * 0.6).transpose(-2, -1),
    "after": lambda q, k: q @ k.transpose(-1, -2) * 0.3,
    "after, first": lambda q, k: 0.3 * (q @ k.mT),
    "after, divided": lambda q, k: torch.matmul(q, k.permute(0, 1, 3, 2)) / 3.0,
    "after, in place": lambda q, k: (q @ k.transpose(-1, -2)).mul(0.3),
    "none": lambda q, k: q @ k.transpose(-1, -2),
}


def _causal(z: Tensor) -> Tensor:
    return torch.ones(z.shape[-2], z.shape[-1], dtype=torch.bool, device=z.device).tril()


MASKS = {
    "none": lambda z: z,
    "added": lambda z: z + torch.where(_causal(z), 0.0, -INF),
    "added, first": lambda z: torch.where(_causal(z), 0.0, -INF) + z,
    "added in four dimensions": lambda z: z + torch.where(_causal(z), 0.0, -INF)[None, None],
    "filled": lambda z: z.masked_fill(~_causal(z), -INF),
    "filled by a comparison": lambda z: z.masked_fill(_causal(z) == 0, -INF),
    "chosen": lambda z: torch.where(_causal(z), z, -INF),
    "chosen from a tensor": lambda z: torch.where(_causal(z), z, torch.full((), -INF)),
    "upper triangle": lambda z: z + torch.full((S, S), -INF).triu(1),
    "penalty": lambda z: z + -torch.arange(S).float(),
}

WEIGHTS = {
    "function": lambda z: F.softmax(z, dim=-1),
    "method": lambda z: z.softmax(3),
    "with dtype": lambda z: F.softmax(z, dim=-1, dtype=torch.float32),
    "no dropout": lambda z: F.dropout(torch.softmax(z, -1), 0.1, training=False),
    "cast": lambda z: torch.softmax(z.float(), -1).to(z.dtype),
}

OPERANDS = {
    "as they come": lambda q, k, v: (q, k, v),
    "split heads": lambda q, k, v: tuple(
        x.transpose(1, 2).reshape(B, -1, x.shape[1] * D).view(B, -1, x.shape[1], D).transpose(1, 2)
        for x in (q, k, v)
    ),
    "repeated": lambda q, k, v: (
        q,
        *(x[:, :2, None].expand(B, 2, 2, S, D).reshape(B, H, S, D) for x in (k, v)),
    ),
    "tiled": lambda q, k, v: (q, k[:, :2].repeat(1, 2, 1, 1), v[:, :2].repeat(1, 2, 1, 1)),
    "interleaved": lambda q, k, v: (
        q,
        *(x[:, :2].repeat_interleave(2, 1) for x in (k, v)),
    ),
}


def _inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, S, D, generator=generator) for _ in range(3)]


@given(*(st.sampled_from(sorted(d)) for d in (OPERANDS, SCALES, MASKS, WEIGHTS)))
@few
def test_every_spelling_is_rewritten_once(rewrite, assert_equal, operands, scale, mask, weights):
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = OPERANDS[operands](q, k, v)
        return WEIGHTS[weights](MASKS[mask](SCALES[scale](q, k))) @ v

    inputs = _inputs()
    result = rewrite(attention, inputs)
    assert len(result.attentions) == 1, result.reasons
    assert_equal(result(*inputs), attention(*inputs), factor=2)


SPOILT = {
    "wrong axis": lambda q, k, v, z: torch.softmax(z, -2) @ v,
    "weights read": lambda q, k, v, z: (p := torch.softmax(z, -1)) @ v + p.mean(),
    "scores read": lambda q, k, v, z: torch.softmax(z, -1) @ v + z.nan_to_num(neginf=0).mean(),
    "log": lambda q, k, v, z: torch.log_softmax(z.clamp_min(-9), -1) @ v,
    "capped": lambda q, k, v, z: torch.softmax(torch.tanh(z), -1) @ v,
    "sink": lambda q, k, v, z: torch.softmax(F.pad(z, (0, 1)), -1)[..., :-1] @ v,
    "renormalised": lambda q, k, v, z: F.normalize(torch.softmax(z, -1), dim=-1) @ v,
    "scaled by a tensor": lambda q, k, v, z: torch.softmax(z * v.abs().mean(), -1) @ v,
    "boolean added": lambda q, k, v, z: torch.softmax(z + _causal(z), -1) @ v,
    "transposed weights": lambda q, k, v, z: torch.softmax(z, -1).mT @ v,
    "doubled": lambda q, k, v, z: torch.softmax(z, -1) @ v + torch.softmax(z, -1) @ v,
    "masked after": lambda q, k, v, z: torch.softmax(z, -1).tril() @ v,
}


@given(*(st.sampled_from(sorted(d)) for d in (OPERANDS, SCALES, MASKS, SPOILT)))
@few
def test_near_misses_stay_equal(rewrite, assert_equal, operands, scale, mask, spoilt):
    def nearly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = OPERANDS[operands](q, k, v)
        return SPOILT[spoilt](q, k, v, MASKS[mask](SCALES[scale](q, k)))

    inputs = _inputs()
    result = rewrite(nearly, inputs)
    assert len(result.attentions) <= 2
    assert_equal(result(*inputs), nearly(*inputs), factor=4)
