"""The figures of a language model against hand-made distributions and float64 arithmetic."""

import math
from types import SimpleNamespace

import pytest
import torch

from ridgeline.tools.perplexity import compare, evaluate, table, windows

VOCABULARY = 11


def uniform(tokens):
    return torch.zeros(1, tokens.shape[1], VOCABULARY)


def bigram(seed):
    """A model whose logits depend on the last token only; outputs wear transformers' shape."""
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return lambda tokens: SimpleNamespace(logits=logits[tokens])


@pytest.fixture
def text():
    generator = torch.Generator().manual_seed(0)
    return windows(torch.randint(0, VOCABULARY, (400,), generator=generator), 3, 30)


def test_windows_are_evenly_spaced_and_whole():
    spread = windows(torch.arange(107), 3, 10)
    assert spread[:, 0].tolist() == [0, 30, 60]
    assert spread.shape == (3, 10)
    with pytest.raises(ValueError, match="107 tokens hold 10 windows of 10; 11 were asked for"):
        windows(torch.arange(107), 11, 10)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large(text):
    result = evaluate(uniform, text)
    assert result.ppl == pytest.approx(VOCABULARY)
    assert len(result.nll) == 3 * 29
    assert result.agreement is None
    assert result.kl is None


def test_figures_are_those_of_the_law(text):
    first, second = bigram(1), bigram(2)
    result = evaluate(first, text, second)
    nll, kl, hits, same = 0.0, 0.0, 0, 0
    for window in text:
        p = first(window).logits.double().log_softmax(-1)
        q = second(window).logits.double().log_softmax(-1)
        for t in range(29):
            nll -= p[t, window[t + 1]].item()
            kl += (q[t].exp() * (q[t] - p[t])).sum().item()
            hits += p[t].argmax().item() == window[t + 1].item()
            same += p[t].argmax().item() == q[t].argmax().item()
    assert result.ppl == pytest.approx(math.exp(nll / 87), rel=1e-6)
    assert result.kl == pytest.approx(kl / 87, rel=1e-5)
    assert result.top1 == pytest.approx(hits / 87)
    assert result.agreement == pytest.approx(same / 87)


def test_a_model_is_at_no_distance_from_itself_and_runs_once(text):
    calls = []

    def reference(tokens):
        calls.append(tokens)
        return uniform(tokens)

    results = compare({"same": reference, "other": bigram(1)}, text, reference)
    assert len(calls) == 3
    assert results["same"].kl == 0
    assert results["same"].agreement == 1
    assert results["other"].difference(results["other"]) == (0, 0)
    mean, error = results["other"].difference(results["same"])
    assert mean == pytest.approx(math.log(results["other"].ppl / VOCABULARY))
    assert error > 0


def test_the_table_names_every_model(text):
    lines = list(table(compare({"a": uniform, "long": bigram(1)}, text, uniform), "a"))
    assert [line.split()[0] for line in lines[1:]] == ["a", "long"]
    assert "11.000" in lines[1]


def test_what_cannot_be_paired_is_refused(text):
    with pytest.raises(ValueError, match="no windows"):
        evaluate(uniform, [])
    with pytest.raises(ValueError, match="87 positions here, 29 there"):
        evaluate(uniform, text).difference(evaluate(uniform, text[:1]))
