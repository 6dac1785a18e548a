"""Servers on the trainer's own devices: asleep while it trains, awake while they sample. One state machine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from megatron_r1reward.servers.group import ServerGroup
from megatron_r1reward.servers.member import ServerError

log = logging.getLogger(__name__)

SleepLevel = Literal[1, 2]
Phase = Literal["ready", "generating", "falling_asleep", "asleep", "waking", "unfit", "failed"]

# ready: awake, with weights that may be sampled from, nothing in flight. asleep: the memory is the trainer's.
# waking: weights' memory back, push, KV cache back. unfit: awake and paused after a push that failed.
# failed: a server holds memory that it should have freed; the run cannot go on.
NEXT: Mapping[Phase, frozenset[Phase]] = {
    "ready": frozenset({"generating", "falling_asleep", "waking"}),
    "generating": frozenset({"ready"}),
    "falling_asleep": frozenset({"asleep", "failed"}),
    "asleep": frozenset({"waking"}),
    "waking": frozenset({"ready", "unfit"}),
    "unfit": frozenset({"waking"}),
    "failed": frozenset(),
}
_REFUSALS: Mapping[Phase, str] = {
    "ready": "they are awake and idle",
    "generating": "rollouts are being generated: wait for them",
    "falling_asleep": "they are falling asleep",
    "asleep": "they are asleep: push weights first, which wakes them",
    "waking": "a weight push is waking them",
    "unfit": "the last weight push failed: push complete weights first",
    "failed": "one of them did not free its memory",
}


class PhaseError(RuntimeError):
    """What was asked for is impossible in the servers' present phase."""


class PhaseMachine:
    """The phase of a colocated pool. Thread-safe; a refused transition changes nothing."""

    def __init__(self) -> None:
        self._phase: Phase = "ready"
        self._generations: set[object] = set()
        self._lock = threading.Lock()

    @property
    def phase(self) -> Phase:
        return self._phase

    def go(self, to: Phase) -> None:
        """Raises PhaseError when `to` does not follow the present phase."""
        with self._lock:
            self._go(to)

    def begin_generation(self) -> Callable[[], None]:
        """Several may be under way at once. Returns what ends this one; ending it again does nothing.

        Raises:
            PhaseError: the servers are not awake with fit weights.
        """
        generation = object()
        with self._lock:
            if self._phase != "generating":
                self._go("generating")
            self._generations.add(generation)

        def end() -> None:
            with self._lock:
                if generation in self._generations:
                    self._generations.remove(generation)
                    if not self._generations:
                        self._go("ready")

        return end

    def _go(self, to: Phase) -> None:
        if to not in NEXT[self._phase]:
            raise PhaseError(f"colocated servers cannot go from {self._phase!r} to {to!r}: {_REFUSALS[self._phase]}")
        self._phase = to


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Free memory of what trainer and servers share.

    `is_exact` is False where other processes' memory is in it (a machine's RAM): then it is only reported.
    """

    free_bytes: Callable[[], int]
    is_exact: bool

    @classmethod
    def here(cls) -> DeviceMemory:
        """Of this process's GPU; of the machine where there is none."""
        if torch.cuda.is_available():
            return cls(free_bytes=lambda: torch.cuda.mem_get_info()[0], is_exact=True)
        return cls(free_bytes=lambda: psutil.virtual_memory().available, is_exact=False)


@dataclass(frozen=True, kw_only=True)
class SleepMemory:
    """Free bytes around one sleep."""

    before_sleep: int
    asleep: int
    before_wake: int | None = None  # None: they are still asleep

    @property
    def freed(self) -> int:
        return self.asleep - self.before_sleep


class Colocation:
    """Puts a group's servers to sleep and lets a weight push wake them.

    vLLM's sleep mode frees the KV cache and either moves the weights to host memory (level 1) or drops them (level 2:
    every push must then bring all tensors). A server that does not fall asleep is killed, if it is ours, and started
    again by the next push. While the servers sleep nothing is recovered: a restarted server would take the memory
    that the trainer is using. The waking itself is part of `protocol.WeightPush`: weights' memory -> push -> KV
    cache.
    """

    def __init__(self, group: ServerGroup, level: SleepLevel, *, memory: DeviceMemory | None = None) -> None:
        self.machine = PhaseMachine()
        self.last: SleepMemory | None = None
        self._group = group
        self._level = level
        self._memory = memory or DeviceMemory.here()

    def sleep(self) -> None:
        """Free the servers' memory; returns when it is free.

        Raises:
            PhaseError: they are not awake and idle.
            ServerError: a server that is not ours refuses, so its memory is not free.
        """
        self.machine.go("falling_asleep")
        before = self._memory.free_bytes()
        try:
            self._group.loop.run(self._group.supervisor.put_to_sleep(self._level))
        except BaseException:
            self.machine.go("failed")
            raise
        self.last = SleepMemory(before_sleep=before, asleep=self._memory.free_bytes())
        self.machine.go("asleep")
        log.info("servers are asleep: %.2f GB free, %.2f GB before", self.last.asleep / 1e9, before / 1e9)

    @contextmanager
    def waking(self) -> Iterator[None]:
        """Around a weight push to all servers: they are ready after it, or unfit when it raises.

        Raises:
            PhaseError: rollouts are being generated, or the servers are falling asleep.
            ServerError: the trainer has left less memory than the servers gave up.
        """
        if self.machine.phase == "asleep":
            self._measure()
        self.machine.go("waking")
        # The memory is theirs again. A server that hangs from here on is started again at once, as in other layouts:
        # what waits for its answer fails then, instead of waiting for a push's whole time limit.
        self._group.loop.run(self._group.supervisor.allow_recoveries())
        try:
            yield
        except BaseException:
            self.machine.go("unfit")
            raise
        self.machine.go("ready")

    def metrics(self) -> dict[str, float]:
        """GB that were free while the servers slept: when they had fallen asleep, and when the trainer was done."""
        if self.last is None:
            return {}
        found = {"servers/free_asleep_gb": self.last.asleep / 1e9}
        if self.last.before_wake is not None:
            found["servers/free_before_wake_gb"] = self.last.before_wake / 1e9
        return found

    def _measure(self) -> None:
        assert self.last is not None
        free = self._memory.free_bytes()
        self.last = SleepMemory(before_sleep=self.last.before_sleep, asleep=self.last.asleep, before_wake=free)
        if self._memory.is_exact and free < self.last.freed:
            raise ServerError(
                f"the servers gave {self.last.freed / 1e9:.2f} GB to the trainer, which leaves {free / 1e9:.2f} GB to "
                "wake them: lower rollout.gpu_memory_utilization or data.token_budget"
            )
