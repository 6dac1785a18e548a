"""Run a function on several ranks, forked from this process so that nothing is imported again.

With a GPU they are spawned: CUDA does not survive a fork, and asking whether there is a GPU already initialises it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any

import torch

from megatron_r1reward.parallel import setup
from megatron_r1reward.weight_sync import broadcast_group

_HOST = "127.0.0.1"
_STUCK_S = 900.0  # beyond the time limit of every collective: what stands then will not go on


def _entry(function: Callable[..., Any], rank: int, size: int, port: int, args: tuple[Any, ...], queue: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    # As under torchrun: the store that they meet at is there already, and no rank has to find its port free.
    os.environ.update(MASTER_ADDR=_HOST, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(_STUCK_S, file=sys.__stderr__)
    try:
        queue.put((rank, "ok", function(*args)))
        setup.shutdown()
    except BaseException:
        queue.put((rank, "error", traceback.format_exc()))
    queue.close()
    queue.join_thread()  # the feeder thread has to finish before the process ends
    os._exit(0)


def _results(queue: Any, processes: Sequence[Any], timeout_s: float) -> list[Any]:
    """One (rank, status, value) per process, in the order of their ends."""
    results: list[Any] = []
    waits = 0  # of a second each: the clock goes on while a machine is suspended
    while len(results) < len(processes):
        try:
            results.append(queue.get(timeout=1.0))
        except Empty:
            crashed = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
            assert not crashed, f"exit codes of ranks that crashed: {crashed}"
            waits += 1
            assert waits < timeout_s, f"no result within {timeout_s:g} s"
    return results


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 1000.0) -> list[Any]:
    """The results of `function(*args)` on `size` ranks, in rank order; the first error fails the test.

    `timeout_s` is a bound on a hang; a rank says before where it stands. With a GPU, `function` and `args` must
    be picklable.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    queue = context.Queue()
    # Ranks queue up at a socket that listens. The store that answers there has a thread, and one that runs at a fork
    # may hold a lock, which nobody in the new process would ever release.
    listener = socket.create_server((_HOST, 0), backlog=max(size, 16))
    port = listener.getsockname()[1]
    processes = [context.Process(target=_entry, args=(function, rank, size, port, args, queue)) for rank in range(size)]
    store = None
    try:
        for process in processes:
            process.start()
        store = broadcast_group.store_of(listener, timeout_s)
        results = _results(queue, processes, timeout_s)
    finally:
        for process in processes:
            if process.pid is not None:
                process.join(5)
            if process.is_alive():
                process.kill()
        # A failure keeps this frame alive. A later fork that collected the store would wait for its thread, which only
        # this process has.
        del store
        listener.close()
    errors = [f"rank {rank}:\n{value}" for rank, status, value in results if status == "error"]
    assert not errors, "\n".join(errors)
    return [value for _, _, value in sorted(results, key=lambda item: item[0])]
