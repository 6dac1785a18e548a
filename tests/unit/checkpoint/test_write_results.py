"""What checkpoint writers report arrives in the rank, and nothing of it stays."""

from __future__ import annotations

import os
import queue
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context

import psutil
import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_r1reward.checkpoint.saver import WriteResults


@pytest.fixture
def results() -> Iterator[WriteResults]:
    results = WriteResults()
    results.start()
    yield results
    results.close()


def in_writer(work: Callable[[], object]) -> None:
    writer = get_context("fork").Process(target=work)
    writer.start()
    writer.join()


def test_what_forked_writers_put_arrives_in_order(results: WriteResults) -> None:
    large = {0: list(range(1_000_000))}  # more than a pipe holds: nobody reads before the writer has ended
    in_writer(lambda: filesystem_async._get_write_results_queue().put(large))
    in_writer(lambda: filesystem_async._get_write_results_queue().put(OSError(28, "no space left")))
    queue_ = filesystem_async._get_write_results_queue()
    assert queue_.get_nowait() == large
    error = queue_.get_nowait()
    assert (type(error), error.errno) == (OSError, 28)
    with pytest.raises(queue.Empty):
        queue_.get_nowait()


def test_a_writer_that_is_killed_has_reported_nothing(results: WriteResults) -> None:
    in_writer(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_what_a_failed_save_left_is_not_the_next_ones(results: WriteResults) -> None:
    in_writer(lambda: results.put("of the save that failed"))
    results.start()
    in_writer(lambda: results.put("of this one"))
    assert results.get_nowait() == "of this one"


def open_files() -> Counter[str]:
    """Open descriptors by what they are: pipes and sockets have numbers of their own."""
    opened: Counter[str] = Counter()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            opened[os.readlink(f"/proc/self/fd/{descriptor}")] += 1
    return opened


def test_no_process_and_no_open_file_is_left() -> None:
    opened, running = open_files(), set(psutil.Process().children())
    for _ in range(2):
        results = WriteResults()
        results.start()
        in_writer(lambda results=results: results.put("result"))  # type: ignore[misc]
        assert results.get_nowait() == "result"
        assert set(psutil.Process().children()) <= running
        results.close()
        results.close()
        assert not open_files() - opened, "more than before; what earlier tests had open may go meanwhile"
    assert filesystem_async._results_queue is None
