"""How megatron-core's checkpoint writers, which are forked from the rank, report to it: through a file in memory."""

from __future__ import annotations

import os
import pickle
import queue
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


class WriteResults:
    """In the place of the queue that megatron-core would make at the first save (`_get_write_results_queue`).

    That queue is held by a manager process, which imports torch before it can answer (some seconds, 270 MB per rank),
    is never ended, and outlives a rank that is killed. Forked writers need no more than an anonymous file that they
    inherit: what a writer has put is there when it has ended, and the file goes when its last process does.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        self._read = 0  # bytes of it

    def start(self) -> None:
        """Before a save: what an earlier one that failed has left is not this one's."""
        if self._file is None:
            self._file = os.memfd_create("checkpoint-write-results")
        os.ftruncate(self._file, 0)
        self._read = 0
        filesystem_async._results_queue = self

    def put(self, result: Any) -> None:
        """In the writer, a fork of the rank."""
        content = pickle.dumps(result)
        assert self._file is not None, "writers are forked after start()"
        with os.fdopen(os.dup(self._file), "ab") as file:
            file.write(len(content).to_bytes(8, "little") + content)

    def get_nowait(self) -> Any:
        """In the rank, when the writer has ended: the first result that was not read yet.

        Raises:
            queue.Empty: there is none; the writer was killed.
        """
        assert self._file is not None, "there is no save"
        size = int.from_bytes(os.pread(self._file, 8, self._read), "little")
        content = os.pread(self._file, size, self._read + 8)
        if not size or len(content) < size:
            raise queue.Empty
        self._read += 8 + size
        return pickle.loads(content)

    def close(self) -> None:
        if self._file is not None:
            filesystem_async._results_queue = None
            os.close(self._file)
            self._file = None
