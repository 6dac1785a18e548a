"""A supervised group of servers, with an event loop of its own; rollout pool and judge alike. Which of them gets a
request: the least busy one, the one that knows the prompt if it is not busier; with queueing."""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from megatron_r1reward.config.server_sections import VllmSection
from megatron_r1reward.network.event_loop import EventLoopThread
from megatron_r1reward.network.tokens import token_from
from megatron_r1reward.servers.member import Member, Server, ServerError, ServerStatus, write_status
from megatron_r1reward.servers.recovery import Admit, Supervisor

_AFFINITY_SLACK: Final = 4  # a cached prefix is worth this many more requests in the server's queue
_REMEMBERED_KEYS: Final = 65_536
_REFUSED = re.compile(r" answered 40[13]\b")


class NoServerError(RuntimeError):
    """Every server has been given up."""


class Router:
    """Least-outstanding routing with prefix affinity and back-pressure.

    At most `capacity` requests are in flight per server; who comes when all are full, or when no server is in
    service, waits in line. Belongs to one event loop.
    """

    def __init__(self, members: Sequence[Member], *, capacity: int) -> None:
        self._members = tuple(members)
        self._capacity = capacity
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._home: OrderedDict[str, Member] = OrderedDict()  # who served a prefix last

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def acquire(self, key: str, avoid: frozenset[Member] = frozenset()) -> Member:
        """A server with room for one more request, counted as outstanding until `release`.

        Args:
            key: requests with equal keys share a prompt, whose prefix and image features a server has cached.
            avoid: servers that failed this request; taken only when nobody else is in service.

        Raises:
            NoServerError: all servers are retired.
        """
        while (member := self._pick(key, avoid)) is None:
            if all(member.state == "retired" for member in self._members):
                reasons = "; ".join(f"{member.name}: {member.last_error}" for member in self._members)
                raise NoServerError(f"all {len(self._members)} servers have been given up: {reasons}")
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self.wake(1)  # this turn was given to somebody who left
                raise
            finally:
                if turn in self._waiting:
                    self._waiting.remove(turn)
        member.outstanding += 1
        self._home[key] = member
        self._home.move_to_end(key)
        if len(self._home) > _REMEMBERED_KEYS:
            self._home.popitem(last=False)
        return member

    def release(self, member: Member) -> None:
        member.outstanding -= 1
        assert member.outstanding >= 0
        self.wake(1)

    def wake(self, count: int | None = None) -> None:
        """Let waiters look again: `count` of them, or all (a server came into service or left for good)."""
        count = len(self._waiting) if count is None else count
        while count > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                count -= 1

    def _pick(self, key: str, avoid: frozenset[Member]) -> Member | None:
        serving = [member for member in self._members if member.state == "ready"]
        usable = [member for member in serving if member not in avoid] or serving
        free = [member for member in usable if member.outstanding < self._capacity]
        if not free:
            return None
        least = min(free, key=lambda member: member.outstanding)
        home = self._home.get(key)
        if home in free and home.outstanding <= least.outstanding + _AFFINITY_SLACK:
            return home
        return least


async def _admit_everybody(member: Member) -> None:
    """For servers whose weights never change."""


class ServerGroup:
    """Servers under supervision. Methods without `async` may be called from any thread.

    Args:
        servers: ours, in the order of their numbers, already started and ready; started again when sick, closed with
            the group. Empty: those at `section.urls`.
        admit: what a server needs before it (again) gets work.
        status_file: the state of each server (JSON) for `r1reward servers`, written at every change and health check.
        scalar: they serve a scalar reward model.
    """

    def __init__(
        self,
        section: VllmSection,
        *,
        name: str,
        urls: Sequence[str] = (),
        servers: Sequence[Server] = (),
        served_name: str | None,
        admit: Admit = _admit_everybody,
        status_file: Path | None = None,
        scalar: bool = False,
    ) -> None:
        token = token_from(section.token_variable)
        self._token_variable = section.token_variable
        self.members = tuple(
            Member(name=f"{name}-{index}", server=server, state="ready") for index, server in enumerate(servers)
        ) or tuple(
            Member(name=f"{name}-{index}", fixed_url=url.rstrip("/"), token=token, state="ready")
            for index, url in enumerate(urls)
        )
        self.router = Router(self.members, capacity=section.max_concurrency)
        self.supervisor = Supervisor(
            self.members, section, served_name=served_name, admit=admit, changed=self._state_changed, scalar=scalar
        )
        self.loop = EventLoopThread(f"{name}-servers")
        self._status_file = status_file
        self._probe_timeout_s = section.startup_timeout_s
        self._watching = self.loop.submit(self.supervisor.watch())
        if status_file is not None:
            self._publishing = self.loop.submit(self._publish(status_file, section.health_interval_s))
        self._closed = False

    def status(self) -> list[ServerStatus]:
        """The state of each server, in the order of their numbers."""
        return [member.status() for member in self.members]

    def endpoints(self) -> list[tuple[str, str | None]]:
        """(url, token) of the servers in service; of all, when none is."""
        serving = [member for member in self.members if member.state == "ready"] or self.members
        return [(member.url, member.bearer_token) for member in serving]

    def wait_until_ready(self) -> None:
        """Probe every server that is not ours with a real completion.

        Raises:
            ServerError: one refuses the token, or did not complete it within `startup_timeout_s`.
        """
        self.loop.run(self._wait_until_ready())

    def close(self) -> None:
        """End supervision, then the servers that are ours. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self.loop.cancel_all()
        self.loop.run(self.supervisor.aclose())
        for member in self.members:  # before the loop, which waits for restarts under way
            if member.server is not None:
                member.server.close()
        self.loop.close()

    async def _wait_until_ready(self) -> None:
        for member in self.members:
            if member.server is None:
                member.state = "starting"
                self.supervisor.recover(member)
        try:
            async with asyncio.timeout(self._probe_timeout_s):
                while late := [member for member in self.members if member.state == "starting"]:
                    self._check_token(late)
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            reasons = "; ".join(f"{member.url}: {member.last_error}" for member in late)
            raise ServerError(f"not ready after {self._probe_timeout_s:g} s: {reasons}") from error

    def _check_token(self, members: Sequence[Member]) -> None:
        """A refused token does not become right by waiting."""
        for member in members:
            if _REFUSED.search(member.last_error):
                raise ServerError(
                    f"{member.url} refuses the bearer token: set {self._token_variable} to the one that it was started "
                    f"with ({member.last_error})"
                )

    async def _publish(self, path: Path, interval_s: float) -> None:
        """Load and counts change without a change of state."""
        while True:
            write_status(path, self.status())
            await asyncio.sleep(interval_s)

    def _state_changed(self) -> None:
        self.router.wake()
        if self._status_file is not None:
            write_status(self._status_file, self.status())
