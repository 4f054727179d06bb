"""FLOPs equal torch's own counter; bytes are those of the tensors; views are free."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import ridgeline.ir.attention
import ridgeline.ir.quantized_linear  # noqa: F401 - registers the ops
from ridgeline.cost_model import Attention, Gemm, Uncountable, Work, work_of, work_of_graph


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

    (kernel,) = work_of_graph(captured(linear, r(3, 5, 32), r(8, 2))).kernels
    assert kernel == Gemm(15, 8, 32, weight_bits=4, group_size=16)
    assert kernel.bytes["weight"] == 8 * 32 / 2 + 8 * 2 * 2


def test_a_call_that_was_not_captured():
    graph = torch.fx.symbolic_trace(lambda x: x.relu()).graph
    with pytest.raises(Uncountable, match="capture the program"):
        work_of(list(graph.nodes)[1])
