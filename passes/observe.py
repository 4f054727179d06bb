"""What flows through a program on its example inputs: evidence for approximate rewrites."""

import contextlib
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ridgeline.ir.program import Program
from ridgeline.ir.quantized_linear import QUANTIZED_LINEAR
from ridgeline.passes.certify import relative_error

LINEAR = (torch.ops.aten.linear.default, QUANTIZED_LINEAR.overload)
ROWS = 256
"""Rows of each observed activation that are kept."""
SAMPLE = 4096
"""Numbers of each value that are kept of those that any operation gives."""


@dataclass(frozen=True, slots=True)
class Values:
    """Of a floating value: the largest magnitude, and up to `SAMPLE` numbers evenly taken."""

    reach: float
    sample: Tensor


@contextlib.contextmanager
def rehearsal(program: Program) -> Iterator[list[Any]]:
    """Copies of the example inputs, for a run that must leave no trace.

    Caches are updated in the copies. Buffers, which batch norm updates and models count in, get
    their values back afterwards, and so do the random generators; each rehearsal draws the same
    numbers.
    """
    module = program.module
    targets = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    held = [operator.attrgetter(target)(module) for target in targets]
    buffers = [t for t in held if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]
    tensors = [x for x in (*program.inputs, *buffers) if isinstance(x, Tensor)]
    devices = {x.device.index for x in tensors if x.is_cuda}
    before = [buffer.clone() for buffer in buffers]
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(0)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(0)
        try:
            yield [x.clone() if isinstance(x, Tensor) else x for x in program.inputs]
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                if not torch.equal(buffer, value):  # else its version would count up
                    buffer.copy_(value)


def outputs_of(module: fx.GraphModule, program: Program) -> list[Any]:
    """What `module` gives back on copies of the program's example inputs, caches aside.

    Of a program that gives nothing back, the inputs that it updated, None for the others.
    """
    with rehearsal(program) as copies:
        result = module(*copies)
    returned = list(result)[: program.results or None]
    if any(isinstance(x, Tensor) for x in returned):
        return returned
    return [
        after if isinstance(after, Tensor) and not torch.equal(after, before) else None
        for before, after in zip(program.inputs, copies, strict=True)
    ]


class Observation:
    """The inputs of every linear layer of a program, coded or not; how errors there reach its
    outputs."""

    def __init__(self, module: fx.GraphModule, program: Program) -> None:
        self._module, self._program = module, program
        self._rows: dict[fx.Node, Tensor] | None = None
        self._values: dict[fx.Node, Values] | None = None

    def __call__(self, node: fx.Node) -> Tensor:
        """Up to `ROWS` rows of the value of `node`, which must be read by a linear layer."""
        if self._rows is None:
            run = _Recorder(self._module, self._module.graph)
            with rehearsal(self._program) as inputs:
                run.run(*inputs)
            self._rows = run.rows
        return self._rows[node]

    def finite(self, node: fx.Node) -> bool:
        """Are these rows without infinities and NaN?"""
        return bool(torch.isfinite(self(node)).all())

    def values(self, node: fx.Node) -> Values:
        """What the value of `node`, any floating tensor, ranges over."""
        if self._values is None:
            run = _Ranges(self._module, graph=self._module.graph)
            with rehearsal(self._program) as inputs:
                run.run(*inputs)
            self._values = run.values
        return self._values[node]

    def sensitivity(self) -> float:
        """Output error per unit of local error, measured by rounding every linear input to bf16.

        Local errors add as root of the sum of squares; the answer is the model's output error
        divided by that, at least 1e-3 so that nothing counts as free; 1 where it has no answer
        (values that vanish or overflow on the way).
        """
        exact = _Recorder(self._module, self._module.graph)
        probe = _Recorder(self._module, self._module.graph, round_inputs=True)
        with rehearsal(self._program) as inputs:
            expected = exact.run(*inputs)
        with rehearsal(self._program) as inputs:
            got = probe.run(*inputs)
        local = sum(e * e for e in probe.errors) ** 0.5
        results = slice(self._program.results or None)
        ratio = relative_error(got[results], expected[results]) / local if local else math.nan
        return max(ratio, 1e-3) if math.isfinite(ratio) else 1.0


class _Ranges(fx.Interpreter):
    """Runs a program, keeping what each floating value ranges over."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.values: dict[fx.Node, Values] = {}
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point() and result.numel():
            flat = result.detach().flatten()
            sample = flat[:: -(-flat.numel() // SAMPLE)].clone()
            self.values[n] = Values(flat.abs().max().item(), sample)
        return result


class _Recorder(fx.Interpreter):
    """Runs a program, keeping (or rounding) the inputs of its linear layers."""

    def __init__(
        self, module: fx.GraphModule, graph: fx.Graph, *, round_inputs: bool = False
    ) -> None:
        super().__init__(module, graph=graph)
        self.rows: dict[fx.Node, Tensor] = {}
        self.errors: list[float] = []
        self._round = round_inputs

    def run(self, *args: Any, **kwargs: Any) -> Any:
        result = super().run(*args, **kwargs)
        return list(result) if isinstance(result, tuple | list) else [result]

    def run_node(self, n: fx.Node) -> Any:
        if n.target not in LINEAR:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        source = n.args[0]
        assert isinstance(source, fx.Node)
        x = args[0]
        if source not in self.rows:
            self.rows[source] = x.detach().reshape(-1, x.shape[-1])[:ROWS].clone()
        if not self._round:
            return self.call_function(n.target, args, kwargs)
        rounded = self.call_function(n.target, (x.bfloat16().to(x.dtype), *args[1:]), kwargs)
        exact = self.call_function(n.target, args, kwargs)
        self.errors.append(relative_error([rounded], [exact]))
        return rounded
