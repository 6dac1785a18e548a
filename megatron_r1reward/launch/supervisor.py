"""Starts the components of a stage, watches them, ends them together, and says why.

A server's address is awaited before the driver (the trainer, say) starts, so nothing waits in a collective for a model
that is still loading. A server that was in service and ends is started again (`server_lives`). Whatever else ends, all
ends: a job never idles on a component that is gone.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_r1reward.cluster.placement import Placement
from megatron_r1reward.config.schema import ClusterSection
from megatron_r1reward.launch.exit_report import (
    EXIT_LOST_NODE,
    EXIT_STALLED,
    EXIT_UNFINISHED,
    LifeEndedError,
    another_turn,
    write_report,
)
from megatron_r1reward.launch.server_lives import ServerLives
from megatron_r1reward.launch.steps import RunningStep, StepEnd, StepLauncher
from megatron_r1reward.network.server_api import unhealthy
from megatron_r1reward.run_dir import (
    EXIT_DONE,
    EXIT_REQUEUE,
    Address,
    ExitReport,
    Heartbeat,
    RunDir,
    RunInfo,
    StopRequest,
)

log = logging.getLogger(__name__)
Command = Callable[[Placement, int], Sequence[str]]  # of a component's n-th start in this life

_POLL_INTERVAL_S = 0.2
_SETTLE_S = 1.0  # what dies within this time of the first death is looked at together with it
_STEP_START_TIMEOUT_S = 180.0  # from srun to the first task
_STACK_DUMP_S = 5.0
_READ_INTERVAL_S = 20.0  # of the time limit, which is a program each time
_SAFETY = 1.2  # the next step and the save may be slower than the slowest seen


@dataclass(frozen=True, kw_only=True)
class WalltimeGuard:
    """Anchored to the job's own end, which counts from the job's start: queueing, container start and server start have
    used up their part of it already.

    Attributes:
        ends: when Slurm ends the job, in seconds since the epoch; None without a limit.
        margin_s: kept free after the save, for ending the steps.
        grace_s: what ending the steps may take.
    """

    ends: float | None
    margin_s: float
    grace_s: float

    def latest_stop(self, heartbeat: Heartbeat | None) -> float | None:
        """Time at which the trainer must be asked to stop: one more step (begun a moment ago) and a save still fit."""
        if self.ends is None:
            return None
        step, save = (heartbeat.longest_step_s, heartbeat.longest_save_s) if heartbeat is not None else (0.0, 0.0)
        return self.ends - self.margin_s - _SAFETY * (step + save)

    def last_moment(self) -> float | None:
        """Time at which steps are ended without waiting for the save any longer, so that this job can still requeue."""
        if self.ends is None:
            return None
        return self.ends - min(self.grace_s, self.margin_s)


class WalltimeWatch:
    """The guard of a limit that an administrator may move either way: `read` is asked for it now and then."""

    def __init__(self, guard: WalltimeGuard, read: Callable[[], float | None]) -> None:
        self.guard = guard
        self._read = read
        self._read_at = time.time()

    def refresh(self) -> None:
        """Where `read` knows of no limit, the last known one stays."""
        now = time.time()
        if self.guard.ends is None or now - self._read_at < _READ_INTERVAL_S:
            return
        self._read_at = now
        ends = self._read()
        if ends is not None and ends != self.guard.ends:
            log.info("the time limit has moved by %+.0f s", ends - self.guard.ends)
            self.guard = replace(self.guard, ends=ends)


class Closeable(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a supervisor needs to know about a stage."""

    info: RunInfo
    placements: tuple[Placement, ...]
    command: Command
    startup_timeout_s: float  # of a server
    resumes: bool  # the driver writes heartbeats, saves when asked to, and continues where an earlier life stopped
    requeues: bool  # whether another turn brings the stage further
    finished: Callable[[], bool]  # asked when the driver has left with exit code 0
    watch: Callable[[], Closeable] | None = None  # begins to look after the servers where no driver does
    drains: bool = False  # told to end, the driver first finishes what it has begun, and needs its servers for that


