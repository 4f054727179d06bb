"""One training step of a small Llama on this CPU: eager, torch.compile, and ridgeline's two doors.

A Llama of 4 layers, 8 heads on 4, width 256, 2 x 512 tokens, fp32: forward, backward, SGD.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn

import ridgeline
from ridgeline.tools.timing import Timings, interleave

BASELINE = "eager"
BATCH, LENGTH, VOCABULARY, LAYERS = 2, 512, 1024, 4


def llama() -> nn.Module:
    """The model, from seed 0. Raises ImportError without transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def steps(model: nn.Module) -> dict[str, Callable[[], object]]:
    """One step by each contender, on copies of `model` and one batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)

    def step(run: nn.Module, owner: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.SGD(owner.parameters(), 1e-4)

        def once() -> float:
            optimizer.zero_grad()
            loss = run(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            return loss.item()

        return once

    def compiled(backend: str, **options: object) -> Callable[[], object]:
        own = copy.deepcopy(model)
        return step(torch.compile(own, backend=backend, **options), own)

    eager, optimized = copy.deepcopy(model), ridgeline.optimize(model, target="cpu").train()
    return {
        BASELINE: step(eager, eager),
        "torch.compile": compiled("inductor"),
        "torch.compile, ridgeline": compiled("ridgeline", options={"target": "cpu"}),
        "ridgeline.optimize": step(optimized, optimized),
    }


def run(rounds: int) -> Timings:
    """The steps, interleaved."""
    return interleave(steps(llama()), baseline=BASELINE, rounds=rounds)
