"""Work on real ranks: processes with a gloo group, started from one that has torch loaded."""

import json
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT = 60.0
"""Seconds that a rank waits for another, where the test is not about that."""

PRELOADED = [
    *("torch.distributed", "torch.export._trace", "torch._dynamo.eval_frame", "networkx"),
    *("torch.distributed.tensor.parallel", "ridgeline.tools.plugin"),
    *("torch._export.non_strict_utils", "torch._functorch.aot_autograd", "torch._inductor"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gemma", "gemma2", "gpt2")),
    *("transformers.models.llama.modeling_llama", "ridgeline.passes.parallel"),
]
"""What takes seconds to import, once in the process that the ranks are forked from."""


def on_ranks(
    world: int, work: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
) -> list[Any]:
    """What `work(*args)` returns on each of `world` ranks, as json would.

    work: a function of a module that is found by name. An exception is given as a dictionary of
    error, message and trace; None where a rank ends without a word.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            given = (theirs, rank, world, store, timeout, work, args)
            process = context.Process(target=_rank, args=given, daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours))
        results = [_received(ours) for _, ours in ranks]
        for process, _ in ranks:
            process.join(timeout)
            if process.is_alive():
                process.kill()
                raise AssertionError("a rank does not end")
        return results


def _received(connection: Connection) -> Any:
    try:
        return json.loads(connection.recv_bytes())
    except EOFError:
        return None


def _rank(
    result: Connection,
    rank: int,
    world: int,
    store: str,
    timeout: float,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # torch's memory of fake results costs a quarter of a tiny model's time, which never asks twice
    torch._dynamo.config.fake_tensor_cache_enabled = False
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    try:
        answer = work(*args)
    except Exception as error:
        last = traceback.format_exc().strip()
        answer = {"error": type(error).__name__, "message": str(error), "trace": last}
    result.send_bytes(json.dumps(answer).encode())
    result.close()
    dist.destroy_process_group()
