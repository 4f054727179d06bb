"""Caches of transformers as tensors: in, out, and back into the caller's own objects."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ridgeline.ir import caches
from ridgeline.ir.caches import CacheError
from ridgeline.ir.call import flatten
from ridgeline.ir.capture import capture

transformers = pytest.importorskip("transformers")

LAYERS = 2
_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES)).eval()


def _empty(kind: str, model: nn.Module) -> Any:
    if kind == "dynamic":
        return transformers.DynamicCache()
    if kind == "dynamic with a config":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=16)


KINDS = ["dynamic", "dynamic with a config", "static"]


def _ids(length: int, batch: int = 2) -> Tensor:
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(length))


def _step(run: Any, cache: Any, length: int, batch: int = 2) -> Tensor:
    out = run(input_ids=_ids(length, batch), past_key_values=cache, use_cache=True)
    assert out.past_key_values is cache
    return out.logits


def _through(captured: Any) -> Any:
    def run(**kwargs: Any) -> Any:
        call = flatten((), kwargs)
        assert captured.guards.accept(call.flat)
        return captured.finish(call, captured.program.module(*call.flat))

    return run


def _state(cache: Any) -> list[Any]:
    return [
        {k: v for k, v in vars(layer).items() if not isinstance(v, Tensor)}
        for layer in caches.layers(cache)
    ]


def _assert_same_cache(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    assert _state(got) == _state(expected)
    for ours, theirs in zip(caches.tensors(got), caches.tensors(expected), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert got.get_seq_length() == expected.get_seq_length()


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode(llama, kind):
    ours, theirs = _empty(kind, llama), _empty(kind, llama)
    prefill = capture(llama, (), {"input_ids": _ids(5), "past_key_values": ours, "use_cache": True})
    assert prefill.program.phase == "prefill"
    assert not caches.is_filled(ours)  # capturing runs no step
    torch.testing.assert_close(_step(_through(prefill), ours, 5), _step(llama, theirs, 5))
    _assert_same_cache(ours, theirs)
    decode = None
    for _ in range(3):
        call = {"input_ids": _ids(1), "past_key_values": ours, "use_cache": True}
        decode = decode or capture(llama, (), call)
        assert decode.program.phase == "decode"
        assert ours.get_seq_length() == theirs.get_seq_length()
        torch.testing.assert_close(_step(_through(decode), ours, 1), _step(llama, theirs, 1))
        _assert_same_cache(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_fills_another_cache_and_leaves_the_first(llama, kind):
    first, second, plain = (_empty(kind, llama) for _ in range(3))
    call = {"input_ids": _ids(5), "past_key_values": first, "use_cache": True}
    run = _through(capture(llama, (), call))
    _step(run, first, 5)
    before = [t.clone() for t in caches.tensors(first)]
    torch.testing.assert_close(_step(run, second, 9), _step(llama, plain, 9))
    _assert_same_cache(second, plain)
    assert all(map(torch.equal, caches.tensors(first), before))


def test_a_cache_that_the_model_makes(llama):
    call = {"input_ids": _ids(5), "use_cache": True}
    captured = capture(llama, (), call)
    assert captured.program.phase == "prefill"
    made = [_through(captured)(**call).past_key_values for _ in range(2)]
    assert made[0] is not made[1]
    for cache in made:
        _assert_same_cache(cache, llama(**call).past_key_values)
    torch.testing.assert_close(
        _step(llama, made[0], 1), _step(llama, llama(**call).past_key_values, 1)
    )


def test_an_encoder_decoder_keeps_its_cross_attention():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_ff=48, d_kv=8, num_layers=LAYERS, num_heads=4, vocab_size=99,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    encoded = model.encoder(input_ids=_ids(6))

    def start() -> Any:
        return transformers.EncoderDecoderCache(
            transformers.DynamicCache(), transformers.DynamicCache()
        )

    ours, theirs = start(), start()
    for _ in range(2):
        calls = [
            {
                "encoder_outputs": (encoded.last_hidden_state,),
                "decoder_input_ids": _ids(1),
                "past_key_values": cache,
                "use_cache": True,
            }
            for cache in (ours, theirs)
        ]
        captured = capture(model, (), calls[0])
        got, expected = _through(captured)(**calls[0]), model(**calls[1])
        assert got.past_key_values is ours
        torch.testing.assert_close(got.logits, expected.logits)
        assert ours.is_updated == theirs.is_updated == {0: True, 1: True}
        for part in ("self_attention_cache", "cross_attention_cache"):
            _assert_same_cache(getattr(ours, part), getattr(theirs, part))
    inputs = [
        n.meta["val"].shape for n in captured.program.module.graph.find_nodes(op="placeholder")
    ]
    held = [shape for shape in inputs if len(shape) == 4]
    assert len(held) == 4 * LAYERS
    assert held[::2] == held[1::2]  # keys and values, also those that are only read


# -- signatures and refusals -----------------------------------------------------------------------


def test_signatures_tell_states_apart_but_not_lengths(llama):
    def key(cache: Any) -> Any:
        return flatten((), {"past_key_values": cache}).key

    keys = []
    for kind in KINDS:
        cache = _empty(kind, llama)
        keys.append(key(cache))
        _step(llama, cache, 5)
        keys.append(key(cache))
        _step(llama, cache, 1)
        assert key(cache) == keys[-1]
    assert len(set(keys)) >= 5  # filled dynamic caches may well be alike
    hash(tuple(keys))


def test_copies_hold_the_given_tensors_alone(llama):
    cache = _empty("static", llama)
    _step(llama, cache, 5)
    held = caches.tensors(cache)
    before = copy.deepcopy(held)
    given = [t + 1 for t in held]
    new = caches.with_tensors(cache, given)
    assert all(a is b for a, b in zip(caches.tensors(new), given, strict=True))
    assert all(a is b for a, b in zip(caches.tensors(cache), held, strict=True))
    assert all(map(torch.equal, held, before))
    places = [place for place, _ in caches.replaced(cache, new)]
    assert len(places) == len(given)
    assert caches.replaced(cache, caches.with_tensors(cache, held)) == []


def test_a_counter_in_python_is_refused(llama):
    cache = _empty("static", llama)
    _step(llama, cache, 5)
    after = caches.with_tensors(cache, caches.tensors(cache))
    caches.layers(after)[1].steps = 3
    with pytest.raises(CacheError, match=r"layer 1 .*'steps'.*caches of full attention layers"):
        caches.replaced(cache, after)


def test_a_cache_without_layers_is_refused():
    cache = transformers.DynamicCache()
    cache.layers = None
    with pytest.raises(CacheError, match="DynamicCache is not a list of cache layers"):
        flatten((), {"past_key_values": cache})


def test_a_layer_that_keeps_a_dict_is_refused(llama):
    cache = _empty("static", llama)
    caches.layers(cache)[1].conv_states = {}
    with pytest.raises(
        CacheError, match=r"StaticLayer keeps its state in a dict \('conv_states'\)"
    ):
        flatten((), {"past_key_values": cache})


def test_only_caches_are_caches(llama):
    assert caches.is_cache(_empty("static", llama))
    assert not any(map(caches.is_cache, (None, [], (torch.ones(1),), llama)))
    assert not any(caches.is_filled(_empty(kind, llama)) for kind in KINDS)
