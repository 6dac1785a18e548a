"""What a weight transport does, and vLLM's protocol around it, on all servers at once:

pause -> start -> buckets (a transport: `senders`) -> finish -> verify -> resume
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict
from typing import Any

import torch

from megatron_r1reward.weight_sync import WeightPushError
from megatron_r1reward.weight_sync.admin_api import ControlPlane, Target
from megatron_r1reward.weight_sync.buckets import BucketSource, UpdateMessage, WeightUpdate

log = logging.getLogger(__name__)
Failures = dict[Target, str]

_ABANDON = {"update_info": asdict(UpdateMessage(abandon=True))}
_HEALTH_TIMEOUT_S = 5.0


class Transport(ABC):
    """Carries the buckets of one update to every worker of every server.

    The life of a connection: connect -> send, send, ... -> disconnect; a failed send is followed by disconnect.
    `WeightPush` puts the steps of vLLM's protocol around it.
    """

    device: torch.device  # where it takes buckets from
    needs_memory_file = False  # whether the buckets must lie in a snapshot that other processes can open

    @abstractmethod
    def connect(self, control: ControlPlane, source: BucketSource) -> None:
        """Open the way to every worker of `control.targets`.

        Raises:
            WeightPushError: a server refused, or did not come in time.
        """

    @abstractmethod
    def send(self, control: ControlPlane, update: WeightUpdate, source: BucketSource) -> None:
        """Deliver all buckets; returns when every worker has received, verified and loaded them.

        Raises:
            WeightPushError: a server refused, or was lost.
        """

    @abstractmethod
    def disconnect(self) -> None:
        """Close the way, at any time, even if never connected; workers that wait for data notice soon."""

    def close(self) -> None:
        """Disconnect for good."""
        self.disconnect()


def wait_for(ours: Future[Any], theirs: Iterator[Future[Any]] | list[Future[Any]]) -> Any:
    """The result of our end of an exchange; raises at once when one of the servers' ends fails."""
    pending: set[Future[Any]] = {ours, *theirs}
    while not ours.done():
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for call in done:
            call.result()
    return ours.result()


class WeightPush:
    """Pushes one version to a set of servers. A server is resumed only when it has proved that it holds the version.

    Requests in flight are kept; prefix, encoder and image caches are cleared; a request that was in flight continues
    with the new weights on a recomputed KV cache, and its weight spans tell where the switch was.

    Sleeping servers get the memory of their weights back before the push, that of the KV cache after it.

    What proves it: the workers compare checksums of every tensor that they received with the sender's, refuse layers
    of which only a part came, and the server reports the version.
    """

    def __init__(
        self, transport: Transport, *, timeout_s: float, control_timeout_s: float, wakes: bool = False
    ) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._control_timeout_s = control_timeout_s  # of calls that any living server answers soon
        self._wakes = wakes  # the servers may be asleep (`colocation`); to those that are not it makes no difference
        self._control: ControlPlane | None = None
        self._connected = False

    def run(
        self,
        targets: Sequence[Target],
        update: WeightUpdate,
        source: BucketSource,
        *,
        version: int,
        loaded: Callable[[Target], None] = lambda target: None,
    ) -> Failures:
        """Push to all `targets`; returns why it failed, for those where it did: they are paused, or gone.

        Args:
            loaded: called for each server when it holds the version, before it answers anything with it.
        """
        failures: Failures = {}
        control = self._control_of(targets)
        awake = self._wake(control, "weights", targets, failures)
        keep = {"mode": "keep", "clear_cache": True}
        paused = control.call("/pause", params=keep, targets=awake, timeout_s=self._control_timeout_s)
        ready = _successes(paused, failures)
        ready = _successes(self._start(control, ready), failures)
        if failures:  # a group cannot be built, or used, with those missing
            control = self._control_of(ready)
        if not ready:
            return failures
        try:
            if not self._connected:
                self._transport.connect(control, source)
                self._connected = True
            self._transport.send(control, update, source)
        except BaseException as error:
            self.disconnect()
            # torch.distributed raises RuntimeErrors and OSErrors when a peer is lost
            if not isinstance(error, (WeightPushError, RuntimeError, OSError)):
                raise
            return failures | dict.fromkeys(ready, f"{type(error).__name__}: {error}")
        body = {target: {"weight_version": str(version)} for target in control.targets}
        ready = _successes(control.call("/finish_weight_update", body), failures)
        ready = self._verified(control, ready, version, failures)
        for target in ready:
            loaded(target)
        ready = self._wake(control, "kv_cache", ready, failures)
        _successes(control.call("/resume", targets=ready, timeout_s=self._control_timeout_s), failures)
        return failures

    def alive(self, targets: Sequence[Target]) -> list[Target]:
        """Those that answer a health check now."""
        control = ControlPlane(targets, timeout_s=_HEALTH_TIMEOUT_S)
        try:
            return _successes(control.call("/health", method="GET"), {})
        finally:
            control.close()

    def disconnect(self) -> None:
        self._transport.disconnect()
        self._connected = False

    def close(self) -> None:
        """Release the transport; the servers keep serving what they have."""
        self.disconnect()
        self._transport.close()
        if self._control is not None:
            self._control.close()
            self._control = None

    def _control_of(self, targets: Sequence[Target]) -> ControlPlane:
        """The control plane of exactly these servers; when they are others than last, the transport is disconnected."""
        if self._control is None or self._control.targets != tuple(targets):
            self.disconnect()
            if self._control is not None:
                self._control.close()
            self._control = ControlPlane(targets, timeout_s=self._timeout_s)
        return self._control

    def _wake(self, control: ControlPlane, tag: str, targets: Sequence[Target], failures: Failures) -> list[Target]:
        """Give sleeping servers a part of their memory back; those that have it now."""
        if not self._wakes:
            return list(targets)
        return _successes(control.call("/wake_up", params={"tags": tag}, targets=targets), failures)

    def _start(self, control: ControlPlane, targets: Sequence[Target]) -> dict[Target, Any]:
        answers = control.call("/start_weight_update", targets=targets)
        stuck = [target for target, answer in answers.items() if "already active" in str(answer)]
        if stuck:  # an earlier push ended between start and finish
            control.call("/update_weights", dict.fromkeys(stuck, _ABANDON), targets=stuck)
            answers |= control.call("/start_weight_update", targets=stuck)
        return answers

    def _verified(
        self, control: ControlPlane, targets: Sequence[Target], version: int, failures: Failures
    ) -> list[Target]:
        verified = []
        answers = control.call("/weight_info", method="GET", targets=targets, timeout_s=self._control_timeout_s)
        for target in _successes(answers, failures):
            reported = answers[target]["weight_version"]
            if reported == str(version):
                verified.append(target)
            else:
                failures[target] = f"{target.url} reports weight version {reported!r} after pushing {version}"
        return verified


def _successes(answers: Mapping[Target, Any], failures: Failures) -> list[Target]:
    """Targets that answered; the others are added to `failures`."""
    failures |= {target: str(answer) for target, answer in answers.items() if isinstance(answer, WeightPushError)}
    return [target for target, answer in answers.items() if not isinstance(answer, WeightPushError)]
