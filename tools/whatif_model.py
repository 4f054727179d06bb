"""MODEL of `ridgeline whatif` -> programs by phase, without weights where only a config is given.

MODEL is ``smollm2``, ``file.py:function``, ``program.pt2``, a config's ``.json`` file, or the name
of a published config. From a config, and for ``smollm2``, the model is built on the meta device:
shapes and dtypes, no weight. A model that generates is captured twice, as

    prefill    ids [batch, length], an empty cache
    decode     ids [batch, 1], the cache that such a prefill leaves

any other once, on the inputs that its function gives. Batch and length of the example are two
different small numbers, so that both stay free sizes. For contexts beyond a sliding window the
example passes it, and its caches are full; contexts within it are asked of a capture of their own.
"""

import inspect
import json
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ridgeline.ir.call import flatten
from ridgeline.ir.capture import Captured, capture
from ridgeline.ir.errors import RidgelineError
from ridgeline.ir.program import Program
from ridgeline.ir.sizes import number, numbers
from ridgeline.tools.model_file import SMOLLM2, Example, load_model_file

BATCH, LENGTH = 3, 17
GENERATING = ("prefill", "decode")
SMOLLM2_CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True, "rope_theta": 100000, "max_position_embeddings": 8192,
}  # fmt: skip
"""As `ridgeline.tools.smollm2` describes it."""
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "Model")
"""How transformers' names of these end."""


class QuestionError(RidgelineError, ValueError):
    """A MODEL, or a phase of it, that nothing can be asked about."""


@dataclass(frozen=True, slots=True)
class Span:
    """programs, by phase, for contexts up to `end`; beyond: do these pass the model's sliding
    windows, whose caches are full then?"""

    end: int
    beyond: bool
    programs: dict[str, Program]


def spans(
    spec: str, phases: Sequence[str], dtype: torch.dtype, contexts: Sequence[int] = (1,)
) -> list[Span]:
    """The programs of MODEL by phase, those of `phases`, or all where it is empty; the contexts
    asked about that its sliding windows hold come first, where there are such.

    dtype: of a model that is built from a config.
    Raises QuestionError, ModelError, CaptureError.
    """
    example = None
    if spec.rpartition(":")[0].endswith(".py") or spec.endswith(".pt2"):
        example = load_model_file(spec)
        model = example.model
    else:
        model = _built(_config(spec), dtype)
    if generates(model):
        wanted = phases or GENERATING
        _only(wanted, GENERATING, spec)
        window = window_of(model)
        sides = [[c for c in contexts if (c > window > 0) == beyond] for beyond in (False, True)]
        found = []
        for beyond, side in enumerate(sides):
            if side:
                captured = _generating(model, wanted, LENGTH + window * beyond)
                asked = {phase: p for phase, p in captured.items() if phase in wanted}
                found.append(Span(max(side), bool(beyond), asked))
        return found
    if example is None:
        raise QuestionError(
            f"{spec}: a {type(model).__name__} does not generate; give a file.py:function that"
            " returns it with example inputs"
        )
    program = _captured(model, tuple(map(_twice, example.args)), _each(example)).program
    _only(phases, (program.phase,), spec)
    return [Span(max(contexts), False, {program.phase: program})]


def generates(model: nn.Module) -> bool:
    """Is it a language model of transformers, with a cache?"""
    able = getattr(model, "can_generate", None)
    takes = inspect.signature(model.forward).parameters
    return callable(able) and bool(able()) and "input_ids" in takes and _cache_name(takes) != ""


def positions_of(spec: str) -> int | None:
    """Tokens that the config of MODEL has positions for; None where it says nothing."""
    if spec.rpartition(":")[0].endswith(".py") or spec.endswith(".pt2"):
        return None
    text = _config(spec).get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None)


def window_of(model: nn.Module) -> int:
    """Tokens that the sliding windows of a language model hold; 0 without."""
    config: Any = model.config
    return getattr(config.get_text_config(decoder=True), "sliding_window", None) or 0


