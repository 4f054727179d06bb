"""A mixture of multiplication primitives: each token goes to a product layer or to a shift layer.

Law, for a token x, experts E_0 (`nn.Linear`, "mult") and E_1 (`ShiftLinear`, "shift") and a router
z = R x of two logits, p = softmax(z), i = argmax z:

    y = E_i(x),    dy/dp_j = E_j(x)      (straight through the choice: both gates learn)

and the loss that shares the tokens out by the experts' latencies l_j on the target,

    L = CV²(α_j sum_t n_j(t)) + CV²(α_j sum_t P_j(t)),   α_j = l_j / sum l,   CV² = var / mean²
    n_j(t) = 1 if j = i(t) else 0, with the gradient of p_j(t)
    P_j(t) = Φ((z_j - z_other) / σ), σ = 1/2             (the chance that j wins under noise)

which is least where the tokens of j are as 1 / l_j: both experts are then busy equally long. The
paper sums p_j where n_j stands; of undecided tokens that says little about where they go (measured
on digits: 75 % sent where 60 % were asked for).

In eval mode only what is routed to an expert is computed by it, up to static capacities per sample

    c_j = min(N, ceil(capacity N share_j)),   share_j = (1/l_j) / sum 1/l,   c_0 + c_1 >= N

The N tokens of a sample are sorted by z_0 - z_1; the mult expert reads the first c_0, the shift
expert the last c_1, and the cut between them is where z_0 - z_1 changes sign, or the nearest
place that both can serve: overflow goes to the other expert, the least certain tokens first.
Capacities are a sample's, so no result depends on the batch, and no size on the data.

Source: You et al., ShiftAddViT (2023), section 4.3. In the published code the loss is off, the
gates are constants, noise stays on in eval, and outputs pass through exp and log: not so here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ridgeline.passes.shift_add_vit.errors import ShiftAddError
from ridgeline.passes.shift_add_vit.shift_linear import ShiftLinear

EXPERTS = ("mult", "shift")
NOISE = 0.5
"""Standard deviation of the law's noise: one over the number of experts."""
PARTS = 64
"""Shares are rounded to 1 / PARTS, so that capacities are integer arithmetic on N."""


