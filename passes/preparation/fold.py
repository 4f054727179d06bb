"""What is folded, in float64, and what it does to a layer's inputs.

    turned   W_p[rows] <- Q W_p[rows], b_p[rows] <- Q b_p[rows], W_c[:,cols] <- W_c[:,cols] Qᵀ
    scaled   W_p[n] <- W_p[n] / s[n], b_p[n] <- b_p[n] / s[n],   W_c[:,k] <- W_c[:,k] s[channel k]

with Q [D,D] orthogonal, one per key/value head, and s > 0: both cancel in real arithmetic. The
inputs of the consumer become T x, and its Hessian T H Tᵀ, T = Q or 1/s.
Q = Hadamard matrix / sqrt(D) times random signs where D is a power of two, else the orthogonal
factor of a random normal matrix. Sources: QuaRot, SpinQuant (rotations); AWQ (scales).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ridgeline.passes.preparation.sites import Consumer, Site


def orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """Q float64 [width, width]."""
    if width & (width - 1):
        drawn = torch.randn(width, width, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(drawn)
        return q * r.diagonal().sign()
    q = torch.ones(1, 1, dtype=torch.float64)
    while len(q) < width:
        q = torch.cat([torch.cat([q, q], 1), torch.cat([q, -q], 1)])
    signs = torch.randint(2, (width,), generator=generator, dtype=torch.float64) * 2 - 1
    return q / math.sqrt(width) * signs


@dataclass(frozen=True)
class Turn:
    """One rotation per head of the producer, by the head's rows."""

    matrices: dict[tuple[int, ...], Tensor]

    @classmethod
    def drawn(cls, site: Site, generator: torch.Generator) -> "Turn":
        heads = dict.fromkeys(b.rows for c in site.consumers for b in c.blocks)
        return cls({rows: orthogonal(len(rows), generator) for rows in heads})

    def produced(self, values: Tensor) -> Tensor:
        """Rows of the producer's weight [N,K], or its bias [N,1]."""
        values = values.clone()
        for rows, q in self.matrices.items():
            at = list(rows)
            values[at] = q.to(values) @ values[at]
        return values

    def averaged(self, share: Tensor) -> Tensor:
        """[N], of every head its mean."""
        share = share.clone()
        for rows in self.matrices:
            share[list(rows)] = share[list(rows)].mean()
        return share

    def consumed(self, consumer: Consumer, weight: Tensor) -> Tensor:
        """A consumer's weight [N,K]."""
        weight = weight.clone()
        for block in consumer.blocks:
            at = list(block.columns)
            weight[:, at] = weight[:, at] @ self.matrices[block.rows].to(weight).T
        return weight

    def seen(self, consumer: Consumer, hessian: Tensor) -> Tensor:
        """The Hessian [K,K] of a consumer's new inputs."""
        return self.consumed(consumer, self.consumed(consumer, hessian).T)


@dataclass(frozen=True)
class Scale:
    """scales [N] of a producer's channels."""

    scales: Tensor

    def produced(self, values: Tensor) -> Tensor:
        return values / self.scales.to(values)[:, None]

    def consumed(self, consumer: Consumer, weight: Tensor) -> Tensor:
        return weight * self.scales[consumer.channels].to(weight)

    def seen(self, consumer: Consumer, hessian: Tensor) -> Tensor:
        s = self.scales[consumer.channels].to(hessian)
        return hessian / (s[:, None] * s)


Fold = Turn | Scale


@dataclass
class Weights:
    """The constants of a model as they are after the folds so far: float64, by name."""

    model: nn.Module
    changed: dict[str, Tensor] = field(default_factory=dict)

    def get(self, name: str, transposed: bool = False) -> Tensor:
        """[N,K] or [N]."""
        held = self.changed.get(name)
        if held is None:
            held = self.model.get_parameter(name).detach().double()
        return held.T if transposed else held

    def fold(self, site: Site, fold: Fold) -> None:
        """Change the constants of a site."""
        weight = self.get(site.weight, site.transposed)
        if site.vector:
            weight = (weight + site.shift)[:, None]
            self.changed[site.weight] = fold.produced(weight)[:, 0] - site.shift
        else:
            self._put(site.weight, site.transposed, fold.produced(weight))
        if site.bias is not None:
            self.changed[site.bias] = fold.produced(self.get(site.bias)[:, None])[:, 0]
        for c in site.consumers:
            self._put(c.weight, c.transposed, fold.consumed(c, self.get(c.weight, c.transposed)))

    def _put(self, name: str, transposed: bool, weight: Tensor) -> None:
        self.changed[name] = weight.T if transposed else weight
