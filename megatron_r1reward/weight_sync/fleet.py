"""The weights of a pool's servers: pushed to all, pushed again to who missed a push, and never mixed."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable, Sequence

import torch

from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.servers.group import ServerGroup
from megatron_r1reward.servers.member import Member
from megatron_r1reward.servers.recovery import AdmissionError
from megatron_r1reward.types import Rollout, TensorMeta
from megatron_r1reward.weight_sync import WeightPushError
from megatron_r1reward.weight_sync.admin_api import ControlPlane, Target
from megatron_r1reward.weight_sync.buckets import Recording, WeightSnapshot, WeightUpdate
from megatron_r1reward.weight_sync.protocol import Failures, Transport, WeightPush

log = logging.getLogger(__name__)


class CurrentVersions:
    """The weight versions that were current in the pool since this object was made."""

    def __init__(self, pushed: list[int]) -> None:
        self._pushed = pushed
        self._first = len(pushed) - 1

    def wrong(self, rollouts: Sequence[Rollout]) -> int | None:
        """A version under which a token was sampled without being current; None when all is well.

        That happens when a server that is not ours was restarted behind our back, or when a server came back into
        service during a push that it took no part in.
        """
        if self._first < 0:  # nothing had been pushed: whatever it started with
            return None
        current = set(self._pushed[self._first :])
        versions = (span.version for rollout in rollouts for span in rollout.weight_spans)
        return next((version for version in versions if version not in current), None)


class PoolPusher:
    """Brings weights to the servers of one group. `push` is called by the trainer, `admit` by the group's supervisor.

    A server that fails during a push is tried once more if it is alive; otherwise it stays paused, leaves service, and
    comes back (restarted if it is ours) with the weights of the snapshot.
    """

    def __init__(
        self, transport: Transport, section: ServerSection, group: ServerGroup, *, wakes: bool = False
    ) -> None:
        self.broken: str | None = None  # why the servers hold unknown weights and are paused
        self._section = section
        self._group = group
        self._push = WeightPush(
            transport,
            timeout_s=section.push_timeout_s,
            control_timeout_s=section.health_timeout_s * 3,
            wakes=wakes,
        )
        keeps = section.keep_snapshot or transport.needs_memory_file
        self._snapshot = WeightSnapshot() if keeps else None
        self._device = transport.device
        self._lock = threading.Lock()  # one push at a time
        self._pushed: dict[Member, list[int]] = {member: [] for member in group.members}
        self._current: list[int] = []  # versions in the order in which they became current
        self._version: int | None = None  # of the last push

    def current(self) -> CurrentVersions:
        """What answers to requests that are sent now may have been sampled under."""
        return CurrentVersions(self._current)

    def push(self, metas: Sequence[TensorMeta], tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Send all tensors and make `version` current on every server that is in service.

        Args:
            metas: every tensor that will come, in the order in which it will come.
            tensors: (name, tensor) in that order; consumed to the end whatever the servers do, and bucket by bucket,
                so it may be a generator that gathers each tensor when asked. Names and shapes are the checkpoint's.
                The tensors of one fused layer (q, k and v; gate and up) must all be there; whole modules may be left
                out and then keep their weights.
            version: reported by the servers in every response from now on.

        Raises:
            WeightPushError: the tensors are not what was announced, or no living server could take them. The servers
                stay paused until a push succeeds.
        """
        with self._lock:
            members = self._group.loop.run(self._participants())
            self.broken = "interrupted"
            failures = self._first_pass(members, metas, tensors, version)
            self._version = version
            failures = self._second_pass(failures, version)
            dead = self._push_dead(failures)
            if failures and len(failures) == len(members) and len(dead) < len(members):
                self.broken = next(iter(failures.values()))
                if self._snapshot is not None:
                    self._snapshot.forget()  # nobody may come back with it
                raise WeightPushError(
                    f"pushing weight version {version} failed, the servers stay paused: {self.broken}"
                )
            self.broken = None
            for target, reason in failures.items():
                log.warning("server %s did not get weight version %d: %s", target.name, version, reason)
            self._group.loop.run(self._settle(members, failures))

    async def admit(self, member: Member) -> None:
        """Give a server that is to come (back) into service the current weights.

        Raises:
            AdmissionError: there is no snapshot of them, or the push failed.
        """
        await asyncio.to_thread(self._admit, member)

    def close(self) -> None:
        self._push.close()
        if self._snapshot is not None:
            self._snapshot.close()

    def _first_pass(
        self,
        members: Sequence[Member],
        metas: Sequence[TensorMeta],
        tensors: Iterable[tuple[str, torch.Tensor]],
        version: int,
    ) -> Failures:
        """Push while the tensors are being recorded."""
        targets = {_target(member): member for member in members}
        bucket_bytes = self._section.weight_bucket_bytes
        if self._snapshot is not None:
            recording = self._snapshot.record(
                metas, tensors, version=version, bucket_bytes=bucket_bytes, device=self._device
            )
        else:
            update = WeightUpdate.of(metas, bucket_bytes)
            recording = Recording(update, tensors, device=self._device, version=version)
        try:
            failures: Failures = {}
            if targets:
                failures = self._push.run(
                    tuple(targets),
                    recording.update,
                    recording,
                    version=version,
                    loaded=lambda target: self._loaded(targets[target], version),
                )
            if recording.error is None:
                recording.drain()
        except BaseException as error:
            self.broken = f"{type(error).__name__}: {error}"
            raise
        if recording.error is not None:
            self.broken = f"{type(recording.error).__name__}: {recording.error}"
            raise WeightPushError(
                f"pushing weight version {version} failed, the servers stay paused: {self.broken}"
            ) from recording.error
        return failures

    def _second_pass(self, failures: Failures, version: int) -> Failures:
        """Push the snapshot to failed servers that are alive: a complete push repairs what a broken one left."""
        if not failures or self._snapshot is None:
            return failures
        alive = self._push.alive(tuple(failures))
        again = self._run_snapshot(alive, version) if alive else {}
        return {target: again.get(target, reason) for target, reason in failures.items() if target not in alive} | again

    def _run_snapshot(self, targets: Sequence[Target], version: int) -> Failures:
        assert self._snapshot is not None and self._snapshot.update is not None
        members = {member.name: member for member in self._group.members}
        return self._push.run(
            tuple(targets),
            self._snapshot.update,
            self._snapshot,
            version=version,
            loaded=lambda target: self._loaded(members[target.name], version),
        )

    def _loaded(self, member: Member, version: int) -> None:
        """A server holds the version, and answers nothing yet."""
        self._pushed[member].append(version)
        if not self._current or self._current[-1] != version:
            self._current.append(version)

    def _push_dead(self, failures: Failures) -> list[Target]:
        alive = self._push.alive(tuple(failures)) if failures else []
        return [target for target in failures if target not in alive]

    def _admit(self, member: Member) -> None:
        with self._lock:
            if self._version is None and not member.must_be_pushed:
                return  # nothing has been pushed yet: it is as it was started
            if self._has_current_weights(member):
                return
            if self._snapshot is None or self._snapshot.version is None:
                member.waits_for_weights = True
                raise AdmissionError("there is no snapshot of the current weights: it waits for the next push")
            target = _target(member)
            self._pushed[member].clear()
            failures = self._run_snapshot([target], self._snapshot.version)
            if failures:
                raise AdmissionError(failures[target])
            member.weight_version = self._snapshot.version
            member.must_be_pushed = member.waits_for_weights = False

    def _has_current_weights(self, member: Member) -> bool:
        if member.must_be_pushed or not self._pushed[member] or self._pushed[member][-1] != self._version:
            return False
        control = ControlPlane([_target(member)], timeout_s=self._section.health_timeout_s)
        try:
            answer = control.call("/weight_info", method="GET")[_target(member)]
        finally:
            control.close()
        return not isinstance(answer, WeightPushError) and answer["weight_version"] == str(self._version)

    async def _participants(self) -> list[Member]:
        """Servers in service, and those that only wait for weights."""
        return [
            member
            for member in self._group.members
            if member.state == "ready" or (member.state == "quarantined" and member.waits_for_weights)
        ]

    async def _settle(self, members: Sequence[Member], failures: Failures) -> None:
        """Quarantine who failed, note the version of the others."""
        failed = {target.name: reason for target, reason in failures.items()}
        for member in members:
            if member.name in failed:
                member.must_be_pushed = True
                self._group.supervisor.quarantine(member, f"weight push: {failed[member.name]}", hung=True)
            else:
                member.weight_version = self._version
                member.must_be_pushed = member.waits_for_weights = False


def _target(member: Member) -> Target:
    return Target(name=member.name, url=member.url, token=member.bearer_token, incarnation=member.incarnation)
