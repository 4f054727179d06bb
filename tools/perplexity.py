"""How well a causal language model predicts a text, and how far a changed one strays from it.

Over all predicted positions t of all windows, no token prepended:

    nll_t = -log p(x_t | x_<t)        ppl = exp(mean nll)        top1 = share of argmax p = x_t
    agreement = share of argmax p = argmax p_ref          kl = mean KL(p_ref || p)

Log-probabilities are fp32, means fp64. KL and agreement rank small changes more smoothly than
perplexity, which can improve by luck; the paired difference of nll comes with its standard error.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tokens [1,L] -> logits [1,L,V], bare or as the `.logits` of transformers' outputs.
LanguageModel = Callable[[Tensor], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Perplexity:
    """The figures of one model on one text; agreement and kl are None without a reference.

    nll: fp64 [positions], in nats, in the order of the windows.
    """

    ppl: float
    top1: float
    agreement: float | None
    kl: float | None
    nll: Tensor

    def difference(self, other: "Perplexity") -> tuple[float, float]:
        """Mean of nll - other.nll, and its standard error; both saw the same windows."""
        if self.nll.shape != other.nll.shape:
            raise ValueError(
                f"paired figures need the same windows: {len(self.nll)} positions here,"
                f" {len(other.nll)} there"
            )
        paired = self.nll - other.nll
        return paired.mean().item(), (paired.std() / math.sqrt(len(paired))).item()


def windows(tokens: Tensor, count: int, length: int) -> Tensor:
    """`count` evenly spaced windows of `length` tokens from tokens [T], as [count, length]."""
    slots = len(tokens) // length
    if count > slots:
        raise ValueError(
            f"{len(tokens)} tokens hold {slots} windows of {length}; {count} were asked for"
        )
    step = slots // count * length
    return torch.stack([tokens[i * step : i * step + length] for i in range(count)])


def evaluate(
    model: LanguageModel, windows: Iterable[Tensor], reference: LanguageModel | None = None
) -> Perplexity:
    """The figures of `model` on windows [count, length], against `reference` if one is given."""
    if reference is None:
        return _summary([_window(_log_probabilities(model, w), w, None) for w in windows])
    return compare({"model": model}, windows, reference)["model"]


def compare(
    models: Mapping[str, LanguageModel], windows: Iterable[Tensor], reference: LanguageModel
) -> dict[str, Perplexity]:
    """The figures of each model against `reference`, which runs once per window for all of them."""
    parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in models}
    for window in windows:
        expected = _log_probabilities(reference, window)
        for name, model in models.items():
            actual = expected if model is reference else _log_probabilities(model, window)
            parts[name].append(_window(actual, window, expected))
    return {name: _summary(part) for name, part in parts.items()}


def table(results: Mapping[str, Perplexity], baseline: str) -> Iterator[str]:
    """One line per model; the paired nll difference is to the model named `baseline`."""
    width = max(map(len, results))
    yield f"{'':{width}}      ppl   top-1  agree      KL   nll difference"
    for name, result in results.items():
        mean, error = result.difference(results[baseline])
        agree = "     -" if result.agreement is None else f"{result.agreement:6.1%}"
        kl = "     -" if result.kl is None else f"{result.kl:6.3f}"
        yield (
            f"{name:{width}} {result.ppl:8.3f}  {result.top1:6.2%} {agree}  {kl}"
            f"   {mean:+.4f} ± {error:.4f}"
        )


@torch.inference_mode()
def _log_probabilities(model: LanguageModel, window: Tensor) -> Tensor:
    """log p [L-1,V], fp32, of every next token."""
    output = model(window.unsqueeze(0))
    logits = getattr(output, "logits", output)
    return logits[0, :-1].float().log_softmax(-1)


def _window(log_p: Tensor, window: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
    following = window[1:].to(log_p.device)
    nll = -log_p.gather(1, following.unsqueeze(1)).squeeze(1)
    guess = log_p.argmax(-1)
    part = {"nll": nll.double(), "top1": guess == following}
    if reference is not None:
        part["agreement"] = guess == reference.argmax(-1)
        part["kl"] = (reference.exp() * (reference - log_p)).sum(-1)
    return part


def _summary(parts: list[dict[str, Tensor]]) -> Perplexity:
    if not parts:
        raise ValueError("no windows to evaluate on")
    whole = {key: torch.cat([part[key] for part in parts]).double().cpu() for key in parts[0]}
    means = {key: value.mean().item() for key, value in whole.items()}
    return Perplexity(
        ppl=math.exp(means["nll"]),
        top1=means["top1"],
        agreement=means.get("agreement"),
        kl=means.get("kl"),
        nll=whole["nll"],
    )
