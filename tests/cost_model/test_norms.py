"""What a norm is worth as one operation: where Inductor's own kernel is as good, nothing."""

import pytest
import torch

import ridgeline.ir.layer_norm
import ridgeline.ir.rms_norm  # noqa: F401 - registers the operations
from ridgeline.cost_model import Norm, Work, estimate, load_target, work_of_graph
from ridgeline.cost_model.target import parse_target


def cpu(threads=1):
    """A quiet Zen 4, as the probe describes it."""
    numbers = {
        "cores": threads, "threads": threads, "memory_gb": 16.0, "bandwidth_gb_per_s": 25.0,
        "cache_kib": [32.0, 1024.0, 32768.0], "cache_bandwidth_gb_per_s": [180.0, 110.0, 60.0],
        "launch_us": 1.5, "fork_us": 0.1, "gemm_efficiency": 0.9, "bandwidth_efficiency": 1.0,
        "attention_efficiency": 0.5, "spread": 0.0,
    }  # fmt: skip
    peaks = {"float32": 0.11 * threads}
    source = {**dict.fromkeys(numbers, "a test"), "peaks_tflops": {"float32": "a test"}}
    description = {"name": "cpu", "kind": "cpu", "arch": "x86_64", "features": []}
    return parse_target(
        {**description, **numbers, "peaks_tflops": peaks, "source": source}, "a test"
    )


def seconds(target, rows, size, library, **form):
    work = Work((Norm(rows, size, torch.bfloat16, library=library, **form),))
    return estimate(work, target).seconds


def gain(target, rows, size, **form):
    """Inductor's time over ridgeline's."""
    return seconds(target, rows, size, "inductor", **form) / seconds(
        target, rows, size, "ridgeline", **form
    )


@pytest.mark.parametrize("name", ["a100", "h100", "l4", "mi300x"])
def test_gpus_gain_where_inductor_reads_a_row_twice(name):
    target = load_target(name)
    assert gain(target, 4096, 1024, residual=True) == 1
    assert gain(target, 1, 576) == 1
    assert gain(target, 1, 8192, residual=True) == 1
    # At most half as much again is read, by torch's measured kernel less well than by a loop.
    assert 1.1 < gain(target, 4096, 4096, residual=True) < 1.6
    assert 1.1 < gain(target, 4096, 8192, center=True) < 1.6


def test_a_cpu_gains_on_many_rows_and_loses_on_one():
    machine = cpu()
    for form in ({}, {"residual": True}, {"center": True}, {"center": True, "residual": True}):
        assert gain(machine, 1, 576, **form) < 1
        assert gain(machine, 256, 576, **form) > 1.2
        assert gain(machine, 256, 4096, **form) > 1.2
        assert gain(machine, 256, 4096, center=True) > gain(machine, 256, 4096)


def test_two_threads_share_the_rows():
    one, two = (seconds(cpu(n), 512, 1024, "ridgeline") for n in (1, 2))
    assert 1.5 < one / two < 2.1


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_bytes_and_flops_of_the_operations(residual, center):
    def model(x, r, weight, bias):
        name = f"{'add_' * residual}{'layer' if center else 'rms'}_norm"
        op = getattr(torch.ops.ridgeline, name)
        parameters = (weight, bias) if center else (weight,)
        return op(*((x, r) if residual else (x,)), *parameters, eps=1e-6)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return model(*inputs)

    x, weight = torch.randn(3, 5, 7), torch.randn(7)
    graph = torch.export.export(Module(), (x, x + 1, weight, weight), strict=False).graph
    (kernel,) = work_of_graph(graph).kernels
    assert kernel == Norm(15, 7, torch.float32, center, residual, library="ridgeline")
    tensors = (4 if residual else 2) * x.nbytes + (2 if center else 1) * weight.nbytes
    assert sum(kernel.bytes.values()) == tensors
    assert kernel.flops > 0
