"""What `optimize` returns: a drop-in copy of the model whose `forward` runs rewritten graphs.

The copy is of a class made on the spot, a subclass of the model's own, so `isinstance`, `config`,
`generate`, `state_dict`, `train()` and `eval()` behave. Modules are copied shallowly and share
every parameter with the caller's model, which is never changed. Graphs are kept per signature and
phase, chosen by guards, at most `max_graphs` of them, the least recently used given up first.
"""

import functools
import logging
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ridgeline.codegen.inductor_inputs import InputMismatch
from ridgeline.ir import autocast
from ridgeline.ir.caches import CacheError
from ridgeline.ir.call import Call, flatten
from ridgeline.ir.capture import Captured, CaptureError, OverlapError, capture
from ridgeline.ir.errors import RidgelineError
from ridgeline.passes.compile_program import CompileProgram, Graph
from ridgeline.passes.copy_model import copy_model, rebound
from ridgeline.passes.inference_only import HAS_BACKWARD, marked
from ridgeline.passes.watched import RUN_HOOKS, Watched

log = logging.getLogger(__name__)

_MODE = operator.attrgetter("training")
_CAPTURING = threading.RLock()
"""Neither torch.export nor Inductor works in two threads at once."""


class CompileError(RidgelineError, RuntimeError):
    """A captured graph that could not be rewritten or compiled."""


class DropInError(RidgelineError, TypeError):
    """Something that an optimised copy cannot do."""


class _Refused(Exception):
    """The original code runs this call: calls of this key always, and why, where that is new."""

    def __init__(self, key: Any = None, error: Exception | None = None) -> None:
        super().__init__()
        self.key, self.error = key, error


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)
"""A module's dictionaries of hooks."""
_OWN = {"_ridgeline", "training", *_HOOKS}
"""Attributes that an optimised copy and the original code on its modules each have."""


@dataclass(slots=True, eq=False)
class _State:
    """Beside the modules: the original code on the same modules, and the compiled graphs.

    lock: held where parameters are read from the modules, in which a capture puts stand-ins.
    """

    original: nn.Module
    compile_program: CompileProgram
    strict: bool
    max_graphs: int
    modules: list[nn.Module]
    weights: Watched
    graphs: OrderedDict[int, tuple[Any, Captured, Callable[..., Any]]] = field(
        default_factory=OrderedDict
    )
    captures: int = 0
    fallbacks: dict[str, str] = field(default_factory=dict)
    refused: set[Any] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)


