"""Modules that are nearly a site, each with its blocking line marked ``# blocks``."""

import torch
import torch.nn.functional as F
from torch import nn


class SoftCapped(nn.Module):
    """Attention whose scores, biased already, pass through tanh."""

    def forward(self, q, k, v):
        scores = q @ k.transpose(-2, -1) / 4.0 + torch.linspace(0, 1, k.shape[-2])
        scores = torch.tanh(scores / 30.0) * 30.0  # blocks
        return torch.softmax(scores, -1) @ v


class Activated(nn.Module):
    """Attention whose weights pass through an activation."""

    def forward(self, q, k, v):
        weights = torch.softmax(q @ k.transpose(-2, -1) / 4.0, -1)
        weights = torch.relu(weights)  # blocks
        return weights @ v


class WrongAxis(nn.Module):
    """A softmax over the queries."""

    def forward(self, q, k, v):
        scores = q @ k.transpose(-2, -1) / 4.0
        weights = torch.softmax(scores, -2)  # blocks
        return weights @ v


class Returned(nn.Module):
    """Attention weights that are an output too."""

    def forward(self, q, k, v):
        scores = q @ k.transpose(-2, -1) / 4.0
        weights = torch.softmax(scores, -1)  # blocks
        return weights @ v, weights


class EpsOutside(nn.Module):
    """An RMS norm with eps added to the inverse root."""

    def forward(self, q, k, v):
        inverse = torch.rsqrt(q.pow(2).mean(-1, keepdim=True))
        inverse = inverse + 1e-6  # blocks
        return q * inverse


class SumOfSquares(nn.Module):
    """An RMS norm that does not divide by the size."""

    def forward(self, q, k, v):
        total = q.pow(2).sum(-1, keepdim=True)  # blocks
        return q * torch.rsqrt(total + 1e-6)


class ComputedWeight(nn.Module):
    """A linear layer whose weight depends on the input."""

    def forward(self, q, k, v):
        weight = k[0, 0].exp()
        return F.linear(q, weight)  # blocks


NEAR_MISSES = (
    (SoftCapped, "flash_attention", "'tanh'", "soft-cap"),
    (Activated, "flash_attention", "'relu'", "let 'matmul' read 'softmax'"),
    (WrongAxis, "flash_attention", "'softmax'", "pass -1"),
    (Returned, "flash_attention", "'softmax'", "drop that other use"),
    (EpsOutside, "norm", "'add'", "left out"),
    (SumOfSquares, "norm", "'sum'", "with 'mean'"),
    (ComputedWeight, "quantized_linear", "the weight is", "use a parameter"),
)
"""(module, the pass refused, what the reason names, what it says to do)"""
