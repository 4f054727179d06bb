"""ShiftAddViT from end to end: train a small ViT, reparameterise it in two stages, run it.

    pip install 'ridgeline[examples]'                # scikit-learn, for its digits
    python examples/shift_add_vit.py                 # digits and Fashion-MNIST
    python examples/shift_add_vit.py --data digits

For each data set an fp32 ViT is trained; from it, each fine-tuned with the fp32 ViT as its teacher:

    shift   its linear layers of signs and shifts, softmax attention kept
    add     stage 1: attention by additions (binary codes)
    MoE     stage 2, from `add`: each token of each linear layer goes to a product or a shift
            expert; once with the experts' latencies on --target, once with --latencies

The table is of the models as `ridgeline.optimize` runs them on this CPU. Operations and energy are
those of `ridgeline.passes.shift_add_vit.operations`: fp32, 45 nm, of one image; the way of the
weights from DRAM is shown for a batch that shares it and for an image that does not.
"""

import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from images import Data, ViT, add_arguments, batches, chosen
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import ridgeline
from ridgeline.passes.shift_add_vit import (
    MixtureOfPrimitives,
    balance_loss,
    count_operations,
    freeze,
)

console = Console(width=None if sys.stdout.isatty() else 140)


EPOCHS = {"digits": (40, 20, 40, 30), "Fashion-MNIST": (3, 1, 1, 1)}
"""Of fp32, shift, add and the mixtures."""


def train(
    model: nn.Module,
    data: Data,
    epochs: int,
    rate: float,
    name: str,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """Train in place by the labels, the teacher's outputs and the mixtures' balance."""
    steps = epochs * -(-len(data.images) // data.batch)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.15)
    mixed = any(isinstance(m, MixtureOfPrimitives) for m in model.modules())
    model.train()
    with Progress(console=console) as progress:
        task = progress.add_task(f"{data.name}: {name}", total=steps)
        for _ in range(epochs):
            for images, labels in batches(data):
                logits = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
                if teacher is not None:
                    with torch.no_grad():
                        taught = teacher(images).log_softmax(-1)
                    loss = loss + F.kl_div(
                        logits.log_softmax(-1), taught, log_target=True, reduction="batchmean"
                    )
                if mixed:
                    loss = loss + BALANCE * balance_loss(model)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.advance(task)
    return model.eval()


BALANCE = 0.1
"""Weight of the mixtures' loss."""


def variants(data: Data, target: str, latencies: tuple[float, float]) -> dict[str, nn.Module]:
    """The fp32 ViT and its fine-tuned forms."""
    first, shifted, added, mixed = EPOCHS[data.name]
    vit = train(ViT(data.images.shape[1], data.patch), data, first, 2e-3, "fp32 ViT")
    forms = {"fp32 ViT": vit}

    def tuned(name: str, start: nn.Module, epochs: int, rate: float, **options: object) -> None:
        model = ridgeline.reparameterize(start, "shift_add_vit", **options)
        forms[name] = train(model, data, epochs, rate, name, teacher=vit)

    tuned("shift", vit, shifted, 1e-3, attention="keep", linears="shift")
    tuned("add", vit, added, 2e-3, stage=1)
    tokens = (vit.side**2 + 1) * data.batch
    add = forms["add"]
    tuned(f"MoE, {target}", add, mixed, 1e-3, stage=2, target=target, tokens=tokens)
    said = f"MoE, {latencies[0]:g}:{latencies[1]:g}"
    tuned(said, add, mixed, 1e-3, stage=2, latencies=latencies)
    return forms


@torch.no_grad()
def routing(model: nn.Module, images: Tensor) -> str:
    """Tokens sent to the shift experts, over all layers, and the share that latencies ask for."""
    sent, wanted, handles = [], [], []
    for mixture in (m for m in model.modules() if isinstance(m, MixtureOfPrimitives)):

        def hook(module: MixtureOfPrimitives, inputs: tuple[Tensor]) -> None:
            sent.append(module.routed(*inputs).float().mean())
            wanted.append(module.shares[1])

        handles.append(mixture.register_forward_pre_hook(hook))
    model(images)
    for handle in handles:
        handle.remove()
    if not sent:
        return ""
    shift, asked = torch.stack(sent).mean().item(), statistics.mean(wanted)
    return f"{shift:.0%} / {asked:.0%}"


def table(data: Data, forms: dict[str, nn.Module], rounds: int) -> Table:
    size = 120 if data.name == "digits" else 250
    sample = data.test_images[:size]
    fast = {n: ridgeline.optimize(m, (sample,), target="cpu") for n, m in forms.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in fast}
    hits: dict[str, float] = {}
    with torch.no_grad():
        for name, model in fast.items():
            model(sample)
            exact = freeze(forms[name])(sample)
            error = ((model(sample) - exact).norm() / exact.norm()).item()
            assert error < 1e-3, f"{name}: the optimised model is off by {error:.1e}"
            parts = zip(data.test_images.split(size), data.test_labels.split(size), strict=True)
            right = [(model(x).argmax(1) == y).sum().item() for x, y in parts]
            hits[name] = sum(right) / len(data.test_labels)
        for _ in range(rounds):
            for name, model in fast.items():
                start = time.perf_counter()
                model(sample)
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    title = f"{data.name}: {len(data.test_labels)} test images, per image in batches of {size}"
    out = Table(title=title, caption="sent / asked: tokens to the shift experts, by the latencies")
    for column in ("", "accuracy", "mult.", "adds", "shifts", "arithmetic", "+ weights / batch",
                   "+ weights", "sent / asked", "ms / batch"):  # fmt: skip
        out.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, model in forms.items():
        count = count_operations(model, sample[:1])
        weights = count.joules - count.arithmetic_joules
        out.add_row(
            name,
            f"{hits[name]:.2%}",
            *(f"{n / 1e6:.2f} M" for n in (count.multiplications, count.additions, count.shifts)),
            f"{1e6 * count.arithmetic_joules:.2f} µJ",
            f"{1e6 * (count.arithmetic_joules + weights / size):.2f} µJ",
            f"{1e6 * count.joules:.1f} µJ",
            routing(model, sample),
            f"{statistics.median(milliseconds[name]):.2f}",
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--target", default="cpu", help="whose cost model times the experts")
    published = {"default": (6.0, 4.0), "metavar": ("MULT", "SHIFT")}
    said = "of the experts, for the second mixture; the default is the published code's"
    parser.add_argument("--latencies", type=float, nargs=2, help=said, **published)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15, help="of the timing, interleaved")
    options = parser.parse_args()
    start = time.perf_counter()
    for data in chosen(options):
        torch.manual_seed(options.seed)
        forms = variants(data, options.target, tuple(options.latencies))
        console.print(table(data, forms, options.rounds))
    console.print(f"{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
