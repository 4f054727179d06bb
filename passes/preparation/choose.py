"""Which fold a site gets: the one under which coding its layers harms the model least.

Law: over the linear layers whose weights a fold changes (of a producer of scaled channels only the
rows' lengths change, which no codec minds), the harm of `quantization.allocate`,

    D = 1/4 sum over layers, rows n   f[n] (E H Eᵀ)[n,n],     E = W - Ŵ

with Ŵ as `descend` codes a sample of the rows in one round, H = 2/n sum x xᵀ of the inputs as they
are under the fold, f[n] the mean square of the gradient at output n. Of turned outputs f is taken
as its mean over the head: what random signs make of it. Offered are nothing, and

    turned   one drawing of rotations,
    scaled   s[n] = rms(x[n])^a / their geometric mean, a in EXPONENTS; powers of two where weights
             have 16 bits, so that folding rounds nothing.

Nothing wins where nothing is better: D never rises. Errors relative to each layer's own output do
not serve: they gave a value projection's gain for a larger loss of q and k (SmolLM2).
Source: AWQ (scales by a grid of exponents).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ridgeline.passes.copy_model import copy_model
from ridgeline.passes.preparation.fold import Fold, Scale, Turn, Weights
from ridgeline.passes.preparation.sites import Site
from ridgeline.passes.quantization.allocate import SAMPLE_ROWS, fisher_of
from ridgeline.passes.quantization.calibrate import Batch, accumulate, shared_inputs
from ridgeline.passes.quantization.codec import Codec
from ridgeline.passes.quantization.descent import descend

EXPONENTS = (0.125, 0.25, 0.5, 0.75)
WIDEST = 10.0
"""Scales stay within 2**-10 and 2**10, which no weight's dtype overflows at."""
HESSIAN_BYTES = 2**30
"""Of the Hessians that live at once; their sites are calibrated in one pass over the batches."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a site got, and the harm D of its layers without and with it, where that is known."""

    site: Site
    fold: Fold | None
    chosen: str
    before: float | None
    after: float | None


def choose(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], codec: Codec, seed: int
) -> tuple[Weights, list[Outcome]]:
    """The constants after the best fold of each site, in the order of execution."""
    weights, outcomes, names = Weights(model), [], list(_measured(sites))
    fisher = fisher_of(copy_model(model).eval(), names, batches)
    generator = torch.Generator().manual_seed(seed)
    scaled: dict[str, Tensor] = {}
    shared = shared_inputs(model, names, batches)
    leaders = {name: leader for leader, readers in shared.items() for name in readers}
    for part in _parts(model, sites, leaders):
        needed = {leaders[name]: shared[leaders[name]] for name in _measured(part)}
        hessians = accumulate(model, needed, batches, lambda: None, shared.uses)
        for site in part:
            outcome = _best(site, weights, hessians, fisher, scaled, codec, generator)
            outcomes.append(outcome)
            if outcome.fold is not None:
                weights.fold(site, outcome.fold)
            if isinstance(outcome.fold, Scale):
                scaled |= {c.path: outcome.fold.scales[c.channels] for c in site.consumers}
    return weights, outcomes


def _measured(sites: Sequence[Site]) -> dict[str, None]:
    """Paths of the layers whose errors count: all consumers, and producers of turned channels."""
    found: dict[str, None] = {}
    for site in sites:
        if site.turned and site.module is not None:
            found[site.module] = None
        found |= dict.fromkeys(c.path for c in site.consumers)
    return found


def _parts(
    model: nn.Module, sites: Sequence[Site], leaders: dict[str, str]
) -> Iterator[list[Site]]:
    """Sites in order, cut where their Hessians would take more than HESSIAN_BYTES."""
    part: list[Site] = []
    held: set[str] = set()
    for site in sites:
        needed = held | {leaders[name] for name in _measured([site])}
        size = sum(4 * max(model.get_parameter(f"{n}.weight").shape) ** 2 for n in needed)
        if part and size > HESSIAN_BYTES:
            yield part
            part, needed = [], needed - held
        part.append(site)
        held = needed
    yield part


def _best(
    site: Site,
    weights: Weights,
    hessians: dict[str, Tensor],
    fisher: dict[str, Tensor],
    scaled: dict[str, Tensor],
    codec: Codec,
    generator: torch.Generator,
) -> Outcome:
    def seen(path: str) -> Tensor:
        s = scaled.get(path)
        hessian = hessians[path]
        return hessian if s is None else hessian / (s[:, None] * s).to(hessian)

    def error(fold: Fold | None) -> float:
        total = 0.0
        if site.turned and site.module is not None:
            weight, share = weights.get(site.weight, site.transposed), fisher[site.module]
            if isinstance(fold, Turn):
                weight, share = fold.produced(weight), fold.averaged(share)
            total += coded_harm(weight, seen(site.module), share, codec)
        for c in site.consumers:
            weight = weights.get(c.weight, c.transposed)
            hessian = seen(c.path)
            if fold is not None:
                weight, hessian = fold.consumed(c, weight), fold.seen(c, hessian)
            total += coded_harm(weight, hessian, fisher[c.path], codec)
        return total

    offered: dict[str, Fold] = {}
    if site.turned:
        offered["turned"] = Turn.drawn(site, generator)
    else:
        loud = _loudness(site, {c.path: seen(c.path) for c in site.consumers})
        narrow = weights.model.get_parameter(site.weight).dtype.itemsize < 4
        for a in EXPONENTS:
            power = (a * (loud - loud.mean())).clamp(-WIDEST, WIDEST)
            offered[f"scaled by rms^{a}"] = Scale((power.round() if narrow else power).exp2())
    before = error(None)
    errors = {name: error(fold) for name, fold in offered.items()}
    best = min(errors, key=lambda name: errors[name])
    if errors[best] >= before:
        return Outcome(site, None, "nothing is better", before, before)
    return Outcome(site, offered[best], best, before, errors[best])


def _loudness(site: Site, hessians: dict[str, Tensor]) -> Tensor:
    """log2 rms [N] of the producer's channels; of silent ones and those not read, the mean."""
    power = torch.zeros(site.count, dtype=torch.float64)
    reads = torch.zeros(site.count, dtype=torch.float64)
    for c in site.consumers:
        power.index_add_(0, c.channels, hessians[c.path].diagonal().double().cpu() / 2)
        reads.index_add_(0, c.channels, torch.ones(len(c.channels), dtype=torch.float64))
    heard = power > 0
    loud = 0.5 * (power / reads.clamp_min(1)).clamp_min(torch.finfo(torch.float64).tiny).log2()
    mean = loud[heard].mean() if bool(heard.any()) else torch.zeros(())
    return torch.where(heard, loud, mean.double())


def coded_harm(weight: Tensor, hessian: Tensor, share: Tensor, codec: Codec) -> float:
    """D of weight [N,K] in `codec`, by every N/48-th row; share: f [N]."""
    picked = torch.arange(0, len(weight), max(1, len(weight) // SAMPLE_ROWS))
    rows = weight[picked].float()
    lost = rows - descend(rows, codec, hessian.float(), rounds=0).dequantize()
    harm = ((lost @ hessian) * lost).sum(1) @ share[picked] / 4
    return float(harm) * len(weight) / len(picked)