class OptimizedModule(nn.Module):
    """Mixed into a subclass of the model's class; make one with `optimized_copy`."""

    _ridgeline: _State

    @property
    def plan(self) -> Any:
        """The account of what was rewritten; it grows as further kinds of call are captured."""
        return self._ridgeline.compile_program.plan

    @property
    def captures(self) -> int:
        """How many graphs have been captured so far."""
        return self._ridgeline.captures

    @property
    def fallbacks(self) -> dict[str, str]:
        """Kinds of call that run the original code -> the reason."""
        return dict(self._ridgeline.fallbacks)

    def capture(self, *args: Any, **kwargs: Any) -> None:
        """Capture and compile the graph of such a call now, without running it for its result."""
        key, compiler = None, self._ridgeline.compile_program
        try:
            with compiler.deciding():
                call = flatten(args, kwargs)
                key = self._key(call)
            known = functools.partial(self._accepting, key, call)
            with compiler.meet("a capture", call, known) as graphs, self._ridgeline.lock:
                if next(iter(graphs), None) is None:
                    self._compile(key, args, kwargs)
        except (CaptureError, CacheError, CompileError) as error:
            if self._ridgeline.strict:
                raise
            self._refuse(args, kwargs, key, error)

    def refresh(self) -> None:
        """Drop every compiled graph; the next call captures anew.

        Needed after a change that is not noticed: one in place through ``weight.data``, which torch
        does not count, and one of a plain Python attribute of a submodule. Parameters, buffers,
        submodules, hooks, modes, and attributes set on the model itself are noticed.
        """
        state = self._ridgeline
        state.modules[:] = [m for m in self.modules() if m is not state.original]
        state.graphs.clear()
        state.refused.clear()
        state.fallbacks.clear()
        state.compile_program.forget()
        state.weights = Watched.of(state.modules)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            # Transforms wrap the parameters for the time being: no reason to drop the graphs.
            self._refuse(args, kwargs, None, CaptureError(_TRANSFORMED))
            return self._eager(*args, **kwargs)
        with self._ridgeline.lock:
            self._forget_changed_weights()
        try:
            return self._run_graph(args, kwargs)
        except _Refused as refused:
            why = refused
        result = self._eager(*args, **kwargs)  # what fails here too is the caller's mistake
        if why.error is not None:
            self._refuse(args, kwargs, why.key, why.error)
        return result

    def _run_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call's result from a compiled graph. Raises _Refused where there can be none."""
        compiler = self._ridgeline.compile_program
        key = call = None
        try:
            with compiler.deciding():
                call = flatten(args, kwargs)
                key = self._key(call)
            known = functools.partial(self._unshared, key, call)
            while True:
                with compiler.meet("a result", call, known) as graphs:
                    captures = self._ridgeline.captures
                    for _, captured, run in graphs:
                        try:
                            outputs = run(*call.flat)
                        except InputMismatch:  # the sizes fit, but strides differ from those seen
                            continue
                        return captured.finish(call, marked(outputs, captured.sources))
                    with self._ridgeline.lock:
                        if not self._ridgeline.refused.isdisjoint((key, _kind(key, call))):
                            raise _Refused
                        if captures != self._ridgeline.captures:
                            continue  # another thread has captured since, perhaps such a call
                        _, captured, run = self._compile(key, args, kwargs)
                    with compiler.compiling():
                        captured.refuse_overlap(call)
                    outputs = run(*call.flat)
                    return captured.finish(call, marked(outputs, captured.sources))
        except (CaptureError, CacheError, CompileError) as error:
            if self._ridgeline.strict:
                raise
            if isinstance(error, CacheError) and call is not None:
                key = _kind(key, call)
            raise _Refused(None if isinstance(error, OverlapError) else key, error) from error

    def _forget_changed_weights(self) -> None:
        """Drop graphs that hold weights which have been reassigned or, once folded, changed."""
        state = self._ridgeline
        if state.weights.unchanged() and not state.compile_program.stale():
            return
        log.info("weights changed: captured graphs are dropped")
        self.refresh()

    def _key(self, call: Call) -> Any:
        modes = tuple(map(_MODE, self._ridgeline.modules))
        return (call.trains(self), autocast.active(), modes, call.key)

    def _accepting(self, key: Any, call: Call) -> Iterator[Graph]:
        """The graphs that take the sizes of `call`, the one used last first."""
        graphs = self._ridgeline.graphs
        for number, (known, captured, run) in reversed(list(graphs.items())):
            if known == key and captured.guards.accept(call.flat):
                if number in graphs:  # another thread may have given it up
                    graphs.move_to_end(number)
                yield Graph(number, captured, run)

    def _unshared(self, key: Any, call: Call) -> Iterator[Graph]:
        """`_accepting`; raises OverlapError where one would write to memory that inputs share."""
        for graph in self._accepting(key, call):
            graph.captured.refuse_overlap(call)
            yield graph

    def _compile(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
        state = self._ridgeline
        number = state.captures
        with state.compile_program.compiling():
            captured, run = self._compiled(args, kwargs)
        if captured.program.training and not self.training:
            self.plan.note(HAS_BACKWARD)
        if autocast.active():  # the graph casts by itself
            run = autocast.without(run)
        if len(state.graphs) >= state.max_graphs:
            _, (_, oldest, _) = state.graphs.popitem(last=False)
            state.compile_program.release(oldest.program)
            log.warning(
                "%d graphs are kept at most; giving up the oldest (%s). Calls with many different"
                " fixed shapes recompile each time: pad inputs, or raise max_graphs",
                state.max_graphs,
                oldest.program.phase,
            )
        state.graphs[number] = (key, captured, run)
        state.captures += 1
        return Graph(number, captured, run)

    def _compiled(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Captured, Callable[..., Any]]:
        state = self._ridgeline
        _refuse_hooks(state.modules[1:])
        with _CAPTURING:
            captured = capture(self._original(), args, kwargs)
        try:
            with _CAPTURING, autocast.disabled():
                return captured, state.compile_program(captured.program)
        except RidgelineError:
            raise
        except Exception as error:
            log.exception("a defect of ridgeline, please report it")
            raise CompileError(
                f"compiling failed ({type(error).__name__}: {error}), which is a defect of"
                " ridgeline; please report it"
            ) from error

    def _refuse(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any, error: Exception
    ) -> None:
        state = self._ridgeline
        if key is not None:
            state.refused.add(key)
        reason = str(error)
        if reason in state.fallbacks.values():
            return  # said once; a cache that counts in Python would repeat it at every token
        log.warning("running the original code for this kind of call: %s", reason)
        name = f"call {len(state.fallbacks)} ({', '.join(kwargs) or f'{len(args)} arguments'})"
        state.fallbacks[name] = reason
        self.plan.note(f"a kind of call runs the original code: {reason}")

    def _original(self) -> nn.Module:
        self._ridgeline.original.training = self.training
        return self._ridgeline.original

    def _eager(self, *args: Any, **kwargs: Any) -> Any:
        with self._ridgeline.lock:
            return self._original()(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """A plain attribute may be a constant of captured graphs: they are dropped."""
        super().__setattr__(name, value)
        state = self.__dict__.get("_ridgeline")
        if state is None or name == "training":
            return
        state.original.__dict__.update({k: v for k, v in self.__dict__.items() if k not in _OWN})
        plain = name not in self._parameters and name not in self._buffers
        if plain and not name.startswith("_"):  # such are a library's own notes, as generate's
            self.refresh()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OptimizedModule":
        """`to`, `half`, `cuda`: parameters that change are the copy's own from then on."""
        fresh: dict[nn.Parameter, nn.Parameter] = {}
        for module in self._ridgeline.modules:
            for name, p in module._parameters.items():
                if p is not None and _moves(fn, p):
                    fresh.setdefault(p, nn.Parameter(p.detach(), p.requires_grad))
                    module._parameters[name] = fresh[p]
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise DropInError(
            "an optimised model holds compiled code and cannot be copied;"
            " copy the original and call ridgeline.optimize on it"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DropInError(
            "an optimised model holds compiled code and cannot be pickled; save the original's"
            " state_dict and call ridgeline.optimize after loading"
        )


def _kind(key: Any, call: Call) -> Any:
    """A key of all calls that differ from `call` in what a cache counts alone."""
    return (*key[:-1], call.kind)


def _moves(fn: Callable[[Tensor], Tensor], p: nn.Parameter) -> bool:
    """Does `fn` change dtype or device of such a tensor?"""
    probe = torch.empty(0, dtype=p.dtype, device=p.device)
    moved = fn(probe)
    return (moved.dtype, moved.device) != (probe.dtype, probe.device)


_TRANSFORMED = (
    "the call is made within a torch.func transform (grad, vmap, jvp, ...), which compiled code has"
    " no rule for; use torch.autograd.grad, or transform the original model"
)


def _refuse_hooks(modules: Sequence[nn.Module]) -> None:
    """The hooks of torch, as weight_norm's, and of transformers, which collects hidden states,
    compute what a graph holds; others may do anything, and would do it once, in the capture."""
    for module in modules:
        for hook in (h for name in RUN_HOOKS for h in getattr(module, name).values()):
            home = hook.__module__ if isinstance(hook, FunctionType) else type(hook).__module__
            if not (home or "").startswith(("torch.", "transformers.")):
                said = getattr(hook, "__qualname__", type(hook).__name__)
                raise CaptureError(
                    f"a hook ({said}) of a {type(module).__name__} inside the model runs"
                    " Python code in every call, which no graph holds; remove it to have the model"
                    " rewritten"
                )


def _own_forward(model: nn.Module, original: nn.Module) -> Callable[..., Any]:
    function = rebound(model.__dict__["forward"], model, original)
    if function is None:
        raise DropInError(
            f"forward of this {type(model).__name__} is a {type(model.forward).__name__} set on the"
            " object, which may hold the object itself; define forward in the class, or set a"
            " method bound to the object (types.MethodType) or a functools.partial"
        )
    return function


def optimized_copy(
    model: nn.Module,
    compile_program: CompileProgram,
    *,
    strict: bool = False,
    max_graphs: int = 16,
) -> OptimizedModule:
    """A copy of `model` whose `forward` runs what `compile_program` makes of its graphs.

    strict: raise where a call cannot be captured; else the original code runs, which
    `fallbacks` and the plan say. Parameters are shared; `model` is not changed.
    """
    if isinstance(model, OptimizedModule):
        raise DropInError("the model is optimised already; pass the original to ridgeline.optimize")
    kind = type(model)
    copied = copy_model(model)
    original = object.__new__(kind)  # shares modules, parameters and buffers with `copied`
    original.__dict__ = copied.__dict__ | {name: OrderedDict() for name in _HOOKS}
    if "forward" in model.__dict__:  # it would hide the class's forward, which is ours
        del copied.__dict__["forward"]
        original.__dict__["forward"] = _own_forward(model, original)

    @functools.wraps(kind.forward)
    def forward(self: OptimizedModule, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    # `generate` and Trainer read the signature and the name of the class.
    namespace = {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    if hasattr(kind, "_valid_auto_compile_criteria"):  # `generate` must not compile us once more
        namespace["_valid_auto_compile_criteria"] = lambda self, *args, **kwargs: False
    copied.__class__ = type(kind.__name__, (OptimizedModule, kind), namespace)
    modules = list(copied.modules())
    copied.__dict__["_ridgeline"] = _State(
        original, compile_program, strict, max_graphs, modules, Watched.of(modules)
    )
    assert isinstance(copied, OptimizedModule)
    return copied
