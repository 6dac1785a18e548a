"""The servers of a life: a step that ends is noted, and started again when who asks it wants that (`ServerOrder`).

    step ends ---> end.json ---> recovery in the driver: quarantine, then an order ---> old step killed, new one started

A server that has not come up in the first place is not retried: what stops it is in the run file or on the node.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping

from megatron_r1reward.launch.exit_report import LifeEndedError
from megatron_r1reward.launch.steps import RunningStep, StepEnd
from megatron_r1reward.run_dir import RunDir, ServerEnd, ServerOrder

log = logging.getLogger(__name__)
_NOT_ANSWERING = StepEnd(code=1, what="ended by the supervisor: it did not answer any more")


class ServerLives:
    """Belongs to the supervisor's loop.

    Args:
        steps: the running steps of the life by name; a new start replaces its server's.
        start: starts a server's step again, given its name and the number of the start.
    """

    def __init__(
        self, run: RunDir, steps: Mapping[str, RunningStep], start: Callable[[str, int], None], *, grace_s: float
    ) -> None:
        self.in_service: set[str] = set()  # have been ready in this life
        self.down: dict[str, StepEnd] = {}  # steps that have ended and were not started again yet
        self._run = run
        self._steps = steps
        self._start = start
        self._grace_s = grace_s
        self._starts: dict[str, int] = {}
        self._last_end: dict[str, StepEnd] = {}
        self._done: dict[str, ServerOrder] = {}
        self._ending: dict[str, float] = {}  # deadline of steps that were asked to end for an order

    def note(self, name: str, end: StepEnd) -> None:
        """A server's step has ended; whoever waits for the server hears of it."""
        if name not in self._ending:
            log.warning("%s: %s", name, end.what)
        self.down[name] = self._last_end[name] = end
        ServerEnd(start=self._starts.get(name, 0), code=end.code, what=end.what).write(self._run.server_end(name))

    def obey(self) -> None:
        """Carry out what has been ordered.

        Raises:
            LifeEndedError: a server is given up.
        """
        # Listed, because NFS clients remember for a while that a file was missing.
        there = {entry.name for entry in os.scandir(self._run.live)}
        for name in self.in_service:
            path = self._run.server_order(name)
            order = ServerOrder.read(path) if path.name in there else None
            if order is None or order == self._done.get(name):
                continue
            if order.what == "give_up":
                end = self._last_end.get(name, _NOT_ANSWERING)
                raise LifeEndedError("failed", end.code or 1, f"{name} {order.reason.splitlines()[0]}", name)
            if self._is_gone(name, order):
                self._done[name] = order
                if order.what == "start":
                    self._restart(name, order)

    def _is_gone(self, name: str, order: ServerOrder) -> bool:
        """Whether nothing of the server is left; until then it is being ended."""
        step = self._steps[name]
        if name not in self._ending and step.running:
            log.warning("ending %s: %s", name, order.reason)
            step.signal(signal.SIGCONT)  # what is stopped hears nothing else
            step.signal(signal.SIGTERM)
            self._ending[name] = time.time() + self._grace_s
        if step.running and time.time() < self._ending[name]:
            return False
        step.kill()
        if name not in self.down:
            self.note(name, _NOT_ANSWERING)
        self._ending.pop(name, None)
        return True

    def _restart(self, name: str, order: ServerOrder) -> None:
        log.warning("starting %s again (%d): %s", name, order.start, order.reason.partition("\n")[0])
        self._starts[name] = order.start
        del self.down[name]
        self._run.step_id(name).unlink(missing_ok=True)
        self._start(name, order.start)
