"""Run the test suites side by side, and say in one place how they ended: `make test`, `make test-fast`.

Most of the time of servers, ranks and Slurm jobs is waiting, so the suites share the machine, each in a pytest of its
own. Their progress is shown line by line, then their reports one after the other; the last lines are the slowest tests,
the failures, what the machine gave, what was left behind, and the total. The exit code is 0 when all suites passed
and nothing is left. Arguments that are not its own go to every pytest, e.g. `-k NAME`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import leftovers
import psutil

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
# Rooms whose tests import torch, transformers or megatron-core anyway: one process pays for that once.
HEAVY_ROOMS = (
    "algorithm",
    "checkpoint",
    "conversion",
    "data",
    "evaluation",
    "kernels",
    "models",
    "parallel",
)
TRAINING = ("tests/unit/training",)  # most of them are slow: a suite of its own where those run
SLOWEST = 25


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One pytest process. `memory_gib`: allowed for it and all that it starts; a run prints what was needed."""

    name: str
    arguments: tuple[str, ...]
    memory_gib: float


# Rooms whose tests wait for servers and processes of their own.
WAITING_ROOMS = ("judging", "launch", "network", "reward", "rollout", "servers", "serving", "weight_sync")
_HEAVY, _WAITING = (tuple(f"tests/unit/{room}" for room in rooms) for rooms in (HEAVY_ROOMS, WAITING_ROOMS))
_REST = ("tests/unit", *(f"--ignore={folder}" for folder in (*_HEAVY, *TRAINING)))
UNITS = (
    Suite(name="unit-torch", arguments=_HEAVY + TRAINING, memory_gib=3),
    Suite(name="unit-waits", arguments=_WAITING, memory_gib=2),
    Suite(name="unit", arguments=(*_REST, *(f"--ignore={folder}" for folder in _WAITING)), memory_gib=2),
)
# Whole runs of the pipeline, and servers that die: each as long as half of all other tests with servers.
_RUNS, _FAULTS = "tests/e2e/test_pipeline.py", "tests/e2e/test_faults.py"
# The longest first: a suite begins when there is a place and memory for it.
ALL = (
    Suite(name="slurm", arguments=("tests/slurm",), memory_gib=7),
    Suite(name="runs", arguments=(_RUNS,), memory_gib=4),
    Suite(name="servers", arguments=("tests/e2e", f"--ignore={_RUNS}", f"--ignore={_FAULTS}"), memory_gib=4),
    Suite(name="ranks", arguments=("tests/parallel",), memory_gib=4),
    Suite(name="unit", arguments=(*_REST, "tests/browser"), memory_gib=2),
    Suite(name="unit-training", arguments=TRAINING, memory_gib=3),
    Suite(name="unit-torch", arguments=_HEAVY, memory_gib=3),
    Suite(name="faults", arguments=(_FAULTS,), memory_gib=4),
    Suite(name="gpu", arguments=("tests/gpu",), memory_gib=2),  # the only ones that see GPUs
)
LOOK_EVERY_S = 15  # at the speed of the cores
AT_ONCE = 4  # a suite waits half of its time: fewer leave two cores idle


@dataclass
class Outcome:
    """What became of a suite."""

    suite: Suite
    process: subprocess.Popen[str]
    report: Path
    lines: list[str] = field(default_factory=list)
    reader: threading.Thread | None = None

    def read(self, stream: IO[str]) -> None:
        """Show progress at once, keep the rest: a report in pieces cannot be read."""
        log = self.report.with_suffix(".log").open("w")
        with log:
            in_report = False
            for line in stream:
                log.write(line)
                log.flush()
                self.lines.append(line)
                in_report = in_report or (line.startswith(("====", "____")) and "test session starts" not in line)
                if not in_report and line.startswith("tests/"):
                    print(f"{self.suite.name:>10} | {line}", end="", flush=True)

    def cases(self) -> list[tuple[str, float, str]]:
        """(test, seconds, outcome) of every test; none when pytest did not come to its end."""
        try:
            tree = ElementTree.parse(self.report)
        except (OSError, ElementTree.ParseError):
            return []
        found = []
        for case in tree.iter("testcase"):
            kinds = [child.tag for child in case]
            kind = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
            found.append((f"{case.get('classname')}::{case.get('name')}", float(case.get("time") or 0), kind))
        return found


