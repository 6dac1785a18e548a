"""Submitting, watching and hurting jobs of the test cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_r1reward.run_dir import Address, ExitReport, RunDir

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 900.0  # for one event; machines that also do other things are slow at importing torch eight times
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")


def tool(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """Standard output of a command, with these variables in addition to our own."""
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def until(condition: Callable[[], Any], what: str, *, timeout_s: float = PATIENCE_S, every_s: float = 0.3) -> Any:
    """Wait for a true value and return it. Whoever asks Slurm for it asks less often: that is a program each time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every_s)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One submitted job and the run directory that it writes."""

    id: str
    run: RunDir
    folder: Path

    def field(self, name: str) -> str:
        record = tool("scontrol", "show", "job", self.id).split("\n\n")[0]
        match = re.search(rf"\b{name}=(\S+)", record)
        assert match is not None, f"no {name} in {record}"
        return match[1]

    @property
    def state(self) -> str:
        return self.field("JobState")

    @property
    def restarts(self) -> int:
        return int(self.field("Restarts"))

    @property
    def exit_code(self) -> int:
        return int(self.field("ExitCode").split(":")[0])

    def wait(self) -> Job:
        """Until it has ended for good."""
        until(lambda: self.state in ENDED, f"end of job {self.id}\n{self.output()}", every_s=1.0)
        return self

    def wait_step(self, step: int) -> None:
        """Until it has logged this many steps; an end before that is an error."""

        def reached() -> bool:
            for _ in range(10):
                if max(self.rows(), default=0) >= step:
                    return True
                time.sleep(0.2)
            assert self.state not in ENDED, f"job {self.id} is {self.state}\n{self.output()}"
            return False

        until(reached, f"step {step} of job {self.id}\n{self.output()}")

    def rows(self) -> dict[int, dict[str, float]]:
        path = self.run.root / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {row["step"]: row for row in map(json.loads, lines)}

    def started(self, server: str) -> int:
        """Which start of this server of its present life is ready; -1 before the first one is."""
        address = Address.read(self.run.address(server))
        return -1 if address is None else address.start

    def life(self, number: int) -> ExitReport:
        """How one of its lives has ended."""
        report = ExitReport.read(self.run.life_report(number))
        assert report is not None, f"no exit.json of life {number}\n{self.output()}"
        return report

    def saved_step(self, life: int) -> int:
        """The checkpoint with which a life that was told to stop has ended."""
        step = self.life(life).saved_step
        assert step is not None, self.output()
        return step

    def report(self) -> ExitReport:
        report = ExitReport.read(self.run.exit_report)
        assert report is not None, f"no exit.json\n{self.output()}"
        return report

    def output(self) -> str:
        """What the job script wrote, for messages of failing tests."""
        path = self.folder / f"job-{self.id}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def accounting(self) -> dict[str, str]:
        """State by name of the steps of the last life, as sacct keeps them; the job itself under "job"."""

        def read() -> dict[str, str] | None:
            lines = tool("sacct", "-n", "-P", "-j", self.id, "-o", "JobID,JobName,State").splitlines()
            records = [line.split("|") for line in lines]
            states = {("job" if "." not in number else name): state.split()[0] for number, name, state in records}
            return None if not states or {"RUNNING", "PENDING"} & set(states.values()) else states

        return until(read, f"accounting of job {self.id}", timeout_s=60)

    def lives(self) -> list[tuple[str, str, str]]:
        """(start, end, nodes) of each time that it ran, in order; times as text that sorts like time."""
        lines = tool("sacct", "-n", "-P", "-X", "-D", "-j", self.id, "-o", "Start,End,NodeList").splitlines()
        return sorted((start, end, nodes) for start, end, nodes in (line.split("|") for line in lines))

    @contextmanager
    def held(self, *words: str) -> Iterator[None]:
        """Its processes with these words stand still for a while, as on a machine that is much too slow."""
        pids = self.processes(*words)
        assert pids, f"job {self.id} has no process {words}"
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):  # its node may have been lost meanwhile
                    os.kill(pid, signal.SIGCONT)

    def processes(self, *words: str) -> list[int]:
        """Processes of this job on any node whose command line holds all these words; not the srun that holds them."""
        found = (pid for pid in all_processes(*words) if f"SLURM_JOB_ID={self.id}" in environment_of(pid))
        return [pid for pid in found if pid not in all_processes("srun")]

    def gpus(self, *words: str) -> set[tuple[str, str]]:
        """(node, CUDA_VISIBLE_DEVICES) of its processes with these words."""
        found = set()
        for pid in self.processes(*words):
            variables = dict(item.partition("=")[::2] for item in environment_of(pid))
            found.add((variables["SLURMD_NODENAME"], variables["CUDA_VISIBLE_DEVICES"]))
        return found

    def kill_one(self, number: signal.Signals, *words: str, procid: int | None = None) -> None:
        """Send a signal to one process of this job, as an accident would."""
        pids = self.processes(*words)
        if procid is not None:
            pids = [pid for pid in pids if f"SLURM_PROCID={procid}" in environment_of(pid)]
        assert pids, f"job {self.id} has no process {words}"
        os.kill(pids[0], number)


def all_processes(*words: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if all(word in arguments for word in words):
            found.append(int(path.parent.name))
    return sorted(found)


def environment_of(pid: int) -> set[str]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"))
    except OSError:
        return set()


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The running test cluster."""

    script: Path
    environment: dict[str, str]
    config: Path

    def chaos(self, *command: str) -> None:
        subprocess.run(["bash", str(self.script), *command], env=self.environment, check=True, timeout=60)

    def submit(
        self,
        script: str,
        *arguments: str | Path,
        output: Path,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Job:
        """sbatch of one of the repository's scripts, from the folder around `output`."""
        folder = output.parent
        command = ["sbatch", "--parsable", "--chdir", str(folder), f"--output={folder}/job-%j.out", *options]
        command += [str(REPOSITORY / "slurm" / script), *map(str, arguments)]
        job_id = tool(*command, environment=environment).strip().split(";")[0]
        return Job(id=job_id, run=RunDir(root=output), folder=folder)

    def chain(self, *arguments: str | Path, folder: Path, options: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """slurm/pipeline.sh in `folder`, with sbatch options by stage; returns job ids by stage."""
        own = {f"{stage.upper()}_OPTIONS": " ".join(words) for stage, words in options.items()}
        command = [str(REPOSITORY / "slurm" / "pipeline.sh"), f"--chdir={folder}", f"--output={folder}/job-%j.out"]
        return dict(line.split() for line in tool(*command, *map(str, arguments), environment=own).splitlines())

    def left_behind(self) -> str | None:
        """What jobs have left running or listening; None when nothing."""
        if queue := tool("squeue", "-h").strip():
            return f"jobs: {queue}"
        ours = f"SLURM_CONF={self.config}"
        for pid in all_processes():
            environment = environment_of(pid)
            if ours in environment and any(item.startswith("SLURM_JOB_ID=") for item in environment):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command.strip():
                    return f"process {pid}: {command}"
        return None


def from_here(url: str) -> str:
    """A virtual node's URL as this machine reaches it: n1, n2, ... have the addresses 127.0.0.11, 127.0.0.12, ..."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    return f"http://127.0.0.{10 + int(parts.hostname[1:])}:{parts.port}"


def is_listening(url: str) -> bool:
    parts = urlsplit(from_here(url))
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((parts.hostname, parts.port)) == 0
