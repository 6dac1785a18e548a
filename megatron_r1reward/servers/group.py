"""A supervised group of servers, with an event loop of its own; rollout pool and judge alike."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_r1reward.config.server_sections import VllmSection
from megatron_r1reward.network.event_loop import EventLoopThread
from megatron_r1reward.network.tokens import token_from
from megatron_r1reward.servers.member import Member, Server, ServerError, ServerStatus
from megatron_r1reward.servers.recovery import Admit, Supervisor
from megatron_r1reward.servers.router import Router
from megatron_r1reward.servers.server_status import write_status

_REFUSED = re.compile(r" answered 40[13]\b")


async def _admit_everybody(member: Member) -> None:
    """For servers whose weights never change."""


class ServerGroup:
    """Servers under supervision. Methods without `async` may be called from any thread.

    Args:
        servers: ours, in the order of their numbers, already started and ready; started again when sick, closed with
            the group. Empty: those at `section.urls`.
        admit: what a server needs before it (again) gets work.
        status_file: the state of each server (JSON) for `r1reward servers`, written at every change and health check.
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
            self.members, section, served_name=served_name, admit=admit, changed=self._state_changed
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
