"""estimate(work, target): seconds with an interval, bytes, FLOPs, eFLOPs, energy, what bounds it.

    seconds  sum over kernels (`gpu_time`, `cpu_time`); launched one by one
             (launch="eager") with the device's waiting for the host (`launches`)
    eflops   sum of flops + I · bytes, I = peak of the executing unit / bandwidth   (Kinetics)
    energy   operations by kind and dtype, and bytes, times unit energies: `energy`, whose figures
             rank number formats and codecs; they aren't watts of this chip, nor turned into time

The interval [low, high] is meant to hold 90 % of measurements; errors of one kind of kernel are
shared, so they add. On GPUs it is that of the law's group: errors on shapes, or whole machines,
that were left out of its fit (`calibration.json`). On a CPU it is t / (1+e) ... t · (1+e), where e
is the probe's spread plus an assumed error of the form, or, of kinds of kernels that were measured
by `ridgeline calibrate`, the error that was measured.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from ridgeline.cost_model import cpu_time, gpu_time
from ridgeline.cost_model.elementwise import root4
from ridgeline.cost_model.energy import joules
from ridgeline.cost_model.launches import Queue, queue
from ridgeline.cost_model.target import InvalidTarget, Refinement, Target
from ridgeline.cost_model.work import (
    Attention,
    BinaryAttention,
    Collective,
    Gemm,
    Kernel,
    Norm,
    Stream,
    Work,
)

_VECTOR = BinaryAttention | Norm | Stream
_CPU_ERROR = 0.30
MEAN_OF_INTERVAL = 0.24
"""Mean |x| of a normal x over the distance of its 5 % and 95 % quantiles."""


@dataclass(frozen=True, slots=True)
class Cost:
    """seconds within [low, high]; bytes moved; flops; eflops in FLOPs; energy_joules (45 nm units).

    weight_bytes: of the weights among `bytes`.
    bound: "compute", "memory", "launch" or "communication", whichever takes most of the time.
    spent: seconds by what bounds each kernel, each of the four; they add up to `seconds`.
    """

    seconds: float
    low: float
    high: float
    bytes: float
    flops: float
    eflops: float
    energy_joules: float
    bound: str
    weight_bytes: float = 0.0
    spent: dict[str, float] = field(default_factory=dict, hash=False)


def estimate(
    work: Work, target: Target, *, launch: str = "graph", resident_bytes: float = 0.0
) -> Cost:
    """What `work` costs on `target`.

    launch: "graph" (CUDA or HIP graphs, no host time) or "eager"; a CPU has no difference.
    resident_bytes: weights that the whole program reads between two uses of one of them; the cache
        keeps a weight for the next step only if it keeps all of these. 0: not known; a CPU then
        keeps what it can of each, a GPU what it did in the harness that timed its products.
    Raises ValueError for another `launch` and InvalidTarget for a collective without a link.
    """
    if launch not in ("graph", "eager"):
        raise ValueError(f"launch: expected 'graph' or 'eager', found {launch!r}")
    seconds = low = high = moved = flops = eflops = energy = weights = 0.0
    spent = {"compute": 0.0, "memory": 0.0, "launch": 0.0, "communication": 0.0}
    for kernel, count in Counter(work.kernels).items():  # a model repeats its layers
        kernel_bytes = count * sum(kernel.bytes.values())
        busy, fixed, bound = kernel_seconds(kernel, target, resident_bytes)
        busy, fixed = count * busy, count * fixed
        spent[bound] += busy
        spent["launch"] += fixed
        if not isinstance(kernel, Collective):
            unit = torch.float32 if isinstance(kernel, _VECTOR) else kernel.dtype
            intensity = target.peak(unit) / target.bandwidth_bytes_per_s
            eflops += count * kernel.flops + intensity * kernel_bytes
            energy += count * joules(kernel)
        below, above = interval(kernel, target, resident_bytes)
        seconds += busy + fixed
        low += (busy + fixed) * math.exp(below)
        high += (busy + fixed) * math.exp(above)
        moved += kernel_bytes
        weights += count * kernel.bytes.get("weight", 0.0)
        flops += count * kernel.flops
    host = 0.0
    if launch == "eager" and target.kind != "cpu" and work.kernels:
        host = launch_queue(work, target, resident_bytes).idle
        spent["launch"] += host
    bound = max(spent, key=spent.__getitem__)
    times = (seconds + host, low + host, high + host)
    return Cost(*times, moved, flops, eflops, energy, bound, weights, spent)


def kernel_seconds(
    kernel: Kernel, target: Target, resident_bytes: float = 0.0
) -> tuple[float, float, str]:
    """(busy, fixed, what bounds the busy part) of one kernel; its time is busy + fixed."""
    if isinstance(kernel, Collective):
        p = _price(kernel, target)
        return root4(p.compute, p.memory) + p.fixed, 0.0, "communication"
    if target.kind == "cpu":
        compute, memory, fixed, fork = cpu_time.kernel_parts(kernel, target, resident_bytes)
    else:
        p = _price(kernel, target, resident_bytes)
        compute, memory, fixed, fork = p.compute, p.memory, p.fixed, 0.0
    if refined := _refined(kernel, target):
        compute, memory = compute * refined.compute, memory * refined.memory
        fixed, fork = fixed * refined.dispatch, fork * refined.fork
    return root4(compute, memory), fixed + fork, "compute" if compute > memory else "memory"


def _price(kernel: Kernel, target: Target, resident_bytes: float = 0.0) -> gpu_time.Price:
    """Raises InvalidTarget for a collective without a link."""
    if isinstance(kernel, Collective) and target.link_bytes_per_s <= 0 and kernel.ranks > 1:
        raise InvalidTarget(
            f"target {target.name!r}: key 'link_gb_per_s': expected a positive number for"
            f" {kernel.name} over {kernel.ranks} ranks, found 0"
        )
    return gpu_time.price(kernel, target, resident_bytes)


def launch_queue(work: Work, target: Target, resident_bytes: float = 0.0) -> Queue:
    """The kernels of `work` launched one by one on a GPU."""
    parts = (kernel_seconds(kernel, target, resident_bytes) for kernel in work.kernels)
    return queue((busy + fixed for busy, fixed, _ in parts), target.eager_launch_s)


def kind_of(kernel: Kernel) -> str:
    """What shares its law and its unit, and so its error, with others of the kind."""
    if isinstance(kernel, Attention | Gemm):
        dtype = str(kernel.dtype).removeprefix("torch.")
        if isinstance(kernel, Attention):
            return f"{'prefill' if kernel.q > 1 else 'decode'} attention {dtype}"
        return f"{'gemm' if kernel.weight_bits is None else 'quantized gemm'} {dtype}"
    if isinstance(kernel, Stream):
        return f"{kernel.access} {kernel.chain}".rstrip()
    names = {BinaryAttention: "binary attention", Norm: "norm", Collective: "collective"}
    return names[type(kernel)]


def _refined(kernel: Kernel, target: Target) -> Refinement | None:
    """What was measured of the kernel's kind; of a chain that was not, of all chains together."""
    kind = kind_of(kernel)
    pooled = kernel.access if isinstance(kernel, Stream) else kind
    return target.refined.get(kind) or target.refined.get(pooled)


def interval(kernel: Kernel, target: Target, resident_bytes: float = 0.0) -> tuple[float, float]:
    """ln(low / seconds) and ln(high / seconds) of one kernel."""
    if target.kind != "cpu" or isinstance(kernel, Collective):
        return _price(kernel, target, resident_bytes).interval
    refined = _refined(kernel, target)
    error = (refined.error if refined else _CPU_ERROR) + target.spread
    return -math.log1p(error), math.log1p(error)


def measured_error(kernel: Kernel, target: Target, resident_bytes: float = 0.0) -> float:
    """Mean relative error of the kernel's kind, as far as it was measured: on a CPU, whose kinds
    nobody measured before `ridgeline calibrate`, its probe's spread alone."""
    if target.kind == "cpu":
        refined = _refined(kernel, target)
        return (refined.error if refined else 0.0) + target.spread
    below, above = interval(kernel, target, resident_bytes)
    return MEAN_OF_INTERVAL * (above - below)