class Supervisor:
    """One life of one stage. `run()` returns the report that it has written to `exit.json`."""

    def __init__(self, run: RunDir, section: ClusterSection, plan: Plan, launcher: StepLauncher) -> None:
        self._run = run
        self._section = section
        self._plan = plan
        self._launcher = launcher
        self._driver = next((p.component.name for p in plan.placements if p.kind == "driver"), None)
        self._placements = {placement.component.name: placement for placement in plan.placements}
        self._steps: dict[str, RunningStep] = {}
        self._servers = ServerLives(run, self._steps, self._start, grace_s=section.grace_s)
        self._watch: Closeable | None = None
        self._started: dict[str, float] = {}
        self._signals: list[signal.Signals] = []
        self._stop_requested = False
        guard = WalltimeGuard(ends=plan.info.ends, margin_s=section.walltime_margin_s, grace_s=section.grace_s)
        self._walltime = WalltimeWatch(guard, launcher.ends)

    # --- the life, from top to bottom ---

    def run(self) -> ExitReport:
        """Until the driver is done or anything fails; no step is left when this returns."""
        previous = {n: signal.signal(n, self._take) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        try:
            try:
                self._live()
                raise AssertionError("a life ends with a reason")
            except LifeEndedError as end:
                report = self._verdict(end)
            if self._watch is not None:
                self._watch.close()  # it would take servers that are told to end for sick ones
            self._stop_all()
        finally:
            for step in self._steps.values():
                step.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return report

    def _verdict(self, end: LifeEndedError) -> ExitReport:
        heartbeat, info = self._heartbeat(), self._plan.info
        if end.outcome == "requeue":
            end = another_turn(
                end,
                self._run,
                info.life,
                heartbeat,
                resumes=self._plan.resumes,
                requeues=self._plan.requeues,
                late=self._is_late(),
            )
        return write_report(end, self._run, info, heartbeat)

    def _is_late(self) -> bool:
        """Whether the time limit, and not a preemption, is what this life makes room for."""
        latest = self._walltime.guard.latest_stop(None)
        return latest is not None and time.time() > latest - _STEP_START_TIMEOUT_S

    def _take(self, number: int, frame: object) -> None:
        self._signals.append(signal.Signals(number))

    def _live(self) -> None:
        servers = [name for name, placement in self._placements.items() if placement.kind != "driver"]
        for name in servers:
            self._start(name)
        self._await_servers(servers)
        if self._plan.watch is not None:
            self._watch = self._plan.watch()
        if self._driver is not None:
            self._start(self._driver)
        while True:
            self._check()
            time.sleep(_POLL_INTERVAL_S)

    def _start(self, name: str, start: int = 0) -> None:
        placement = self._placements[name]
        log.info("starting %s on %s", name, ",".join(placement.component.nodes))
        self._started[name] = time.time()
        command = self._plan.command(placement, start)
        self._steps[name] = self._launcher.start(placement, command, self._run.log(self._plan.info.life, name))

    def _await_servers(self, names: Sequence[str]) -> None:
        waiting = list(names)
        while waiting:
            self._check()
            for name in list(waiting):
                address = Address.read(self._run.address(name))
                if address is None:
                    if time.time() - self._started[name] > self._plan.startup_timeout_s:
                        limit = f"{self._plan.startup_timeout_s:g} s"
                        raise LifeEndedError("failed", 1, f"{name} was not ready after {limit}", name)
                    continue
                if (problem := unhealthy(address.url)) is not None:
                    raise LifeEndedError(
                        "failed",
                        1,
                        f"{name} is ready on {address.host}, but {address.url} cannot be reached from "
                        f"{self._plan.info.host} ({problem}): the node's name must resolve to an address that other "
                        "nodes reach, and no firewall may stand between them (docs/cluster.md)",
                        name,
                    )
                log.info("%s is ready at %s", name, address.url)
                waiting.remove(name)
                self._servers.in_service.add(name)
            time.sleep(_POLL_INTERVAL_S)

    # --- one look at everything ---

    def _check(self) -> None:
        """Raises LifeEndedError when there is a reason."""
        self._check_signals()
        ended: dict[str, StepEnd] = {}
        self._poll_into(ended)
        if ended:
            self._explain(ended)
        self._servers.obey()
        heartbeat = self._heartbeat()
        self._check_time(heartbeat)
        self._check_progress(heartbeat)
        self._check_steps_began()

    def _heartbeat(self) -> Heartbeat | None:
        return Heartbeat.read(self._run.heartbeat)

    def _check_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number != signal.SIGUSR1:
                reason = self._launcher.why_ending()
                raise LifeEndedError("cancelled", 128 + number, f"told to end by {number.name}: {reason}")
            self._ask_to_stop("SIGUSR1: preemption, or the time limit is near")

    def _ask_to_stop(self, reason: str) -> None:
        """Save and leave. Without a trainer at work there is nothing to save."""
        if self._stop_requested:
            return
        self._stop_requested = True
        log.info("asked to save and stop: %s", reason)
        if not self._plan.resumes or self._driver not in self._steps:
            raise LifeEndedError("requeue", EXIT_REQUEUE, reason)
        StopRequest(reason=reason).write(self._run.stop)

    def _check_time(self, heartbeat: Heartbeat | None) -> None:
        self._walltime.refresh()
        self._check_signals()  # reading took a moment: a job that is being ended is not one whose time is up
        guard, now = self._walltime.guard, time.time()
        latest, last = guard.latest_stop(heartbeat), guard.last_moment()
        if latest is None or last is None or guard.ends is None or now < latest:
            return
        if now >= last:
            raise LifeEndedError("requeue", EXIT_REQUEUE, "the time limit came before the trainer had saved")
        self._ask_to_stop(f"the time limit is {guard.ends - now:.0f} s away")

    def _check_progress(self, heartbeat: Heartbeat | None) -> None:
        if heartbeat is None or heartbeat.phase in ("stopped", "done"):
            return
        limit = max(self._section.stall_timeout_s, 10 * (heartbeat.longest_step_s + heartbeat.longest_save_s))
        silent = time.time() - heartbeat.time
        if silent < limit:
            return
        log.error("no progress for %.0f s: asking every process of %s for its stacks", silent, heartbeat.component)
        if heartbeat.component in self._steps:
            self._steps[heartbeat.component].signal(signal.SIGUSR2)
            time.sleep(_STACK_DUMP_S)
        raise LifeEndedError(
            "failed",
            EXIT_STALLED,
            f"no progress for {silent:.0f} s while {heartbeat.phase} after step {heartbeat.step}; the stacks of all "
            "processes are at the end of the log",
            heartbeat.component,
        )

    def _check_steps_began(self) -> None:
        for name, started in self._started.items():
            if time.time() - started > _STEP_START_TIMEOUT_S and not self._run.step_id(name).exists():
                raise LifeEndedError(
                    "failed",
                    1,
                    f"{name} has not begun within {_STEP_START_TIMEOUT_S:g} s: Slurm finds no room for it, or its "
                    f"container does not start; see {name}.srun.log",
                    name,
                )

    # --- what an end means ---

    def _explain(self, ended: dict[str, StepEnd]) -> None:
        """Find the root cause among the steps that have ended; returns where only servers did that may start again."""
        if self._driver in ended and ended[self._driver].code == 0:
            self._driver_left(self._driver)
        settle = time.time() + _SETTLE_S
        while time.time() < settle:
            self._check_signals()
            time.sleep(_POLL_INTERVAL_S)
        self._poll_into(ended)
        if ended.keys() == {self._driver} and not self._servers.down:
            self._blame_sick_server(ended)
        lost = self._launcher.lost_nodes()
        self._check_signals()  # the steps of a cancelled job may hear of it first
        if lost:
            raise LifeEndedError("requeue", EXIT_LOST_NODE, f"node(s) {','.join(lost)} do not answer any more")
        if ended.keys() <= self._servers.in_service:
            for name, end in ended.items():
                self._servers.note(name, end)
            return
        # A trainer that loses its server fails too; a server does not mind losing its trainer.
        ended |= {name: end for name, end in self._servers.down.items() if name not in ended}
        name = min(ended, key=lambda name: name == self._driver)
        end = ended[name]
        if end.code == 0:
            raise LifeEndedError("failed", EXIT_UNFINISHED, f"{name} left while it was needed", name)
        raise LifeEndedError("failed", end.code, f"{name}: {end.what}", name)

    def _poll_into(self, ended: dict[str, StepEnd]) -> None:
        for name, step in self._steps.items():
            if name not in ended and name not in self._servers.down and (end := step.poll()) is not None:
                ended[name] = end

    def _blame_sick_server(self, ended: dict[str, StepEnd]) -> None:
        """A server that has stopped answering, but takes a while to end, is why the driver failed."""
        for name in self._steps:
            address = Address.read(self._run.address(name))
            down = name in self._servers.down
            if down or address is None or unhealthy(address.url, attempts=1) is None:
                continue
            deadline = time.time() + self._section.grace_s
            while name not in ended and time.time() < deadline:
                self._poll_into(ended)
                time.sleep(_POLL_INTERVAL_S)
            ended.setdefault(name, StepEnd(code=1, what="does not answer any more"))

    def _driver_left(self, driver: str) -> None:
        heartbeat = self._heartbeat()
        if self._plan.finished():
            raise LifeEndedError("done", EXIT_DONE, "finished")
        if self._plan.resumes and heartbeat is not None and heartbeat.phase == "stopped":
            request = StopRequest.read(self._run.stop)
            reason = request.reason if request is not None else "stopped on request"
            raise LifeEndedError("requeue", EXIT_REQUEUE, f"{reason}; saved after step {heartbeat.saved_step}")
        raise LifeEndedError(
            "failed", EXIT_UNFINISHED, f"{driver} left with exit code 0, but neither finished nor saved", driver
        )

    # --- the end ---

    def _stop_all(self) -> None:
        """SIGTERM to every step, then the hard way."""
        driver = self._steps.get(self._driver or "")
        if self._plan.drains and driver is not None:
            driver.signal(signal.SIGTERM)
            deadline = time.time() + self._section.grace_s
            while driver.running and time.time() < deadline:
                time.sleep(_POLL_INTERVAL_S)
        for step in self._steps.values():
            step.signal(signal.SIGCONT)  # what is stopped hears nothing else
            step.signal(signal.SIGTERM)
        deadline = time.time() + self._section.grace_s
        while any(step.running for step in self._steps.values()) and time.time() < deadline:
            time.sleep(_POLL_INTERVAL_S)
        late = [name for name, step in self._steps.items() if step.running]
        if late:
            log.warning("killing %s: still there %g s after SIGTERM", ", ".join(late), self._section.grace_s)
