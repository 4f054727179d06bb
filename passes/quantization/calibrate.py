"""What a linear layer's inputs look like: H = 2/n sum over the n calibration rows of x xᵀ.

H [K,K] is fp32, kept as a running mean, with TF32 and bf16 products off. Layers that read the very
same tensor (q, k and v; gate and up) share one H. At most `byte_limit` bytes of H live at once: the
layers are taken in chunks, in the order in which the model runs them, one pass over the batches per
chunk, and a pass stops as soon as its chunk's last layer has been reached.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ridgeline.passes.quantization.codec import QuantizationError

Batch = Tensor | Sequence[Any] | Mapping[str, Any]
Progress = Callable[[int, int], None]


class _ChunkReached(Exception):
    """Every layer of the chunk has had this batch; the rest of the model need not run."""


def collect_hessians(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    *,
    byte_limit: int = 4 * 2**30,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """H of every layer in `names`, all held together; layers with one input share one tensor.

    Raises QuantizationError where they need more than `byte_limit` bytes: use `HessiansOnDemand`.
    """
    shared = shared_inputs(model, names, batches)
    needed = sum(_hessian_bytes(model, leader) for leader in shared)
    if needed > byte_limit:
        raise QuantizationError(
            f"the Hessians of {len(names)} layers take {needed} bytes, above the limit of"
            f" {byte_limit}; raise byte_limit, or read them from HessiansOnDemand"
        )
    return accumulate(model, shared, batches, _counter(progress, len(batches)), shared.uses)


class HessiansOnDemand(Mapping[str, Tensor]):
    """Weight name -> H of its layer, computed when asked for, `byte_limit` bytes alive at once.

    Where all of them fit they are computed now; else each chunk, in the order in which the model
    runs its layers, when one of its layers is asked for, and the chunk before it is given up. Who
    asks in that order pays one pass over `batches` per chunk. `model` must stay as it is.

    names: qualified names of nn.Linear or transformers' Conv1D modules.
    batches: every row of a layer's input counts, so leave padding out.
    Raises QuantizationError for what `byte_limit` cannot hold by itself, and as `accumulate` does:
    for a chunk that comes later when it is read.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        batches: Sequence[Batch],
        *,
        byte_limit: int = 4 * 2**30,
    ) -> None:
        self._model, self._batches = model, batches
        shared = shared_inputs(model, names, batches)
        self._uses = shared.uses
        self._chunks = _chunks(model, shared, byte_limit)
        self._chunk_of = {
            f"{name}.weight": chunk
            for chunk in self._chunks
            for readers in chunk.values()
            for name in readers
        }
        self._held: dict[str, Tensor] = {}
        if len(self._chunks) == 1:
            self._load(self._chunks[0])

    def _load(self, chunk: dict[str, list[str]]) -> None:
        self._held.clear()
        found = accumulate(self._model, chunk, self._batches, lambda: None, self._uses)
        self._held = {f"{name}.weight": hessian for name, hessian in found.items()}

    def __getitem__(self, name: str) -> Tensor:
        chunk = self._chunk_of[name]
        if name not in self._held:
            self._load(chunk)
        return self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self._chunk_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._chunk_of)

    def __len__(self) -> int:
        return len(self._chunk_of)


def in_features(module: nn.Module) -> int:
    """K of a linear layer; transformers' Conv1D holds its weight as [K,N]."""
    if isinstance(module, nn.Linear):
        return module.in_features
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return module.get_parameter("weight").shape[0]
    raise QuantizationError(
        f"expected nn.Linear or transformers' Conv1D, found {kind.__module__}.{kind.__qualname__}"
    )


def _hessian_bytes(model: nn.Module, name: str) -> int:
    return 4 * in_features(model.get_submodule(name)) ** 2


def _chunks(
    model: nn.Module, shared: dict[str, list[str]], byte_limit: int
) -> list[dict[str, list[str]]]:
    """`shared` cut, in order, into runs whose Hessians fit together."""
    chunks: list[dict[str, list[str]]] = []
    room = 0
    for leader, followers in shared.items():
        needed = _hessian_bytes(model, leader)
        if needed > byte_limit:
            raise QuantizationError(
                f"the Hessian of {leader} takes {needed} bytes, above the limit of {byte_limit};"
                " raise byte_limit"
            )
        if needed > room:
            chunks.append({})
            room = byte_limit
        chunks[-1][leader] = followers
        room -= needed
    return chunks


