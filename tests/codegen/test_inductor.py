"""Compiled graphs against the same graphs run eagerly: results, aliases, mutations, shapes."""

from collections.abc import Callable

import pytest
import sympy
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from ridgeline.codegen import inductor
from ridgeline.codegen.errors import UnsupportedProblem
from ridgeline.codegen.inductor import NoCompiler, compile_graph, run_eager
from ridgeline.codegen.inductor_inputs import InputMismatch, input_check

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

LIBRARY = torch.library.Library("ridgeline_test_inductor", "DEF")
LIBRARY.define("double(Tensor x, int times) -> Tensor")
LIBRARY.impl("double", lambda x, times: x * (2.0**times), "CPU")
torch.library.register_fake("ridgeline_test_inductor::double", lambda x, times: torch.empty_like(x))


class Wrap(nn.Module):
    """A function as a module, with a weight."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))

    def forward(self, *inputs):
        return self.function(self.weight, *inputs)


def captured(function: Callable, *inputs, dynamic=None) -> fx.GraphModule:
    """The exported graph with its weights as `get_attr`, as lowering receives it."""
    shapes = None if dynamic is None else {"inputs": dynamic}
    program = torch.export.export(Wrap(function), inputs, strict=False, dynamic_shapes=shapes)
    module, weights = program.graph_module, program.graph_signature.inputs_to_parameters
    for node in list(module.graph.nodes):
        if node.op == "placeholder" and node.target in weights:
            module.register_parameter("w", program.state_dict[weights[node.target]])
            with module.graph.inserting_before(node):
                weight = module.graph.get_attr("w")
            weight.meta.update(node.meta)
            node.replace_all_uses_with(weight)
            module.graph.erase_node(node)
    module.recompile()
    return module


def clones(inputs):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]


def check(module: fx.GraphModule, *inputs, dynamic=False, calls=None) -> Callable:
    """Compile, and compare outputs, strides and inputs after the call with the eager graph."""
    compiled, eager = compile_graph(module, clones(inputs), dynamic=dynamic), run_eager(module)
    for call in calls or [inputs]:
        ours, theirs = clones(call), clones(call)
        found, expected = compiled(*ours), eager(*theirs)
        assert isinstance(found, tuple)
        for a, b in zip((*found, *ours), (*expected, *theirs), strict=True):
            if isinstance(b, torch.Tensor):
                torch.testing.assert_close(a, b, check_stride=True)
                assert not a.requires_grad
            else:
                assert a == b
    return compiled


def test_weights_custom_op_and_fusion():
    def f(w, x):
        y = torch.ops.ridgeline_test_inductor.double(torch.relu(x @ w), 3)
        return (y.sigmoid() * 2 + 1,)

    check(captured(f, torch.randn(5, 3)), torch.randn(5, 3))


def test_module_and_its_weights_are_not_changed():
    module = captured(lambda w, x: (x @ w,), torch.randn(2, 3))
    text, weight = module.print_readable(print_output=False), module.w
    compiled = check(module, torch.randn(2, 3))
    assert module.print_readable(print_output=False) == text
    assert module.w is weight
    with torch.no_grad():
        module.w.zero_()
    assert compiled(torch.ones(2, 3))[0].abs().max() == 0, "weights are shared, not copied"


def test_cache_is_written_in_place():
    def f(w, cache, new, at):
        cache.index_copy_(1, at, new)
        return ((cache @ w.T).sum(1),)

    cache, new, at = torch.zeros(2, 16, 4), torch.randn(2, 1, 4), torch.tensor([3])
    module = captured(f, cache.clone(), new, at)
    compiled = check(module, cache, new, at)
    address = cache.data_ptr()
    compiled(cache, new, torch.tensor([7]))
    assert cache.data_ptr() == address
    torch.testing.assert_close(cache[:, 7], new[:, 0])
    assert cache[:, :7].abs().max() == 0


@pytest.mark.parametrize("inference", [False, True])
def test_outputs_that_are_inputs_or_views(inference):
    def f(w, x):
        y = x * 2
        return x, x.T, y, y[1:], x

    module = captured(f, torch.randn(3, 4))
    compiled = check(module, torch.randn(3, 4))
    with torch.inference_mode(inference):
        x = torch.randn(3, 4)
        same, transposed, y, tail, again = compiled(x)
    assert same.data_ptr() == again.data_ptr() == transposed.data_ptr() == x.data_ptr()
    assert tail.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def test_output_strides_are_kept():
    def f(w, x):
        return (x.transpose(1, 2) * 2, torch.relu(x).permute(2, 0, 1))

    check(captured(f, torch.randn(2, 3, 5)), torch.randn(2, 3, 5))


def test_input_strides_other_than_contiguous():
    x = torch.randn(7, 5).T
    check(captured(lambda w, x: (x.sin() + 1,), x), x)


@pytest.mark.parametrize("mutates", [False, True])
def test_graph_without_outputs(mutates):
    def f(w, x):
        if mutates:
            x.add_(1)
        return ()

    check(captured(f, torch.zeros(4)), torch.zeros(4))


def test_constants_as_inputs_and_outputs():
    def f(w, x, n, flag, none, text):
        return (x * n if flag else x), None, n, 2.5, text

    inputs = (torch.randn(3), 3, True, None, "text")
    compiled = check(captured(f, *inputs), *inputs)
    assert compiled(*inputs)[1:] == (None, 3, 2.5, "text")


def test_graph_of_constants_only():
    module = captured(lambda w, x: (None, 4), torch.randn(3))
    assert compile_graph(module, [torch.randn(3)], dynamic=False)(torch.randn(3)) == (None, 4)


def test_free_sizes_and_symint_outputs():
    def f(w, x, y):
        return torch.cat([x, y], 0) @ w, x.shape[0] + y.shape[0], x.shape[0]

    inputs = (torch.randn(5, 3), torch.randn(6, 3))
    module = captured(f, *inputs, dynamic=({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}))
    calls = [inputs, (torch.randn(9, 3), torch.randn(31, 3)), (torch.randn(400, 3), inputs[1])]
    compiled = check(module, *inputs, dynamic=True, calls=calls)
    assert compiled(*calls[1])[1:] == (40, 9)


def test_symint_input():
    def f(w, x, n):
        return x * n, n + 1

    inputs = (torch.randn(5, 3), 7)
    module = captured(f, *inputs, dynamic=({0: Dim.DYNAMIC}, Dim.DYNAMIC))
    check(module, *inputs, dynamic=True, calls=[inputs, (torch.randn(8, 3), 11)])


def test_growing_cache():
    def f(w, cache, new):
        cache = torch.cat([cache, new], 1)
        return cache, cache.softmax(1).sum(1)

    inputs = (torch.randn(2, 6, 4), torch.randn(2, 1, 4))
    module = captured(f, *inputs, dynamic=({1: Dim.DYNAMIC}, None))
    compiled = check(module, *inputs, dynamic=True)
    cache = inputs[0]
    for length in range(7, 12):
        cache = compiled(cache, inputs[1])[0]
        assert cache.shape == (2, length, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.randn(5, 3).double(), "dtype torch.float32, found torch.float64"),
        (torch.randn(3, 5).T, "strides"),
        (torch.randn(5, 4), "shape"),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_other_inputs_are_refused(wrong, message, dynamic):
    sizes = ({0: Dim.DYNAMIC},) if dynamic else None
    module = captured(lambda w, x: (x @ w,), torch.randn(5, 3), dynamic=sizes)
    compiled = compile_graph(module, [torch.randn(5, 3)], dynamic=dynamic)
    with pytest.raises(InputMismatch, match=message):
        compiled(wrong)
    with pytest.raises(InputMismatch, match="expected 1 flat inputs, found 2"):
        compiled(wrong, wrong)


def free_sizes(length: int) -> tuple[FakeTensor, sympy.Symbol]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = mode.from_tensor(torch.randn(length, 3), symbolic_context=context)
    return x, x.shape[0].node.expr


def test_conditions_that_the_compiler_assumed_are_checked():
    x, n = free_sizes(8)
    checked = input_check([x], [sympy.And(n > 4, sympy.Ne(n, 9))])
    checked(torch.randn(5, 3))
    for length in (4, 9):
        with pytest.raises(InputMismatch, match="sizes that break it"):
            checked(torch.randn(length, 3))


def test_sizes_that_no_input_shows_are_refused():
    x, n = free_sizes(8)
    with pytest.raises(UnsupportedProblem, match="no input shows"):
        input_check([x], [sympy.Symbol("hidden", integer=True) > n])


def test_settings_and_threads_are_left_alone():
    from torch._inductor import config

    before, threads, grad = config.save_config(), torch.get_num_threads(), torch.is_grad_enabled()
    check(captured(lambda w, x: (x + 1,), torch.randn(4)), torch.randn(4))
    assert config.save_config() == before
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, grad)


def test_no_compiler(monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    module = captured(lambda w, x: (x + 1,), torch.randn(4))
    with pytest.raises(NoCompiler, match="lowering='eager'"):
        inductor.compile_graph(module, [torch.randn(4)], dynamic=False)
    assert run_eager(module)(torch.zeros(4))[0].sum() == 4