class MixtureOfPrimitives(nn.Module):
    """Two experts for the same linear map, and a router.

    mult: the trained layer, the first expert; the second starts as its rounding to `terms` powers.
    latencies: seconds of each expert on the target for the same tokens; only their ratio counts.
    capacity: how many times its share an expert can serve, >= 1; 2 or more drops nothing in most
        samples, 1 saves most.
    x [B,N,K] -> [B,N,O], x's dtype. Raises ShiftAddError for other inputs and options.
    """

    def __init__(
        self,
        mult: nn.Linear,
        latencies: tuple[float, float],
        *,
        terms: int = 1,
        capacity: float = 1.25,
    ) -> None:
        super().__init__()
        if len(latencies) != 2 or not all(0 < seconds < float("inf") for seconds in latencies):
            raise ShiftAddError(f"latencies is {latencies!r}; give two positive numbers of seconds")
        if not capacity >= 1:
            raise ShiftAddError(f"capacity is {capacity!r}; choose 1 or more, as 1.25")
        self.mult, self.shift = mult, ShiftLinear.of(mult, terms=terms)
        self.latencies, self.capacity = tuple(latencies), capacity
        options = {"device": mult.weight.device, "dtype": mult.weight.dtype}
        self.router = nn.Linear(mult.in_features, len(EXPERTS), **options)
        self.balance: Tensor | None = None
        """L of the last forward in train mode."""

    @property
    def shares(self) -> tuple[float, float]:
        """The tokens that each expert should get, by its latency."""
        speeds = [1 / seconds for seconds in self.latencies]
        return speeds[0] / sum(speeds), speeds[1] / sum(speeds)

    def capacities(self, tokens: Any) -> tuple[Any, Any]:
        """(c_0, c_1) for samples of `tokens` tokens, an int or a SymInt."""
        parts = [min(PARTS, -int(-PARTS * share * self.capacity // 1)) for share in self.shares]
        return tuple((tokens * part + PARTS - 1) // PARTS for part in parts)  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        """x [B,N,K] -> [B,N,O]."""
        if x.dim() != 3:
            raise ShiftAddError(
                f"a mixture routes the tokens of samples: expected x [B,N,K], found"
                f" {list(x.shape)}; name the layer in `ignore`"
            )
        logits = self.router(x)
        return self._trained(x, logits) if self.training else self._dispatched(x, logits)

    def routed(self, x: Tensor) -> Tensor:
        """Which expert each token of x [B,N,K] is to go to, capacities apart: int64 [B,N]."""
        return self.router(x).argmax(-1)

    def _trained(self, x: Tensor, logits: Tensor) -> Tensor:
        p = logits.float().softmax(-1)
        chosen = nn.functional.one_hot(logits.argmax(-1), len(EXPERTS)).to(p.dtype)
        gates = chosen + (p - p.detach())
        self.balance = self._imbalance(gates, logits.float())
        gates = gates.to(x.dtype)
        return gates[..., :1] * self.mult(x) + gates[..., 1:] * self.shift(x)

    def _imbalance(self, gates: Tensor, logits: Tensor) -> Tensor:
        alpha = logits.new_tensor(self.latencies) / sum(self.latencies)
        margin = (logits - logits.flip(-1)) / NOISE
        wins = torch.special.ndtr(margin)
        loads = (alpha * gates.flatten(0, -2).sum(0), alpha * wins.flatten(0, -2).sum(0))
        first, second = (load.var(correction=0) / load.mean().square() for load in loads)
        return first + second

    def _dispatched(self, x: Tensor, logits: Tensor) -> Tensor:
        tokens = x.shape[1]
        most_mult, most_shift = self.capacities(tokens)
        margin = logits[..., 0] - logits[..., 1]
        order = margin.argsort(dim=1, descending=True, stable=True)
        # a tie goes to the first expert, as argmax has it
        wanted = (margin >= 0).sum(1, keepdim=True)
        cut = wanted.clamp(min=tokens - most_shift, max=most_mult)
        sorted_x = x.gather(1, order.unsqueeze(-1).expand_as(x))
        mult = self.mult(sorted_x[:, :most_mult])
        shift = self.shift(sorted_x[:, tokens - most_shift :])
        # both: positions that either expert has computed
        start, stop = tokens - most_shift, most_mult
        position = torch.arange(tokens, device=x.device)[start:stop]
        either = torch.where(
            (position < cut).unsqueeze(-1), mult[:, start:], shift[:, : stop - start]
        )
        sorted_y = torch.cat((mult[:, :start], either, shift[:, stop - start :]), 1)
        back = order.argsort(dim=1)
        return sorted_y.gather(1, back.unsqueeze(-1).expand_as(sorted_y))

    def __getstate__(self) -> dict[str, Any]:
        """Without the loss of the last forward, whose graph can be neither copied nor saved."""
        return {**self.__dict__, "balance": None}

    def extra_repr(self) -> str:
        return f"shares {self.shares[0]:.2f}/{self.shares[1]:.2f}, capacity {self.capacity}"


def balance_loss(model: nn.Module) -> Tensor:
    """The mean of the mixtures' losses L in the last forward, a scalar with gradient.

    Raises ShiftAddError where no mixture has run in train mode.
    """
    mixtures = [m for m in model.modules() if isinstance(m, MixtureOfPrimitives)]
    losses = [m.balance for m in mixtures if m.balance is not None]
    if not losses:
        raise ShiftAddError(
            f"none of the model's {len(mixtures)} mixtures has run in train mode; call the model"
            " after model.train(), and ask for the loss before the next call"
        )
    return torch.stack(losses).mean()
