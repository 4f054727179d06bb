"""A Kolmogorov-Arnold transformer (KAT) from end to end: trained thrice, timed side by side.

    pip install 'ridgeline[examples]'      # scikit-learn, for its digits
    python examples/kat.py                 # digits and Fashion-MNIST
    python examples/kat.py --data digits

    ViT              the transformer that KAT starts from: linear, GELU, linear
    KAT, eager       rational, linear, rational, linear: the rationals in plain PyTorch
    KAT, ridgeline   the same from the same seed, the rationals `ridgeline.nn.GroupRational`

The two KATs must train alike: the table shows how far their losses part over the first steps, where
rounding has not grown yet, and where all three end. Times are of one training step (forward,
backward, fused AdamW), interleaved: as they are, and compiled, torch.compile's own backend beside
ridgeline's. Coefficients start as KAT has them: the identity before the first layer, SiLU before
the second, 8 groups, degrees 5 and 4. Source: Yang and Wang, Kolmogorov-Arnold Transformer.
"""

import argparse
import copy
import functools
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from images import Data, ViT, add_arguments, batches, chosen
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from ridgeline.nn import GroupRational
from ridgeline.tools.timing import interleave

GROUPS = 8
EPOCHS = {"digits": 30, "Fashion-MNIST": 2}
ALIKE = 20
"""Steps over which the losses of the two KATs are compared number by number."""
console = Console(width=None if sys.stdout.isatty() else 120)


class EagerRational(GroupRational):
    """The same function of the same parameters by Horner's rule in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        groups = x.unflatten(-1, (self.groups, -1))
        size, a = groups.abs(), self.numerator.unsqueeze(-1)
        b = torch.where(self.denominator >= 0, self.denominator, -self.denominator).unsqueeze(-1)
        top, bottom = a[:, -1], b[:, -1]
        for i in reversed(range(a.shape[1] - 1)):
            top = top * groups + a[:, i]
        for i in reversed(range(b.shape[1] - 1)):
            bottom = bottom * size + b[:, i]
        return (top / (1 + bottom * size)).flatten(-2)


class Rationals(nn.Sequential):
    """KAT's feed-forward layer: rational, linear, rational, linear."""

    def __init__(self, dim: int, rational: type[GroupRational]) -> None:
        super().__init__(
            rational(dim, GROUPS, "identity"),
            nn.Linear(dim, 4 * dim),
            rational(4 * dim, GROUPS, "silu"),
            nn.Linear(4 * dim, dim),
        )


def model(data: Data, seed: int, feed: Callable[[int], nn.Module] | None = None) -> nn.Module:
    """The transformer of that feed-forward layer, the ViT's own by default, from a seed."""
    torch.manual_seed(seed)
    options = {} if feed is None else {"feed": feed}
    return ViT(data.images.shape[1], data.patch, **options)


def train(network: nn.Module, data: Data, epochs: int, name: str, seed: int) -> list[float]:
    """Train in place; the loss of every step."""
    torch.manual_seed(seed + 1)
    steps = epochs * -(-len(data.images) // data.batch)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.15)
    losses = []
    with Progress(console=console) as progress:
        task = progress.add_task(f"{data.name}: {name}", total=steps)
        for _ in range(epochs):
            for images, labels in batches(data):
                loss = F.cross_entropy(network(images), labels, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                progress.update(task, advance=1, description=f"{data.name}: {name} {loss:.3f}")
    return losses


@torch.no_grad()
def accuracy(network: nn.Module, data: Data) -> float:
    parts = zip(data.test_images.split(250), data.test_labels.split(250), strict=True)
    return sum((network(x).argmax(1) == y).sum().item() for x, y in parts) / len(data.test_labels)


def step(network: nn.Module, data: Data, backend: str | None) -> Callable[[], object]:
    """One training step on one batch, compiled by `backend` where there is one."""
    network = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-5, fused=True)
    options = {"target": "cpu"} if backend == "ridgeline" else None
    run = network if backend is None else torch.compile(network, backend=backend, options=options)
    images, labels = data.images[: data.batch], data.labels[: data.batch]

    def once() -> None:
        optimizer.zero_grad()
        F.cross_entropy(run(images), labels).backward()
        optimizer.step()

    return once


def timings(models: dict[str, nn.Module], data: Data, rounds: int) -> None:
    """Print what a step takes."""
    vit, eager, fast = models.values()
    contenders = {
        "ViT": step(vit, data, None),
        "KAT, eager": step(eager, data, None),
        "KAT, ridgeline": step(fast, data, None),
        "KAT, torch.compile": step(eager, data, "inductor"),
        "KAT, torch.compile, ridgeline": step(fast, data, "ridgeline"),
        "ViT, torch.compile": step(vit, data, "inductor"),
    }
    found = interleave(contenders, baseline="KAT, eager", rounds=rounds)
    console.print(found.table(f"{data.name}: one training step, {data.batch} images"))
    for title, own, base in (
        ("KAT over ViT, as they are", "KAT, ridgeline", "ViT"),
        ("KAT over ViT, compiled", "KAT, torch.compile, ridgeline", "ViT, torch.compile"),
        ("torch.compile over ridgeline", "KAT, torch.compile", "KAT, torch.compile, ridgeline"),
    ):
        pairs = zip(found.samples[own], found.samples[base], strict=True)
        ratios = sorted(a / b for a, b in pairs)
        console.print(f"{title}: {ratios[len(ratios) // 2]:.2f} of its time")


def compare(data: Data, seed: int, rounds: int) -> None:
    """Train all three and print where they end, how far the KATs part, and what a step takes."""
    models = {
        "ViT": model(data, seed),
        "KAT, eager": model(data, seed, functools.partial(Rationals, rational=EagerRational)),
        "KAT, ridgeline": model(data, seed, functools.partial(Rationals, rational=GroupRational)),
    }
    started = {name: copy.deepcopy(network) for name, network in models.items()}
    losses = {n: train(m, data, EPOCHS[data.name], n, seed) for n, m in models.items()}
    table = Table(title=f"{data.name}, seed {seed}: {len(losses['ViT'])} steps")
    for column in ("", "parameters", "loss, mean of the last 20", "accuracy"):
        table.add_column(column, justify="right" if column else "left")
    for name, network in models.items():
        size = sum(p.numel() for p in network.parameters())
        last = sum(losses[name][-20:]) / 20
        table.add_row(name, f"{size:,}", f"{last:.4f}", f"{accuracy(network, data):.2%}")
    console.print(table)
    pairs = list(zip(losses["KAT, eager"], losses["KAT, ridgeline"], strict=True))
    apart = max(abs(a - b) / a for a, b in pairs[:ALIKE])
    whole = sum(abs(a - b) for a, b in pairs) / sum(a for a, _ in pairs)
    console.print(
        f"losses of the two KATs: at most {apart:.1e} apart in the first {ALIKE} steps, {whole:.1e}"
        " on average over all"
    )
    timings(started, data, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15, help="of the timing, interleaved")
    options = parser.parse_args()
    start = time.perf_counter()
    for data in chosen(options):
        compare(data, options.seed, options.rounds)
    console.print(f"{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
