"""Layer after layer in the order of execution, each calibrated on what the quantised prefix gives.

For every distinct input of a layer, in order: run the calibration batches up to it, accumulate its
one Hessian, quantise its readers (q, k and v read one input), put their dequantised weights into
the working copy, go on. One Hessian is alive at a time, so memory is bounded by the largest layer.

A model whose layers stand in a chain of blocks, each reading its predecessor's output, is not run
from its start every time: blocks that are done return what they returned before, from memory
(batches x tokens x hidden numbers), and only the current block computes. Where no chain is found
the prefix is run again, which is slower and gives the same.

Results go to a folder as they are made, if one is named; a run that was interrupted continues from
it. Source of sequential calibration: GPTQ.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ridgeline.passes.quantization.calibrate import (
    Batch,
    accumulate,
    run,
    shared_inputs,
    watched_inputs,
)
from ridgeline.passes.quantization.codec import QuantizedWeight

Quantizer = Callable[[str, Tensor, Tensor], QuantizedWeight]
"""(name of the layer, its weight [N,K], its Hessian [K,K]) -> the artefact."""
Progress = Callable[[str, int, int], None]
"""Called with (layer done, layers done, layers in all)."""


class _Reached(Exception):
    """The block has run; the rest of the model need not."""


def quantize_in_sequence(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    quantizer: Quantizer,
    *,
    known: Mapping[str, QuantizedWeight] | None = None,
    done: Callable[[str, QuantizedWeight], None] = lambda name, weight: None,
    progress: Progress | None = None,
) -> dict[str, QuantizedWeight]:
    """The quantised weight of every layer in `names`, by name.

    model: a working copy: its weights are overwritten. known: results of an earlier run, which are
    taken as they are; done: called with each new result. Raises QuantizationError as
    `collect_hessians` does.
    """
    known = dict(known or {})
    shared = shared_inputs(model, names, batches)
    chain = Chain(model, names, batches)
    originals = _shared_weights(model, names)
    total, found = sum(map(len, shared.values())), {}
    with _threads() as pool:
        for leader, readers in shared.items():
            chain.advance(leader)
            missing = [name for name in readers if name not in known]
            hessian = None
            if missing:
                with chain.resumed():
                    reached = {leader: readers}
                    hessian = accumulate(model, reached, batches, lambda: None, shared.uses)[leader]
            work = functools.partial(_one, model, originals, quantizer, hessian, known)
            for name, weight in pool.map(work, readers):
                if name not in known:
                    done(name, weight)
                found[name] = weight
                _overwrite(model.get_submodule(name), weight)
                if progress is not None:
                    progress(name, len(found), total)
    return found


def _one(
    model: nn.Module,
    originals: Mapping[str, Tensor],
    quantizer: Quantizer,
    hessian: Tensor | None,
    known: Mapping[str, QuantizedWeight],
    name: str,
) -> tuple[str, QuantizedWeight]:
    """One layer's result. Its many small operations are quickest on the thread they are called
    from: a second one would spend its time at their barriers."""
    if name in known:
        return name, known[name]
    torch.set_num_threads(1)
    assert hessian is not None
    weight = originals[name] if name in originals else weight_of(model.get_submodule(name))
    return name, quantizer(name, weight, hessian)


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """A thread per core; torch's own number of threads is again what it was afterwards."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(max(1, before)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _shared_weights(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """What layers hold whose weight another layer holds too: that one's result overwrites it."""
    held = {name: weight_of(model.get_submodule(name)) for name in names}
    count = Counter(weight.data_ptr() for weight in held.values())
    return {name: w.clone() for name, w in held.items() if count[w.data_ptr()] > 1}


def weight_of(module: nn.Module) -> Tensor:
    """The weight [N,K] of a linear layer; transformers' Conv1D holds it transposed."""
    weight = module.get_parameter("weight").detach()
    return weight if isinstance(module, nn.Linear) else weight.T


@torch.no_grad()
def _overwrite(module: nn.Module, weight: QuantizedWeight) -> None:
    held = weight_of(module)
    held.copy_(weight.dequantize().to(held.device))


