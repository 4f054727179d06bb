"""Prefill and decode rates of SmolLM2-135M at batch 1: contenders side by side in one process.

    prefill rate = prompt tokens / seconds of the one forward over the whole prompt
    decode rate  = new tokens / seconds of the greedy loop that feeds back one token at a time

in tokens per second. Every contender continues the same prompt greedily from its own cache, and
picking the next token (an argmax over the vocabulary) is part of every decode step. Each round runs
every contender once (`ridgeline.tools.timing.interleave`). `ridgeline bench decode` prints it.

The fastest decode that the machine's memory allows is bandwidth / bytes of weights read per token;
contenders that keep narrower weights have a higher ceiling.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ridgeline.ir.errors import RidgelineError
from ridgeline.tools import smollm2
from ridgeline.tools.timing import Spread, Timings, interleave

CacheKind = Literal["static", "dynamic"]


class BenchError(RidgelineError):
    """A contender that is not known or cannot run here."""


class Session(Protocol):
    """One contender, holding its own weights and cache."""

    def prefill(self) -> object:
        """Run the whole prompt from an empty cache."""
        ...

    def decode(self) -> list[int]:
        """From a cache that holds the prompt, generate; return the new token ids."""
        ...


class TorchSession:
    """Greedy generation through a transformers-like forward.

    forward: takes input_ids, position_ids [1, q], past_key_values and use_cache; returns an object
        with ``logits [1, q, vocabulary]``.
    config: the model's configuration, from which the cache takes its shapes.
    prompt: int64 [1, p].
    cache: "static", written in place up to p + new_tokens, or "dynamic", grown by concatenation.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        config: Any,
        prompt: Tensor,
        new_tokens: int,
        *,
        cache: CacheKind = "static",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._forward, self._prompt, self._new_tokens = forward, prompt, new_tokens
        self._cache = _empty_cache(config, cache, prompt.shape[1] + new_tokens, dtype)

    def prefill(self) -> Tensor:
        """Return the first generated token, int64 [1, 1]."""
        self._rewind(0)
        self._token = self._step(self._prompt, 0)
        return self._token

    def decode(self) -> list[int]:
        """Call after `prefill`; the cache is rewound to the prompt, so it can be called again."""
        length = self._prompt.shape[1]
        self._rewind(length)
        token, tokens = self._token, []
        for position in range(length, length + self._new_tokens):
            token = self._step(token, position)
            tokens.append(int(token))
        return tokens

    def _step(self, ids: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + ids.shape[1])[None]
        with torch.no_grad():
            logits = self._forward(
                input_ids=ids,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            ).logits
        return logits[:, -1:].argmax(-1)

    def _rewind(self, length: int) -> None:
        """Forget all but the first `length` positions: a static cache overwrites them later."""
        for layer in self._cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(length)
            elif layer.is_initialized:
                layer.keys = layer.keys[:, :, :length]
                layer.values = layer.values[:, :, :length]


class LlamaCppSession:
    """The same greedy loop in llama.cpp, on the GGUF file as published (Q4_1)."""

    def __init__(self, prompt: Sequence[int], new_tokens: int, threads: int) -> None:
        from llama_cpp import Llama

        self._prompt, self._new_tokens = list(prompt), new_tokens
        self._model = Llama(
            model_path=str(smollm2.fetch()),
            n_ctx=len(prompt) + new_tokens + 1,
            n_batch=len(prompt),
            n_ubatch=len(prompt),
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def prefill(self) -> int:
        """Return the first generated token."""
        self._model.n_tokens = 0
        self._token = self._step(self._prompt)
        return self._token

    def decode(self) -> list[int]:
        """Call after `prefill`; `eval` drops what the cache holds beyond `n_tokens`."""
        self._model.n_tokens = len(self._prompt)
        token, tokens = self._token, []
        for _ in range(self._new_tokens):
            token = self._step([token])
            tokens.append(token)
        return tokens

    def _step(self, ids: list[int]) -> int:
        import numpy as np
        from llama_cpp import llama_get_logits_ith

        self._model.eval(ids)
        logits = llama_get_logits_ith(self._model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._model.n_vocab(),)).argmax())


def build(
    name: str, prompt: Tensor, new_tokens: int, cache: CacheKind, tolerance: float
) -> Session:
    """Return the contender `name`, one of `CONTENDERS`.

    Raises BenchError for another name, or where llama_cpp is not installed.
    """
    if name not in CONTENDERS:
        raise BenchError(f"contenders are {', '.join(CONTENDERS)}, but {name!r} was asked for")
    if name == "llama.cpp":
        if not has_llama_cpp():
            raise BenchError("llama.cpp needs the package llama-cpp-python: pip install it")
        return LlamaCppSession(prompt[0].tolist(), new_tokens, torch.get_num_threads())
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    model = smollm2.load_model(dtype)
    forward: Callable[..., Any] = model
    if name.startswith("compile"):
        forward = torch.compile(model)
    elif name.startswith("ridgeline"):
        import ridgeline

        forward = ridgeline.optimize(model, tolerance=tolerance)
    return TorchSession(forward, model.config, prompt, new_tokens, cache=cache, dtype=dtype)


CONTENDERS = (
    "eager-fp32",
    "eager-bf16",
    "compile-fp32",
    "compile-bf16",
    "ridgeline-fp32",
    "ridgeline-bf16",
    "llama.cpp",
)


def compare(
    sessions: dict[str, Session], *, baseline: str, rounds: int = 9
) -> tuple[Timings, Timings]:
    """Return the interleaved timings of (prefill, decode); a sample is one prefill or one loop."""
    for session in sessions.values():  # compiles, and fills caches
        session.prefill()
        session.decode()
    prefill = interleave(
        {name: session.prefill for name, session in sessions.items()},
        baseline=baseline,
        rounds=rounds,
        inner=1,
    )
    decode = interleave(
        {name: session.decode for name, session in sessions.items()},
        baseline=baseline,
        rounds=rounds,
        inner=1,
    )
    return prefill, decode


def rates(timings: Timings, tokens: int) -> dict[str, Spread]:
    """Tokens per second of each contender; `least` is the slowest round."""
    return {
        name: Spread.of([tokens / seconds for seconds in samples])
        for name, samples in timings.samples.items()
    }


def _empty_cache(config: Any, kind: CacheKind, length: int, dtype: torch.dtype) -> Any:
    from transformers import DynamicCache, StaticCache

    if kind == "dynamic":
        return DynamicCache(config=config)
    cache = StaticCache(config=config, max_cache_len=length)
    # Allocated now: a cache that the first call allocates would be a constant of its graph.
    cache.early_initialization(
        batch_size=1,
        num_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return cache


def prompt_ids(tokens: int) -> Tensor:
    """The first `tokens` tokens of the evaluation text, int64 [1, tokens]."""
    ids = smollm2.load_tokenizer()(smollm2.evaluation_text()[: 16 * tokens]).input_ids
    return torch.tensor([ids[:tokens]])


def has_llama_cpp() -> bool:
    """Is the llama.cpp baseline installed?"""
    return importlib.util.find_spec("llama_cpp") is not None
