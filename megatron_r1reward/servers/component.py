"""A server that is a job step of this life, as the process that sends it work sees it.

    this process (recovery)  --- order.json: start n, stop n, give up --->  supervisor  --- starts, ends ---> step
                             <-- address.json of start n, end.json of start n ---

The supervisor has the hands (job steps, local or Slurm's), the group of servers has the eyes (health, failed requests,
weights that are missing): it decides what is sick, how often it is tried again, and when it is given up.
"""

from __future__ import annotations

import time

from megatron_r1reward.config.server_sections import VllmSection
from megatron_r1reward.run_dir import Address, RunDir, ServerEnd, ServerOrder, exists_on_shared
from megatron_r1reward.servers.member import Report, ServerError

_POLL_INTERVAL_S = 0.2
_STOP_TIMEOUT_S = 120.0  # Slurm takes its time


class ComponentServer:
    """The same methods as `VllmServer`, by way of the run directory.

    Raises:
        ValueError: no address of it has been published.
    """

    def __init__(self, run: RunDir, name: str, section: VllmSection, *, token: str | None) -> None:
        address = Address.read(run.address(name))
        if address is None:
            raise ValueError(f"{run.address(name)} does not exist: the supervisor starts {name} and waits for it")
        self.name = name
        self.token = token
        self._run = run
        self._section = section
        self._url = address.url
        self._start = address.start
        self._closed = False

    @property
    def url(self) -> str:
        """Known for sure only when `wait_ready` has returned."""
        return self._url

    @property
    def alive(self) -> bool:
        return self._end() is None

    def restart(self, reason: str = "") -> None:
        """Have what is left of it ended, even if it hangs, and a new one started; returns at once."""
        self._start += 1
        self._order("start", reason)

    def wait_ready(self, progress: Report | None = None) -> None:
        """Until the new server has published its address.

        Raises:
            ServerError: it ended, or took longer than a supervisor would wait for it.
        """
        limit_s = self._section.startup_timeout_s + _STOP_TIMEOUT_S
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and not self._closed:
            address = Address.read(self._run.address(self.name))
            if address is not None and address.start >= self._start:
                self._url = address.url
                if progress is not None:
                    progress(f"{self.name} at {self._url} is ready")
                return
            if (end := self._end()) is not None:
                raise ServerError(f"{self.name}: {end.what}")
            time.sleep(_POLL_INTERVAL_S)
        raise ServerError(f"{self.name} was not ready after {limit_s:g} s")

    def stop(self, *, grace_s: float = 0.0) -> None:
        """Have it ended; returns when it is gone. Its memory is free then."""
        self._order("stop", "asked to end")
        deadline = time.monotonic() + max(grace_s, _STOP_TIMEOUT_S)
        while self.alive and time.monotonic() < deadline and not self._closed:
            time.sleep(_POLL_INTERVAL_S)

    def give_up(self, reason: str) -> None:
        """The supervisor ends the life with this reason."""
        self._order("give_up", reason)

    def close(self) -> None:
        """Wait for it no longer. The supervisor, which started it, ends it."""
        self._closed = True

    def _order(self, what: str, reason: str) -> None:
        order = ServerOrder(start=self._start, what=what, reason=reason)  # type: ignore[arg-type]
        order.write(self._run.server_order(self.name))

    def _end(self) -> ServerEnd | None:
        path = self._run.server_end(self.name)
        end = ServerEnd.read(path) if exists_on_shared(path) else None
        return end if end is not None and end.start >= self._start else None