class Chain:
    """The blocks of a model that run one after the other, and the outputs of those already done."""

    def __init__(self, model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self.blocks = _chain(model, names, batches[0])
        self.place = {module: i for i, (_, module) in enumerate(self.blocks)}
        self.current = 0
        self.outputs: list[Tensor] = []

    def advance(self, name: str) -> None:
        """Run the blocks before the one that holds layer `name`, and keep what the last gives."""
        paths = [path for path, _ in self.blocks]
        inside = [i for i, path in enumerate(paths) if name.startswith(path + ".")]
        while inside and self.current < inside[0]:
            outputs: list[Tensor] = []

            def keep(module: nn.Module, args: Any, output: Any, into=outputs) -> None:
                into.append(output if isinstance(output, Tensor) else output[0])
                raise _Reached

            with self.resumed():
                handle = self.blocks[self.current][1].register_forward_hook(keep)
                try:
                    for batch in self.batches:
                        run(self.model, batch, _Reached)
                finally:
                    handle.remove()
            self.outputs, self.current = outputs, self.current + 1

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """While it lasts, the blocks that are done cost nothing: batch after batch, in order, the
        last of them returns what it did before."""
        done = [module for _, module in self.blocks[: self.current]]
        source = itertools.cycle(self.outputs)
        for i, module in enumerate(done):
            last = i + 1 == len(done)
            module.forward = functools.partial(_replay, source if last else None, _tuple(module))
        try:
            yield
        finally:
            for module in done:
                del module.forward


def _replay(source: Iterator[Tensor] | None, tupled: bool, x: Tensor, *args: Any, **kwargs: Any):
    output = x if source is None else next(source)
    return (output,) if tupled else output


_TUPLED = "_ridgeline_returns_tuple"


def _tuple(module: nn.Module) -> bool:
    return module.__dict__.get(_TUPLED, False)


def _chain(model: nn.Module, names: Sequence[str], batch: Batch) -> list[tuple[str, nn.Module]]:
    """(path, block) of the longest nn.ModuleList or nn.Sequential that holds layers of `names` and
    whose members each take one tensor that their predecessor gave, alone or in a tuple of one."""
    best: list[tuple[str, nn.Module]] = []
    reached: set[str] = set()
    with watched_inputs(model, names, lambda name, x: reached.add(name)):
        run(model, batch)
    if len(reached) < len(names):  # layers that come last may stand in the first block
        return best
    for path, container in model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential) or len(container) < 2:
            continue
        members = [(f"{path}.{i}".lstrip("."), m) for i, m in enumerate(container)]
        held = sum(any(n.startswith(p + ".") for n in names) for p, _ in members)
        fits = held > len(best) and held == len(members)
        if fits and _linked(model, container, batch) and _unread(model, container, batch):
            best = members
    return best


def _unread(model: nn.Module, container: nn.Module, batch: Batch) -> bool:
    """Does nobody but the next member read what a member gives? Then the model puts out the same
    where all but the last give nonsense."""
    members = list(container.children())
    last: list[Any] = []
    handle = members[-1].register_forward_hook(lambda m, args, output: last.append(output))
    outputs: list[Any] = []
    whole = model.register_forward_hook(lambda m, args, output: outputs.append(output))
    try:
        run(model, batch)
        handle.remove()
        for member in members:
            nonsense = functools.partial(_nonsense, _tuple(member))
            member.forward = nonsense if member is not members[-1] else lambda *a, **k: last[0]
        run(model, batch)
    finally:
        handle.remove()
        whole.remove()
        for member in members:
            member.__dict__.pop("forward", None)
    before, after = (tree_leaves(output) for output in outputs)
    return len(before) == len(after) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b)
        for a, b in zip(before, after, strict=True)
    )


def _nonsense(tupled: bool, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    output = torch.full_like(x, torch.nan)
    return (output,) if tupled else output


def _linked(model: nn.Module, container: nn.Module, batch: Batch) -> bool:
    """Do the members of `container` each run once, in order, on their predecessor's output?"""
    seen: list[tuple[nn.Module, Any, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((module, args[0] if args else None, output))

    members = list(container.children())
    handles = [m.register_forward_hook(note) for m in members]
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if [module for module, _, _ in seen] != members:
        return False
    before = None
    for module, x, output in seen:
        tupled = isinstance(output, tuple) and len(output) == 1
        value = output[0] if tupled else output
        if not isinstance(value, Tensor) or (before is not None and x is not before):
            return False
        module.__dict__[_TUPLED] = tupled
        before = value
    return True
