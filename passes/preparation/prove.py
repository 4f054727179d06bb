"""The evidence for a fold: the captured model with its old and its new constants, in float64.

Both run on the given inputs and on random ones of the same shapes (integers drawn from the range of
the given ones; masks stay as they are), every floating dtype in the graph widened. The constants
are widened where they are read, one at a time, so that the proof takes little memory.
"""

import torch
from torch import Tensor, fx

from ridgeline.ir.errors import RidgelineError
from ridgeline.passes.certify import EQUIVALENCE_LIMIT, in_float64, relative_error

RANDOM_RUNS = 1


class UnprovenError(RidgelineError):
    """A fold that changes what the model computes; the model is left as it was."""


@torch.no_grad()
def prove(module: fx.GraphModule, inputs: tuple[Tensor, ...], changed: dict[str, Tensor]) -> float:
    """The largest relative error met, at most EQUIVALENCE_LIMIT; module is widened in place.

    changed: float64 constants by name. Raises UnprovenError above the limit.
    """
    in_float64(module)
    worst = 0.0
    for run in range(1 + RANDOM_RUNS):
        given = [_wide(x) if run == 0 else _random(x, run) for x in inputs]
        expected, got = (_run(module, constants, given) for constants in ({}, changed))
        worst = max(worst, relative_error(got, expected))
    if not worst <= EQUIVALENCE_LIMIT:
        raise UnprovenError(
            f"the prepared model differs from the given one by {worst:.1e} in float64, allowed"
            f" {EQUIVALENCE_LIMIT:.0e}; the model is left as it was: please report it"
        )
    return worst


def _run(
    module: fx.GraphModule, changed: dict[str, Tensor], inputs: list[Tensor]
) -> tuple[Tensor, ...]:
    """The outputs; what the graph drops at random is the same in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _Run(module, changed).run(*(x.clone() for x in inputs))


class _Run(fx.Interpreter):
    """A graph with some of its constants replaced, all of them in float64."""

    def __init__(self, module: fx.GraphModule, changed: dict[str, Tensor]) -> None:
        super().__init__(module)
        self.changed = changed

    def fetch_attr(self, target: str) -> Tensor:
        found = self.changed.get(target)
        return _wide(super().fetch_attr(target)) if found is None else found


def _wide(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x


def _random(x: Tensor, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    if x.is_floating_point():
        return torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.device)
    if x.dtype == torch.bool or not x.numel() or int(x.max()) - int(x.min()) < 2:
        return x
    drawn = torch.randint(int(x.min()), int(x.max()) + 1, x.shape, generator=draw)
    return drawn.to(x)
