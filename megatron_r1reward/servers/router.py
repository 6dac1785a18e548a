"""Which server gets a request: the least busy one, the one that knows the prompt if it is not busier; with queueing."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Final

from megatron_r1reward.servers.member import Member

_AFFINITY_SLACK: Final = 4  # a cached prefix is worth this many more requests in the server's queue
_REMEMBERED_KEYS: Final = 65_536


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
