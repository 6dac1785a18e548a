"""Keeps a group of servers in service: health checks, quarantine, probes, restarts.

The one mechanism for all servers that are ours, whoever holds their processes (`member.Server`): children of this
process (`process.VllmServer`), or components of a life, which its supervisor starts and ends (`component`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import httpx

from megatron_r1reward.config.server_sections import VllmSection
from megatron_r1reward.network.server_api import HEALTH, ServerCallError, call_async, open_async_client
from megatron_r1reward.servers.member import Member, ServerError
from megatron_r1reward.servers.process import first_request

log = logging.getLogger(__name__)

Admit = Callable[[Member], Awaitable[None]]  # last step before service, e.g. current weights; raises AdmissionError
_PROBE_PAUSE_S = 0.5
_PROBE_PAUSE_MAX_S = 10.0
_HOLD_POLL_S = 0.02
_ENDED = "its process has ended"
_WELL_CHECKS = 10  # passed health checks in a row, without a failed request, after which restarts are forgiven


class AdmissionError(RuntimeError):
    """The server works, but cannot be given what it needs before it may serve."""


class Supervisor:
    """Watches the members of one group. All methods run on the group's event loop.

    A server leaves service ("quarantined") after `request_failures` failed requests in a row, after `health_failures`
    missed health checks in a row, or at once when its process ends. It comes back when it completes a one-token
    request and `admit` has succeeded. If the probe fails and the server is ours, it is killed and started again, at
    most `max_restarts` times without serving a request, or being well for a while, in between; after that it is
    retired, which for a job step ends the life. A server that is not ours is retired when it has not come back within
    `startup_timeout_s`.

    Args:
        changed: called after every change of state.
        scalar: they serve a scalar reward model.
    """

    def __init__(
        self,
        members: Sequence[Member],
        section: VllmSection,
        *,
        served_name: str | None,
        admit: Admit,
        changed: Callable[[], None],
        scalar: bool = False,
    ) -> None:
        self._members = tuple(members)
        self._section = section
        self._served_name, self._scalar = served_name, scalar
        self._admit = admit
        self._changed = changed
        self._recoveries: dict[Member, asyncio.Task[None]] = {}
        self._http: dict[Member, httpx.AsyncClient] = {}
        self._recovering: set[Member] = set()  # at work on them now, not waiting for leave or for the next try
        self._may_recover = asyncio.Event()
        self._may_recover.set()

    async def watch(self) -> None:
        """Check all members for ever."""
        while True:
            await asyncio.gather(*(self._check(member) for member in self._members if member.state == "ready"))
            await asyncio.sleep(self._section.health_interval_s)

    def succeeded(self, member: Member) -> None:
        """A request was answered."""
        member.requests += 1
        member.failures_in_a_row = member.restarts_in_a_row = 0

    def failed(self, member: Member, error: str) -> None:
        """A request was not answered. May quarantine the member."""
        member.failures += 1
        member.failures_in_a_row += 1
        member.last_error = error
        if member.state != "ready":
            return
        if member.server is not None and not member.server.alive:
            self.quarantine(member, f"its process has ended; {error}", hung=True)
        elif member.failures_in_a_row >= self._section.request_failures:
            self.quarantine(member, error)

    def quarantine(self, member: Member, reason: str, *, hung: bool = False) -> None:
        """Take a member out of service and start getting it back.

        Args:
            hung: it answers nothing, so requests in flight there are withdrawn and asked elsewhere.
        """
        if member.state in ("retired", "quarantined", "restarting"):
            return
        log.warning("server %s (%s) is quarantined: %s", member.name, member.url, reason)
        member.state, member.last_error = "quarantined", reason
        if hung:
            member.withdraw()
        self._changed()
        self.recover(member)

    def recover(self, member: Member) -> None:
        """Begin to bring a member (back) into service, unless that is under way."""
        if member not in self._recoveries:
            task = asyncio.get_running_loop().create_task(self._recover(member))
            self._recoveries[member] = task
            task.add_done_callback(lambda _: self._recoveries.pop(member, None))

    async def put_to_sleep(self, level: int) -> None:
        """Free the memory of all servers (vLLM's sleep mode); from now on none is recovered, which would take it back.

        Recoveries under way are waited for. A server that does not fall asleep is killed, if it is ours.

        Raises:
            ServerError: one that is not ours answers, but refuses.
        """
        self._may_recover.clear()
        while self._recovering:
            await asyncio.sleep(_HOLD_POLL_S)
        await asyncio.gather(*(self._put_to_sleep(member, level) for member in self._members))

    async def allow_recoveries(self) -> None:
        """The opposite of what `put_to_sleep` forbids."""
        self._may_recover.set()

    async def _put_to_sleep(self, member: Member, level: int) -> None:
        path = f"/sleep?level={level}&mode=abort"
        problem = await self._problem(member, "POST", path, None, self._section.probe_timeout_s)
        if problem is None:
            return
        self.quarantine(member, f"did not fall asleep: {problem}", hung=True)
        if member.server is not None:
            await asyncio.to_thread(member.server.stop, grace_s=0.0)
        elif " answered " in problem:
            raise ServerError(
                f"{member.url} keeps its memory: {problem} (cluster.layout 'colocated' needs servers "
                "with sleep mode, --enable-sleep-mode)"
            )

    async def aclose(self) -> None:
        for http in self._http.values():
            await http.aclose()

    async def _check(self, member: Member) -> None:
        incarnation = member.incarnation
        if member.server is not None and not member.server.alive:
            self.quarantine(member, _ENDED, hung=True)
            return
        problem = await self._problem(member, "GET", HEALTH, None, self._section.health_timeout_s)
        if member.state != "ready" or member.incarnation != incarnation:
            return
        if problem is None:
            member.missed_health_checks = 0
            member.passed_health_checks = 0 if member.failures_in_a_row else member.passed_health_checks + 1
            if member.passed_health_checks >= _WELL_CHECKS:
                member.restarts_in_a_row = 0
            return
        member.failures += 1
        member.missed_health_checks += 1
        if member.missed_health_checks >= self._section.health_failures:
            self.quarantine(
                member, f"{member.missed_health_checks} health checks failed, the last: {problem}", hung=True
            )

    async def _recover(self, member: Member) -> None:
        pause_s = _PROBE_PAUSE_S
        began = time.monotonic()
        while member.state != "retired":
            if not self._may_recover.is_set():
                await self._may_recover.wait()
                began = time.monotonic()
            self._recovering.add(member)
            try:
                problem = await self._readmit(member)
                if problem is None:
                    return
                if problem != _ENDED or not member.restarts_in_a_row:  # a restart that failed said more
                    member.last_error = problem
                if member.server is not None and not member.waits_for_weights:
                    await self._restart(member)
                    continue
            finally:
                self._recovering.discard(member)
            if member.waits_for_weights:
                began = time.monotonic()
            elif time.monotonic() - began > self._section.startup_timeout_s:
                await self._retire(member)
                continue
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PROBE_PAUSE_MAX_S)

    async def _readmit(self, member: Member) -> str | None:
        """Probe and admit; None when the member is in service, else what stands in the way."""
        if member.server is not None and not member.server.alive:
            return _ENDED
        problem = await self._problem(member, "GET", HEALTH, None, self._section.health_timeout_s)
        if problem is not None:
            return problem
        try:
            await self._admit(member)
        except AdmissionError as error:
            return str(error)
        # Only now: a server that is paused after a broken push completes nothing.
        path, body = first_request(self._served_name, scalar=self._scalar)
        problem = await self._problem(member, "POST", path, body, self._section.probe_timeout_s)
        if problem is not None:
            return problem
        try:
            await self._admit(member)  # costs nothing, unless there was a push in between
        except AdmissionError as error:
            return str(error)
        member.failures_in_a_row = member.missed_health_checks = member.passed_health_checks = 0
        member.state = "ready"
        log.info("server %s (%s) is in service", member.name, member.url)
        self._changed()
        return None

    async def _restart(self, member: Member) -> None:
        assert member.server is not None
        if member.restarts_in_a_row >= self._section.max_restarts:
            await self._retire(member)
            return
        member.state = "restarting"
        member.restarts += 1
        member.restarts_in_a_row += 1
        member.incarnation += 1
        member.weight_version = None
        member.must_be_pushed = False
        log.warning("server %s is restarted (%d): %s", member.name, member.restarts, member.last_error.split("\n")[0])
        member.withdraw()
        self._changed()
        try:
            await asyncio.to_thread(member.server.restart, member.last_error)
            await asyncio.to_thread(member.server.wait_ready)
        except ServerError as error:
            member.last_error = str(error)
        member.state = "quarantined"
        self._changed()

    async def _retire(self, member: Member) -> None:
        member.state = "retired"
        member.withdraw()
        log.error("server %s is given up after %d restarts: %s", member.name, member.restarts, member.last_error)
        self._changed()
        if member.server is not None:
            await asyncio.to_thread(
                member.server.give_up, f"given up after {member.restarts} restarts: {member.last_error}"
            )

    async def _problem(self, member: Member, method: str, path: str, body: object, timeout_s: float) -> str | None:
        """None when the member answers 2xx in time, else what it did instead."""
        client = self._http.get(member)
        if client is None:
            client = self._http[member] = open_async_client()
        try:
            await call_async(
                client, method, member.url + path, token=member.bearer_token, body=body, timeout_s=timeout_s
            )
        except ServerCallError as error:
            return str(error)
        return None