def shared_inputs(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> "Readers":
    """{first reader of an input: all its readers, itself included}, in order of execution.

    Layers that the first batch does not reach (experts) follow at the end, each for itself.
    """
    if not names or not batches:
        raise QuantizationError(
            f"calibration needs layers and batches; found {len(names)} layers,"
            f" {len(batches)} batches"
        )
    shared: dict[str, list[str]] = {}
    inputs: dict[str, Tensor] = {}
    uses: Counter[str] = Counter()

    def note(name: str, x: Tensor) -> None:
        uses[name] += 1
        if any(name in readers for readers in shared.values()):
            return
        # `inputs` keeps the tensors alive, so that identity cannot be a reused address.
        leader = next((first for first, seen in inputs.items() if seen is x), name)
        shared.setdefault(leader, []).append(name)
        inputs.setdefault(leader, x)

    with watched_inputs(model, names, note):
        run(model, batches[0])
    reached = {name for readers in shared.values() for name in readers}
    shared |= {name: [name] for name in names if name not in reached}
    return _apart(shared, uses)


def _apart(shared: dict[str, list[str]], uses: Counter[str]) -> "Readers":
    """Layers that run more than once read several inputs: each of them stands for itself."""
    groups = Readers(uses)
    for readers in shared.values():
        once = [name for name in readers if uses[name] <= 1]
        if once:
            groups[once[0]] = once
        groups.update({name: [name] for name in readers if uses[name] > 1})
    return groups


class Readers(dict[str, list[str]]):
    """{first reader of an input: all its readers}; uses: how often a batch calls each layer."""

    def __init__(self, uses: Counter[str]) -> None:
        super().__init__()
        self.uses = uses


def accumulate(
    model: nn.Module,
    shared: dict[str, list[str]],
    batches: Sequence[Batch],
    tick: Callable[[], None],
    uses: Counter[str],
) -> dict[str, Tensor]:
    """One pass over the batches: H of each leader, under the names of all its readers. A batch is
    run until every leader has been called as often as `uses` says."""
    hessians: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    pending: Counter[str] = Counter()

    def add(name: str, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        before = rows.get(name, 0)
        rows[name] = total = before + flat.shape[0]
        if total == 0:
            return
        if name not in hessians:
            hessians[name] = flat.new_zeros(flat.shape[1], flat.shape[1])
        hessians[name].addmm_(flat.T, flat, beta=before / total, alpha=2 / total)
        pending[name] -= 1
        if max(pending.values()) <= 0:
            raise _ChunkReached

    with watched_inputs(model, list(shared), add), _full_precision():
        for batch in batches:
            pending = Counter({name: max(1, uses[name]) for name in shared})
            run(model, batch)
            tick()
    for leader in shared:
        if leader not in hessians:
            raise QuantizationError(
                f"no calibration batch reached {leader}; add batches that do, or leave it out"
            )
        if not bool(hessians[leader].isfinite().all()):
            raise QuantizationError(
                f"the inputs of {leader} hold NaN or infinity on the calibration batches"
            )
    return {name: hessians[leader] for leader, readers in shared.items() for name in readers}


@contextmanager
def watched_inputs(
    model: nn.Module, names: Sequence[str], call: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """`call(name, input)` before each of the named layers runs."""

    def hook_of(name: str):
        return lambda module, inputs: call(name, inputs[0])

    modules = {}
    for name in names:
        modules[name] = model.get_submodule(name)
        in_features(modules[name])
    handles = [m.register_forward_pre_hook(hook_of(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 products in fp32: no TF32 on a GPU, no bf16 on a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def call(model: nn.Module, batch: Batch) -> Any:
    """`model` on one batch, however that is given."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch) if isinstance(batch, Tensor) else model(*batch)


def main_output(output: Any) -> tuple[Tensor, bool]:
    """(what a model puts out, [.., C]; are they logits?): `logits` where it has them, else the
    first floating tensor. Raises QuantizationError where there is none."""
    logits = (
        output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    )
    if isinstance(logits, Tensor):
        return logits, True
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf, False
    raise QuantizationError(
        f"the model puts out {type(output).__name__} without a floating-point tensor, by which"
        " nothing can be measured; pass bits= and distillation=False"
    )


@torch.no_grad()
def run(model: nn.Module, batch: Batch, stop: type[Exception] = _ChunkReached) -> None:
    """`model` on one batch in eval mode; `stop`, raised by a hook, ends the run early."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        call(model, batch)
    except stop:
        pass
    finally:
        for module, training in modes:
            module.training = training


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick
