"""Job steps through srun. The traps behind each flag are named where it is set."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_r1reward.cluster.placement import Placement, Site
from megatron_r1reward.cluster.slurm import SlurmJob, run_tool, silent_nodes
from megatron_r1reward.cluster.step_environment import clean_environment
from megatron_r1reward.config.schema import ClusterSection
from megatron_r1reward.launch.steps import StepEnd, code_of, name_of
from megatron_r1reward.network.tokens import TOKEN_VARIABLE
from megatron_r1reward.run_dir import RunDir

log = logging.getLogger(__name__)

# $1: where the first task publishes the step's id. Signals go to steps: SIGTERM to srun would kill the tasks at once.
# $2: the step's job, which in a heterogeneous job is not what SLURM_JOB_ID says.
# $3: which of the visible GPUs to keep ("3,4"), for steps that share a node's GPUs.
_BEGIN = """
if [ "$SLURM_PROCID" = 0 ]; then printf "%s.%s\\n" "$2" "$SLURM_STEP_ID" >"$1.tmp" && mv "$1.tmp" "$1"; fi
if [ -n "$3" ]; then CUDA_VISIBLE_DEVICES=$(printf %s "$CUDA_VISIBLE_DEVICES" | cut -d, -f"$3"); fi
shift 3; exec "$@"
"""
_FAILURE = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.*)")
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_SIGNALS = {
    str(signal.strsignal(number)): number
    for number in (*_CRASHES, signal.SIGKILL, signal.SIGABRT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
}  # srun's words for them
_PROBE_TIMEOUT_S = 30.0


class SlurmStep:
    """One srun and the step that it holds."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], step_file: Path, messages: Path, begin: int
    ) -> None:
        self.name = name
        self._process = process
        self._step_file = step_file
        self._messages = messages
        self._begin = begin

    def poll(self) -> StepEnd | None:
        returncode = self._process.poll()
        if returncode is None:
            return None
        code = code_of(returncode)
        first = first_failure(self._messages.read_bytes()[self._begin :].decode(errors="replace"))
        if code and first is not None:
            return first
        return StepEnd(code=code, what=f"its srun {name_of(code)}")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        step = self._step_file.read_text().strip() if self._step_file.exists() else ""
        if not step or not self.running:
            return
        try:
            run_tool("scancel", "-Q", "-s", number.name.removeprefix("SIG"), step)
        except ValueError as error:  # it ended meanwhile
            log.debug("%s: %s", self.name, error)

    def kill(self) -> None:
        if self.running:
            self._process.terminate()  # srun: SIGKILL to its tasks, then it leaves
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()


def first_failure(messages: str) -> StepEnd | None:
    """The task that failed by itself, as far as srun's messages tell; its own exit code is the largest of all, so often
    a victim's. That is the first one, unless another crashed in a way that the end of a peer brings about in nobody:
    whoever lost its connection to it may have left before Slurm had seen it die."""
    crashes, others = [], []
    for match in _FAILURE.finditer(messages):
        node, tasks, what = match.groups()
        task = f"task {tasks} on {node}"
        if exited := re.match(r"Exited with exit code (\d+)", what):
            others.append(StepEnd(code=int(exited[1]), what=f"{task} {name_of(int(exited[1]))}"))
        elif what.startswith("Out Of Memory"):
            crashes.append(StepEnd(code=128 + signal.SIGKILL, what=f"{task} ran out of memory: raise the job's --mem"))
        elif number := next((number for text, number in _SIGNALS.items() if what.startswith(text)), None):
            ends = crashes if number in _CRASHES else others
            ends.append(StepEnd(code=128 + number, what=f"{task} {name_of(128 + number)}"))
    return next(iter(crashes + others), None)