class Machine:
    """The most memory that was taken since the beginning, and how busy the cores were, by looking at the whole machine:
    Slurm's daemons, servers and what lies in shared memory included."""

    def __init__(self) -> None:
        self._start = self._least = available()
        self._times = psutil.cpu_times()
        self._loops = [loop_s()]  # seconds of processor time that the same loop took, again and again
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            for _ in range(LOOK_EVERY_S):
                self._least = min(self._least, available())
                time.sleep(1.0)
            self._loops.append(loop_s())

    def most_memory(self) -> float:
        """Bytes."""
        return self._start - self._least

    def cores(self) -> str:
        """How long they worked: a wall time says little without it."""
        now, then = psutil.cpu_times(), self._times
        idle = now.idle + now.iowait - then.idle - then.iowait
        busy = sum(now[:8]) - sum(then[:8]) - idle  # user to steal; guests are in user
        return f"{psutil.cpu_count()} cores worked {busy:.0f} s and idled {idle:.0f} s; {speed(self._loops, busy)}"


def loop_s() -> float:
    """Processor time of a loop that always does the same: how fast the core is at this moment."""
    began, total = time.thread_time(), 0
    for number in range(1_000_000):
        total += number % 7
    return time.thread_time() - began


def speed(loops: list[float], busy: float) -> str:
    """What a shared machine does to a time: a virtual core whose neighbour works does half as much in a second, and no
    counter of the kernel tells. The best tenth is what the cores can do."""
    best = sorted(loops)[len(loops) // 10]
    share = min(best * sum(1 / loop for loop in loops) / len(loops), 1.0)
    return f"at {share:.0%} of the speed that they had at best, at which it were {share * busy:.0f} s"


def available() -> float:
    """Bytes that can be taken: of the machine, or of the control group of this process where that has less."""
    found = float(psutil.virtual_memory().available)
    for folder in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            try:
                allowed, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
            except (OSError, ValueError):
                continue
            if allowed.isdigit() and int(allowed) < 2**60:
                found = min(found, float(int(allowed) - used))
    return found


def plan_memory(suites: tuple[Suite, ...], free: float, at_once: int) -> tuple[int, str]:
    """How many suites run at a time, and a line that says why.

    Args:
        free: bytes that can be taken.
    """
    sizes = sorted((suite.memory_gib for suite in suites), reverse=True)
    fitting = at_once
    while fitting > 1 and sum(sizes[:fitting]) * GIB > free:
        fitting -= 1
    needed = sum(sizes[:fitting])
    text = f"memory: {free / GIB:.1f} GiB free, up to {needed:g} GiB needed for {fitting} suites at a time"
    if sizes[0] * GIB > free:
        return 1, f"{text}; that is too little, and tests may be killed for want of it: end other programs"
    if fitting < min(at_once, len(suites)):
        return fitting, f"{text}; {sum(sizes[:at_once]):g} GiB would allow {min(at_once, len(suites))} at a time"
    return fitting, text


def environment(mark: str) -> dict[str, str]:
    """Of a suite and all that it starts. The suites start hundreds of Python programs: without cached bytecode each
    compiles this package again, and with a thread per core each keeps the others' cores busy while it waits."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {"OMP_NUM_THREADS": "1", **inherited, leftovers.MARK: mark, "PYTHONPATH": str(ROOT)}


def start(suite: Suite, folder: Path, mark: str, extra: list[str]) -> Outcome:
    report = folder / f"{suite.name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "tests" / "suite.py"), f"--junit-xml={report}", "-o", "junit_family=xunit1"]
    process = subprocess.Popen(
        [*command, *suite.arguments, *extra],
        cwd=ROOT,
        env=environment(mark),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    outcome = Outcome(suite=suite, process=process, report=report)
    assert process.stdout is not None
    outcome.reader = threading.Thread(target=outcome.read, args=(process.stdout,), daemon=True)
    outcome.reader.start()
    return outcome


def run_all(suites: tuple[Suite, ...], at_once: int, folder: Path, mark: str, extra: list[str]) -> list[Outcome]:
    """Every suite to its end, `at_once` at a time."""
    waiting, outcomes = list(suites), []
    try:
        while waiting or any(outcome.process.poll() is None for outcome in outcomes):
            running = sum(outcome.process.poll() is None for outcome in outcomes)
            if waiting and running < at_once:
                outcomes.append(start(waiting.pop(0), folder, mark, extra))
                continue
            time.sleep(0.2)
    finally:
        for outcome in outcomes:
            if outcome.process.poll() is None:  # the run was ended early: pytest's own end stops servers and jobs
                outcome.process.send_signal(signal.SIGINT)
        for outcome in outcomes:
            outcome.process.wait()
    for outcome in outcomes:
        assert outcome.reader is not None
        outcome.reader.join(5)
    return outcomes


def show_reports(outcomes: list[Outcome]) -> None:
    """What pytest wrote after its progress, suite by suite."""
    for outcome in outcomes:
        print(f"\n{f' {outcome.suite.name} ':#^100}")
        starts = [i for i, line in enumerate(outcome.lines) if line.startswith("====") and "session starts" not in line]
        complete = outcome.cases() or outcome.process.returncode == 5
        print("".join(outcome.lines[starts[0] if starts and complete else 0 :]), end="")


def show_end(outcomes: list[Outcome], seconds: float, machine: Machine, left: list[str]) -> int:
    """The common closing lines; returns the exit code."""
    cases = [case for outcome in outcomes for case in outcome.cases()]
    counts = Counter(kind for _, _, kind in cases)
    print(f"\n{f' slowest {SLOWEST} of {len(cases)} ':=^100}")
    for name, took, _ in sorted(cases, key=lambda case: -case[1])[:SLOWEST]:
        print(f"{took:8.2f} s  {name}")
    # 5: nothing was collected, e.g. with -k
    broken = [o for o in outcomes if o.process.returncode not in (0, 1, 5)]
    failed = [name for name, _, kind in cases if kind in ("failure", "error")]
    if failed or broken or left:
        print(f"{' failures ':=^100}")
    for name in failed:
        print(f"FAILED {name}")
    for outcome in broken:
        print(f"FAILED suite {outcome.suite.name}: pytest ended with exit code {outcome.process.returncode}")
    for line in left:
        print(f"FAILED left behind: {line}")
    print(f"memory: at most {machine.most_memory() / GIB:.1f} GiB were needed at once; {machine.cores()}")
    if not left:
        print("left behind: no process, no shared memory, no port")
    failures = counts["failure"] + counts["error"] + len(broken) + len(left)
    print(f"in {seconds:.0f} s")
    print(f"{counts['passed']} passed, {failures} failed, {counts['skipped']} skipped")
    return 1 if failed or broken or left or not cases else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="unit tests of under a second, without ranks and servers")
    options, extra = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    suites, at_once = (UNITS, len(UNITS)) if options.fast else (ALL, AT_ONCE)
    extra = ["-m", "not slow", *extra] if options.fast else extra
    folder = ROOT / "build" / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    at_once, text = plan_memory(suites, available(), at_once)
    print(f"{text}; logs in {folder.relative_to(ROOT)}", flush=True)
    mark, shared, machine, began = uuid.uuid4().hex, leftovers.shared_memory(), Machine(), time.monotonic()
    outcomes = run_all(suites, at_once, folder, mark, extra)
    show_reports(outcomes)
    return show_end(outcomes, time.monotonic() - began, machine, leftovers.left_behind(mark, shared))


if __name__ == "__main__":
    sys.exit(main())
