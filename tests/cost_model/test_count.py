"""FLOPs equal torch's own counter; bytes are those of the tensors; views are free."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import ridgeline.ir.attention  # noqa: F401 - registers the op
from ridgeline.cost_model import Attention, Gemm, Uncountable, Work, work_of, work_of_graph
from ridgeline.ir.capture import capture
from ridgeline.passes.quantization import Codec, QuantizedWeight
from ridgeline.passes.quantization.layer import QuantizedLinear


def captured(function, *args, **kwargs):
    class Module(torch.nn.Module):
        def forward(self, *xs):
            return function(*xs)

    return torch.export.export(Module(), args, strict=False, **kwargs).graph


def r(*shape):
    return torch.randn(*shape)


CASES = {
    "linear": (F.linear, r(3, 5, 7), r(11, 7), r(11)),
    "linear_vector": (F.linear, r(7), r(11, 7)),
    "mm": (torch.mm, r(5, 7), r(7, 3)),
    "matmul_2d": (torch.matmul, r(2, 3, 5, 7), r(7, 3)),
    "matmul_4d": (torch.matmul, r(2, 3, 5, 7), r(2, 3, 7, 9)),
    "bmm": (torch.bmm, r(2, 5, 7), r(2, 7, 3)),
    "addmm": (torch.addmm, r(3), r(5, 7), r(7, 3)),
    "baddbmm": (torch.baddbmm, r(2, 5, 3), r(2, 5, 7), r(2, 7, 3)),
    "conv2d": (lambda x, w: F.conv2d(x, w, stride=2, padding=1), r(2, 4, 9, 7), r(6, 4, 3, 3)),
    "conv2d_groups": (lambda x, w: F.conv2d(x, w, groups=2), r(2, 4, 9, 7), r(6, 2, 3, 3)),
    "conv1d": (F.conv1d, r(2, 4, 9), r(6, 4, 3), r(6)),
    "conv_transpose2d": (F.conv_transpose2d, r(2, 4, 5, 5), r(4, 6, 3, 3)),
    "sdpa": (F.scaled_dot_product_attention, r(2, 4, 5, 8), r(2, 4, 9, 8), r(2, 4, 9, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_flops_equal_the_flop_counter(name):
    function, *args = CASES[name]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args)
    expected = counter.get_total_flops()
    if name == "sdpa":  # the CPU kernel isn't in the counter's table
        expected = 2 * 2 * 4 * 5 * 9 * (8 + 8)
    flops = work_of_graph(captured(function, *args)).flops
    assert flops == {("matrix", "float32"): expected}


def test_bytes_of_a_linear():
    work = work_of_graph(captured(F.linear, r(3, 5, 7), r(11, 7), r(11)))
    assert work.bytes == {"input": 3 * 5 * 7 * 4, "weight": (11 * 7 + 11) * 4, "output": 165 * 4}
    assert work.launches == 1


def test_convolution_reads_its_image_once():
    work = work_of_graph(captured(F.conv2d, r(2, 4, 9, 7), r(6, 4, 3, 3)))
    sizes = {"input": 2 * 4 * 9 * 7, "weight": 6 * 4 * 9, "output": 2 * 6 * 7 * 5}
    assert work.bytes == {role: 4 * n for role, n in sizes.items()}


def test_streams_read_and_write_once():
    work = work_of_graph(captured(lambda x, y: torch.relu(x + y), r(5, 7), r(7)))
    assert work.launches == 2
    assert work.bytes == {"input": (35 + 7 + 35) * 4, "output": 70 * 4}
    assert work.flops == {("vector", "float32"): 70}


def test_embedding_reads_rows_not_the_table():
    work = work_of_graph(captured(F.embedding, torch.arange(3), r(1000, 8)))
    assert work.bytes["input"] < 1000


def test_views_are_free_and_copies_are_not():
    def views(x):
        return x.transpose(1, 2).unsqueeze(0).expand(3, -1, -1, -1)[:, 0].detach()

    assert work_of_graph(captured(views, r(2, 5, 7))) == Work()
    assert work_of_graph(captured(lambda x: x.reshape(10, 7), r(2, 5, 7))) == Work()
    copied = work_of_graph(captured(lambda x: x.transpose(1, 2).reshape(2, 35), r(2, 5, 7)))
    assert copied.bytes == {"input": 280.0, "output": 280.0}
    cast = work_of_graph(captured(lambda x: x.to(torch.bfloat16), r(2, 5)))
    assert cast.bytes == {"input": 40.0, "output": 20.0}
    assert work_of_graph(captured(lambda x: F.dropout(x, 0.5, False), r(2, 5))) == Work()


def test_expanded_operand_is_read_once():
    work = work_of_graph(captured(lambda x, y: x * y.expand(9, 5), r(9, 5), r(1, 5)))
    assert work.bytes["input"] == (45 + 5) * 4


class Product(torch.nn.Module):
    """The product of `left` and `right` of an input [2, 7, 7] and a weight of that shape."""

    def __init__(self, left, right):
        super().__init__()
        self.left, self.right = left, right
        self.weight = torch.nn.Parameter(r(2, 7, 7))

    def forward(self, x):
        return torch.bmm(self.left(x, self.weight), self.right(x, self.weight))


@pytest.mark.parametrize(
    ("left", "right", "weight"),
    [
        (lambda x, w: x.exp(), lambda x, w: w.transpose(1, 2), "right"),
        (lambda x, w: x.exp(), lambda x, w: w.chunk(2)[1].mT.expand(2, 7, 7), "right"),
        (lambda x, w: x.exp(), lambda x, w: w.half().float().clone(), "right"),
        (lambda x, w: x.exp(), lambda x, w: x, "right"),
        (lambda x, w: x.exp(), lambda x, w: (x + 1).mT, "none"),
        (lambda x, w: x, lambda x, w: x.exp().chunk(2)[1].expand(2, 7, 7), "none"),
        (lambda x, w: w.mT, lambda x, w: x.exp(), "left"),
        (lambda x, w: w.bfloat16().float(), lambda x, w: x, "left"),
    ],
)
def test_a_weight_is_what_the_program_does_not_form(left, right, weight):
    with torch.no_grad():
        graph = capture(Product(left, right).eval(), (r(2, 7, 7),)).program.module.graph
    (product,) = (k for k in work_of_graph(graph).kernels if isinstance(k, Gemm))
    assert product.weight == weight
    assert (product.bytes["weight"] > 0) == (weight != "none")
    one, two = 49 * 4, 2 * 49 * 4  # a part that is expanded is read once
    assert sum(product.bytes.values()) in (3 * two, 2 * two + one)


def test_experts_share_the_rows_and_are_read_once():
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)
    weights = r(3, 16, 8).bfloat16()
    for rows, read in ((10, 3), (2, 2)):
        x = r(rows, 16).bfloat16()
        graph = captured(torch._grouped_mm, x, weights, ends.clamp(max=rows))
        (product,) = (k for k in work_of_graph(graph).kernels if isinstance(k, Gemm))
        assert product.flops == 2 * rows * 16 * 8
        assert product.bytes == {
            "input": 2.0 * rows * 16, "weight": 2.0 * read * 16 * 8, "output": 2.0 * rows * 8,
        }  # fmt: skip


def test_mixtrals_experts_count():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    config = transformers.MixtralConfig(**sizes, **heads, num_experts_per_tok=2)
    with torch.no_grad():
        model = transformers.MixtralForCausalLM(config).eval()
        graph = capture(model, (torch.zeros(2, 8, dtype=torch.long),)).program.module.graph
    products = [k for k in work_of_graph(graph).kernels if isinstance(k, Gemm) and k.experts > 1]
    assert [k.experts for k in products] == [config.num_local_experts] * 2
    assert sum(k.flops for k in products) == 2 * (2 * 8) * 2 * 3 * 32 * 48  # 3 matrices, 2 experts


def test_a_linear_layer_reads_keys_that_were_formed():
    graph = captured(lambda x, y: F.linear(x, y.exp()), r(5, 7), r(11, 7))
    (linear,) = (k for k in work_of_graph(graph).kernels if isinstance(k, Gemm))
    assert linear.bytes == {"input": 4.0 * (35 + 77), "weight": 0.0, "output": 4.0 * 55}


def test_symbolic_sizes_count_with_their_hints():
    dynamic = ({0: torch.export.Dim("rows", min=2)}, None)
    graph = captured(F.linear, r(6, 7), r(11, 7), dynamic_shapes=(dynamic,))
    assert work_of_graph(graph).kernels == (Gemm(6, 11, 7),)


def test_causal_attention_counts_kept_pairs():
    def causal(q, k):
        return F.scaled_dot_product_attention(q, k, k, is_causal=True)

    (kernel,) = work_of_graph(captured(causal, r(2, 4, 5, 8), r(2, 4, 9, 8))).kernels
    assert kernel.pairs == 15  # top-left: 1 + 2 + ... + 5
    assert kernel.bytes["kv"] == 2 * 4 * 5 * 16 * 4


@pytest.mark.parametrize(("q", "kv"), [(5, 5), (5, 9), (1, 7), (7, 3), (0, 4), (4, 0)])
def test_pairs_of_the_bottom_right_triangle(q, kv):
    kept = torch.ones(q, kv).tril(kv - q).sum().item()
    assert Attention(1, 1, 1, q, kv, 8, 8, causal=True).pairs == kept


@pytest.mark.parametrize("diagonal", [None, 0, 3])
def test_ridgeline_attention(diagonal):
    def attention(q, k):
        return torch.ops.ridgeline.attention(q, k, k, scale=1.0, diagonal=diagonal)

    (kernel,) = work_of_graph(captured(attention, r(2, 4, 5, 8), r(2, 2, 9, 8))).kernels
    kept = torch.ones(5, 9) if diagonal is None else torch.ones(5, 9).tril(diagonal)
    assert kernel.flops == 2 * 2 * 4 * int(kept.sum()) * 16
    assert (kernel.heads, kernel.kv_heads) == (4, 2)


def test_ridgeline_quantized_linear():
    packed = torch.zeros(8, 16, dtype=torch.uint8)

    def linear(x, scale):
        return torch.ops.ridgeline.quantized_linear(x, packed, scale, bits=4, group_size=16)

    (kernel,) = work_of_graph(captured(linear, r(3, 5, 32), r(8, 2).half())).kernels
    assert kernel == Gemm(15, 8, 32, weight_bits=4, group_size=16)
    assert kernel.bytes["weight"] == 8 * 32 / 2 + 8 * 2 * 2


CODED = {
    "uniform": (Codec(4, 32, "symmetric"), 4, 2),
    "zero_point": (Codec(8, 32), 8, 2 + 1),
    "minimum": (Codec(4, 32, "minimum"), 4, 2 + 2),
    "binary": (Codec(3, 32, "binary"), 3, 3 * 2),
    "binary with an offset": (Codec(2, 32, "binary", centred=False), 2, 2 * 2 + 2),
    "powers of two": (Codec(3, 32, "binary", terms=2), 3, 3 * 2),
    "shift": (Codec(8, 32, "shift", terms=2), 8, 2),
}


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("multiply", [None, torch.int16], ids=str)
def test_quantized_linear_of_every_codec_reads_the_bytes_that_it_holds(name, multiply):
    codec, bits, per_group = CODED[name]
    weight = _coded(codec, rows=8, columns=80)
    layer = QuantizedLinear(weight, r(8), multiply)
    (kernel,) = work_of_graph(captured(layer.forward, r(3, 80))).kernels
    assert kernel.bytes["weight"] == weight.nbytes + 8 * 4
    assert weight.nbytes == 8 * (-(-80 * bits // 8) + 3 * per_group) + 16 + 2 * 80
    assert kernel.bytes["input"] == 3 * 80 * 4
    assert kernel.lookup == (codec.scheme == "binary" and multiply == torch.int16)


def _coded(codec: Codec, rows: int, columns: int) -> QuantizedWeight:
    """Random codes and scales, with row scales and a permutation."""
    shape = (rows, codec.groups(columns))
    scale, offset = torch.rand(shape).half(), None
    if codec.scheme == "binary":
        scale = torch.rand(*shape, codec.bits).half()
        if codec.terms:
            scale = torch.randint(60, 70, (*shape, codec.bits, codec.terms), dtype=torch.int8)
    if codec.scheme == "minimum" or not codec.centred:
        offset = torch.rand(shape).half()
    if codec.scheme == "zero_point":
        offset = torch.zeros(shape, dtype=torch.uint8)
    return QuantizedWeight(
        torch.zeros(rows, -(-columns * codec.bits // 8), dtype=torch.uint8), scale, offset,
        codec.bits, codec.group_size, columns, codec.codec, codec.group_rows,
        codec.terms if codec.scheme == "shift" else 1, torch.rand(rows).half(),
        torch.randperm(columns).short(),
    )  # fmt: skip


def test_groups_of_several_rows_share_their_scales():
    shared = Gemm(1, 96, 64, weight_bits=3, group_size=1, scheme="binary", group_rows=96, terms=3)
    assert shared.bytes["weight"] == 96 * 64 * 3 / 8 + 64 * 3 * 3


def test_binary_attention():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v, t):
            return torch.ops.ridgeline.binary_attention(q, k, v, t, t)

    binary = pytest.importorskip("ridgeline.ir.binary_attention")
    assert binary.BINARY_ATTENTION.qualified == "ridgeline::binary_attention"
    arguments = r(2, 3, 5, 8), r(2, 3, 7, 8), r(2, 3, 7, 16), r(3, 8)
    (kernel,) = work_of_graph(captured(Attend().forward, *arguments)).kernels
    assert kernel.additions == 2 * 3 * (7 + 5) * (8 + 1) * 16
    assert kernel.divisions == 2 * 3 * 5
    sizes = {"input": 5 * 8 + 7 * 8, "kv": 7 * 16, "output": 5 * 16}
    assert kernel.bytes == {role: 2 * 3 * 4 * n for role, n in sizes.items()}


def test_a_call_that_was_not_captured():
    graph = torch.fx.symbolic_trace(lambda x: x.relu()).graph
    with pytest.raises(Uncountable, match="capture the program"):
        work_of(list(graph.nodes)[1])