def _cache_name(takes: Container[str]) -> str:
    """What the forward of this release of transformers calls its cache."""
    return next((name for name in ("cache", "past_key_values") if name in takes), "")


def _only(wanted: Sequence[str], there: Sequence[str], spec: str) -> None:
    if unknown := [phase for phase in wanted if phase not in there]:
        raise QuestionError(f"{spec} has no phase {', '.join(unknown)}; it has {', '.join(there)}")


def _config(spec: str) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise QuestionError(
            f"{spec}: building a model from its config needs transformers, which is not installed;"
            " install it with: pip install 'ridgeline[demo]'"
        ) from error
    settings = SMOLLM2_CONFIG if spec == SMOLLM2 else None
    if spec.endswith(".json"):
        try:
            settings = json.loads(Path(spec).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise QuestionError(f"{spec}: expected a model's config in json: {error}") from error
        if not isinstance(settings, dict) or "model_type" not in settings:
            raise QuestionError(f"{spec}: expected a config with 'model_type', as of transformers")
    try:
        if settings is not None:
            return AutoConfig.for_model(**settings)
        return AutoConfig.from_pretrained(spec)
    except Exception as error:  # unknown architectures, hubs that cannot be reached, ...
        raise QuestionError(
            f"{spec}: no config (expected smollm2, file.py:function, program.pt2, a config's .json,"
            f" or a published config that transformers can load): {error}"
        ) from error


def _built(config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    named = getattr(config, "architectures", None) or []
    if named and not any(name.endswith(_LANGUAGE_MODELS) for name in named):
        raise QuestionError(
            f"the config is of a {named[0]}, and only language models that generate are built from"
            " their config; give a file.py:function that returns the model with example inputs"
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except ValueError as error:
        raise QuestionError(f"no language model has this config: {error}") from error


def _generating(model: nn.Module, wanted: Sequence[str], length: int) -> dict[str, Program]:
    from transformers import DynamicCache

    device = next(model.parameters()).device
    cache = DynamicCache(config=model.config)  # pyright: ignore[reportArgumentType]
    takes = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {_cache_name(takes): cache, "use_cache": True}
    if "logits_to_keep" in takes:
        options["logits_to_keep"] = 1  # as `generate` asks

    def ids(tokens: int) -> Tensor:
        return torch.zeros(BATCH, tokens, dtype=torch.long, device=device)

    prefill = _captured(model, (), {"input_ids": ids(length), **options})
    found = {"prefill": prefill.program}
    if "decode" in wanted:
        _run_in_thought(prefill, {"input_ids": ids(length), **options})
        found["decode"] = _captured(model, (), {"input_ids": ids(1), **options}).program
    for phase, program in found.items():
        if program.phase != phase:
            raise QuestionError(
                f"a {type(model).__name__} was captured as {program.phase} in place of {phase}"
            )
    return found


def _run_in_thought(captured: Captured, kwargs: dict[str, Any]) -> None:
    """Let the caches of a call receive tensors of the shapes that the program gives them."""
    outputs = captured.program.module.graph.output_node().args[0]
    values = [n.meta["val"] for n in outputs]  # pyright: ignore[reportGeneralTypeIssues]
    # Caches of sliding windows also count their tokens.
    made = [
        torch.empty(numbers(v.shape), dtype=v.dtype, device=v.device)
        if isinstance(v, Tensor)
        else number(v)
        for v in values
    ]
    captured.finish(flatten((), kwargs), made)


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    with torch.no_grad():
        return capture(model.eval(), args, kwargs)


def _each(example: Example) -> dict[str, Any]:
    return {name: _twice(value) for name, value in example.kwargs.items()}


def _twice(value: Any) -> Any:
    """An input of a batch of one as a batch of two: a size of 1 is no free size."""
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == 1:
        return torch.cat((value, value))
    return value
