"""Kernels launched one by one: who waits for whom, the host or the device.

The host calls kernel i at i h and has issued it at (i + 1) h; the device runs them in order:

    start_i = max((i + 1) h, end_{i-1})        end_i = start_i + t_i
    TKLQT   = sum_i (start_i - i h)            from launch call to start, summed over kernels
    latency = end of the last kernel           idle = latency - sum_i t_i

h is the target's `eager_launch_s`, t_i a kernel's time inside a graph. While the batch grows and
TKLQT stays n h, nothing queues and the host is what bounds; once it rises, the device does. Source:
the total kernel launch and queuing time of "Characterizing and Optimizing LLM Inference Workloads
on CPU-GPU Coupled Architectures" (arXiv 2504.11750).
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Queue:
    """All in seconds. host: calls together; device: kernels together."""

    latency: float
    tklqt: float
    idle: float
    host: float
    device: float

    @property
    def host_bound(self) -> bool:
        """Does the device wait for the host, over all?"""
        return self.host > self.device


def queue(kernel_seconds: Iterable[float], host_seconds: float) -> Queue:
    """Run kernels of these times through an empty queue; host_seconds: of one launch call."""
    end = waited = device = 0.0
    count = 0
    for seconds in kernel_seconds:
        start = max((count + 1) * host_seconds, end)
        waited += start - count * host_seconds
        end = start + seconds
        device += seconds
        count += 1
    return Queue(end, waited, end - device, count * host_seconds, device)