class SlurmLauncher:
    """Starts steps inside this job's allocation."""

    def __init__(self, run: RunDir, job: SlurmJob, section: ClusterSection, site: Site, *, token: str) -> None:
        self._run = run
        self._token = token
        self._job = job
        self._section = section
        self._heterogeneous = len(site.groups) > 1
        self._has_gpus = any(node.gpus for group in site.groups for node in group)
        self._nodes: set[tuple[int | None, str]] = set()

    def start(self, placement: Placement, command: Sequence[str], log: Path) -> SlurmStep:
        part = placement.component
        log.parent.mkdir(parents=True, exist_ok=True)
        group = placement.group if self._heterogeneous else None
        self._nodes |= {(group, node) for node in part.nodes}
        step_file = self._run.step_id(part.name)
        job = self._job.id_of_group(placement.group)
        shares = placement.overlap and placement.kind != "driver"
        keep = ",".join(str(gpu + 1) for gpu in placement.gpu_ids) if shares else ""
        messages = log.with_suffix(".srun.log")
        with messages.open("ab") as handle:
            begin = handle.tell()  # what was said about an earlier start of it is another step's
            process = subprocess.Popen(
                [*self.srun(placement, log), "sh", "-c", _BEGIN, "step", str(step_file), job, keep, *command],
                env=clean_environment(os.environ) | {TOKEN_VARIABLE: self._token},
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=handle,
                start_new_session=True,  # a Ctrl-C meant for the supervisor must not reach srun
            )
        return SlurmStep(part.name, process, step_file, messages, begin)

    def srun(self, placement: Placement, log: Path) -> list[str]:
        """srun's own arguments for one step."""
        part = placement.component
        nodes = len(part.nodes)
        # --overlap gives steps the same GPUs, --exact disjoint ones; without either, steps run one after the other.
        command = ["srun", "--overlap" if placement.overlap else "--exact"]
        command += ["--mem=0"]  # otherwise the first step takes the job's whole memory and the second waits for it
        command += ["--kill-on-bad-exit=1", "--wait=300", "--export=ALL", "--input=none", "--open-mode=append"]
        command += [f"--job-name={part.name}", f"--nodes={nodes}", f"--ntasks={part.tasks}"]
        command += [f"--ntasks-per-node={part.tasks // nodes}", f"--nodelist={','.join(part.nodes)}"]
        command += [f"--cpus-per-task={placement.cpus_per_task}", f"--output={log}"]
        if part.tasks > 1:
            command += ["--label"]
        if self._heterogeneous:
            command += [f"--het-group={placement.group}"]
        if self._has_gpus:  # 0 hides them from a helper; clusters without GPUs refuse the option
            # Overlapping steps get the node's first GPUs: ask for enough of them and keep some, see _BEGIN.
            gpus = placement.gpu_ids[-1] + 1 if placement.overlap else part.gpus_per_node
            command += [f"--gpus-per-node={gpus}"]
        return [*command, *self._container(), *self._section.srun_args]

    def _container(self) -> list[str]:
        if self._section.container_image is None:
            return []
        here = Path.cwd()
        mounts = [f"{here}:{here}", f"{self._run.root.resolve()}:{self._run.root.resolve()}"]
        return [
            f"--container-image={self._section.container_image}",
            f"--container-mounts={','.join([*mounts, *self._section.container_mounts])}",
            f"--container-workdir={here}",
            "--no-container-mount-home",
        ]

    def lost_nodes(self) -> tuple[str, ...]:
        return silent_nodes(sorted(self._nodes, key=str), _PROBE_TIMEOUT_S)

    def ends(self) -> float | None:
        try:
            return self._job.ends()
        except ValueError as error:  # slurmctld is busy or restarting: the last known answer stays valid
            log.warning("cannot read the job's time limit: %s", error)
            return None

    def why_ending(self) -> str:
        try:
            records = self._job.records()
        except ValueError as error:
            return str(error)
        return f"job {self._job.job_id} is {records[0].state}, reason {records[0].reason}"

    def requeue(self) -> str | None:
        """Slurm then ends this very script; returns once that is under way."""
        try:
            self._job.requeue()
        except ValueError as error:
            return f"{error}; submit the same command again to continue"
        time.sleep(1)
        return None
