"""Run a function on several gloo ranks, forked from this process so that nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from megatron_r1reward.parallel import setup


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _entry(function: Callable[..., Any], rank: int, size: int, port: int, args: tuple[Any, ...], queue: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        queue.put((rank, "ok", function(*args)))
        setup.shutdown()
    except BaseException:
        queue.put((rank, "error", traceback.format_exc()))
    queue.close()
    queue.join_thread()  # the feeder thread has to finish before the process ends
    os._exit(0)


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """The results of `function(*args)` on `size` ranks, in rank order; the first error fails the test."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    port = _free_port()
    processes = [context.Process(target=_entry, args=(function, rank, size, port, args, queue)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        results = [queue.get(timeout=timeout_s) for _ in processes]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
    errors = [f"rank {rank}:\n{value}" for rank, status, value in results if status == "error"]
    assert not errors, "\n".join(errors)
    return [value for _, _, value in sorted(results, key=lambda item: item[0])]
