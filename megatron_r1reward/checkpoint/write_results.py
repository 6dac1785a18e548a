"""The process through which megatron-core's checkpoint writers report, with an end."""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_r1reward.processes import die_with_parent


class WriteResults:
    """Starts what megatron-core would start at the first save (`_get_write_results_queue`) and never end.

    Its manager process holds 270 MB, stays for the life of the rank, and outlives a rank that is killed. This one ends
    with the rank, or with `close`.
    """

    def __init__(self) -> None:
        self._manager: SyncManager | None = None

    def start(self) -> None:
        """Before a save; does nothing when there is one already."""
        if filesystem_async._results_queue is None:
            self._manager = SyncManager(ctx=get_context("spawn"))
            self._manager.start(initializer=die_with_parent)
            filesystem_async._results_queue = self._manager.Queue()

    def close(self) -> None:
        if self._manager is not None:
            filesystem_async._results_queue = None
            self._manager.shutdown()
            self._manager = None
