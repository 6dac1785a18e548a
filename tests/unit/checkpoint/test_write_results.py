"""The process behind the checkpoint writers ends when it should."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection

import psutil
from megatron.core.dist_checkpointing.strategies import filesystem_async
from waiting import wait_until

from megatron_r1reward.checkpoint.write_results import WriteResults


def start_and_wait(pipe: Connection) -> None:
    results = WriteResults()
    results.start()
    assert results._manager is not None
    pipe.send(results._manager._process.pid)  # type: ignore[attr-defined]
    time.sleep(60)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_it_ends_with_a_rank_that_is_killed() -> None:
    here, there = get_context("fork").Pipe()
    rank = get_context("fork").Process(target=start_and_wait, args=(there,))
    rank.start()
    assert rank.pid is not None
    pid = here.recv()
    assert not gone(pid)
    os.kill(rank.pid, signal.SIGKILL)
    rank.join()
    wait_until(lambda: gone(pid))


def test_close_ends_it_and_the_next_save_starts_another() -> None:
    pids = []
    for _ in range(2):
        results = WriteResults()
        results.start()
        results.start()
        assert results._manager is not None
        pids.append(results._manager._process.pid)  # type: ignore[attr-defined]
        filesystem_async._get_write_results_queue().put("result")
        assert filesystem_async._get_write_results_queue().get() == "result"
        results.close()
        results.close()
        assert gone(pids[-1])
    assert len(set(pids)) == 2
