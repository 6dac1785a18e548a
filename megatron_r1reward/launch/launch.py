"""`r1reward launch`: one life of a stage under a supervisor, in a Slurm job or on this machine."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_r1reward.cluster.placement import (
    DRIVERS,
    Placement,
    Stage,
    asks_judge,
    place,
    servers_of,
    this_machine,
)
from megatron_r1reward.cluster.slurm import SlurmJob, is_running
from megatron_r1reward.cluster.step_environment import rank_of
from megatron_r1reward.config.load import load_config
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.launch.addresses import components
from megatron_r1reward.launch.local_steps import LocalLauncher
from megatron_r1reward.launch.slurm_steps import SlurmLauncher
from megatron_r1reward.launch.stage_models import check_models, check_settings
from megatron_r1reward.launch.steps import StepLauncher, describe
from megatron_r1reward.launch.supervisor import Closeable, Plan, Supervisor
from megatron_r1reward.network.tokens import TOKEN_VARIABLE, new_token, token_from
from megatron_r1reward.run_dir import EXIT_REQUEUE, ExitReport, RunDir, RunInfo

log = logging.getLogger(__name__)
_REQUEUE_PATIENCE_S = 120.0  # how long Slurm may take to end this script after it agreed to requeue the job


def launch(stage: Stage, run_file: Path, overrides: Sequence[str], *, local: bool) -> int:
    """Run one life of the stage; returns its exit code: 0 done, 75 saved and stopped, anything else a failure.

    Inside a Slurm job the components are job steps on its nodes, unless `local`; elsewhere processes of this machine.

    Raises:
        ValueError: the run file cannot be used, the stage does not fit on these nodes, or the run directory is in use.
    """
    config = load_config(run_file, overrides)
    check_settings(config, stage)  # before it claims the run's folder
    run = RunDir(root=config.run.output_dir)
    job = None if local or "SLURM_JOB_ID" not in os.environ else SlurmJob(os.environ)
    _claim(run, job)
    life = (run.lives() or [-1])[-1] + 1
    run.logs(life).mkdir(parents=True)
    handler = _log_to(run.log(life, "supervisor"))
    try:
        check_models(config, stage)
        return _supervise(stage, run_file, overrides, config, run, job, life)
    except Exception as error:
        # Also what goes wrong before anything is started must be found where one looks for it.
        reason = f"{type(error).__name__}: {error}"
        report = ExitReport(outcome="failed", code=2, reason=reason, life=life, time=time.time())
        report.write(run.life_report(life))
        report.write(run.exit_report)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def needs_supervisor(config: RunConfig, stage: Stage) -> bool:
    """Whether the stage consists of several processes on this machine, and nobody (torchrun, srun) has started them."""
    if rank_of(os.environ) is not None:
        return False
    ranks = config.run.local_ranks if DRIVERS[stage] == "trainer" else 1
    return stage == "rl" or ranks > 1 or sum(servers_of(config, stage).values()) > 0


def _supervise(
    stage: Stage,
    run_file: Path,
    overrides: Sequence[str],
    config: RunConfig,
    run: RunDir,
    job: SlurmJob | None,
    life: int,
) -> int:
    site = job.site() if job is not None else this_machine()
    placements = place(config, stage, site)
    info = RunInfo(
        stage=stage,
        life=life,
        launcher="slurm" if job is not None else "local",
        host=socket.gethostname(),
        pid=os.getpid(),
        started=time.time(),
        ends=job.ends() if job is not None else None,
        job_id=job.job_id if job is not None else None,
        slurm_restarts=job.restarts if job is not None else 0,
        components=tuple(placement.component for placement in placements),
    )
    info.write(run.run_info)
    log.info("%s in %s, life %d\n%s", stage, run.root, life, describe(placements))
    token = _server_token(config, stage)
    launcher: StepLauncher = LocalLauncher(run, token=token)
    if job is not None:
        launcher = SlurmLauncher(run, job, config.cluster, site, token=token)
    command = _Commands(stage, run_file, overrides, config, info)
    plan = Plan(
        info=info,
        placements=placements,
        command=command,
        startup_timeout_s=max(config.rollout.startup_timeout_s, config.judge.startup_timeout_s) + 60,
        resumes=DRIVERS[stage] == "trainer",
        requeues=stage != "eval",
        finished=lambda: DRIVERS[stage] != "trainer" or run.done.exists(),
        watch=_watcher(config, stage, token),
        drains=stage == "serve",
    )
    report = Supervisor(run, config.cluster, plan, launcher).run()
    _tell(report, run)
    if report.outcome == "requeue" and job is not None and config.cluster.requeue:
        refusal = launcher.requeue()
        if refusal is None:
            log.info("job %s is queued again and will continue", job.job_id)
            time.sleep(_REQUEUE_PATIENCE_S)  # Slurm ends this script
        else:
            log.error("not queued again: %s", refusal)
    return report.code


def _server_token(config: RunConfig, stage: Stage) -> str:
    """What the servers of this run ask for and its driver sends; a new one unless the environment gives it.

    Raises:
        ValueError: a judge is shared between jobs, and the environment does not give both the same token.
    """
    token = token_from(TOKEN_VARIABLE)
    shares = asks_judge(config, stage) and config.cluster.shared_judge is not None
    if token is None and (stage == "judge" or shares):
        raise ValueError(
            f"a judge that several jobs share needs a token that all of them know: submit each with the same "
            f"{TOKEN_VARIABLE}, e.g. from `openssl rand -hex 32`"
        )
    return token or new_token()


def _watcher(config: RunConfig, stage: Stage, token: str) -> Callable[[], Closeable] | None:
    """Looks after the servers of a stage without a driver: judges that other jobs use."""
    if stage != "judge":
        return None

    def watch() -> Closeable:
        from megatron_r1reward.servers.group import ServerGroup  # needs httpx, which other supervisors do without

        return ServerGroup(
            config.judge,
            name="judge",
            servers=components(config, stage, "judge", token=token),
            served_name=config.judge.model or "judge",
            status_file=RunDir(root=config.run.output_dir).servers("judge"),
        )

    return watch


class _Commands:
    """The command line of each component."""

    def __init__(
        self, stage: Stage, run_file: Path, overrides: Sequence[str], config: RunConfig, info: RunInfo
    ) -> None:
        in_image = info.launcher == "slurm" and config.cluster.container_image is not None
        self._cli = [config.cluster.container_python if in_image else sys.executable, "-m", "megatron_r1reward.cli"]
        self._rest = [str(run_file), *overrides]
        self._stage: Stage = stage
        self._life = info.life

    def __call__(self, placement: Placement, start: int) -> list[str]:
        if placement.kind == "driver":
            return [*self._cli, "worker", self._stage, *self._rest]
        which = ["--life", str(self._life), "--start", str(start)]
        return [*self._cli, "server", *which, self._stage, placement.kind, str(placement.index), *self._rest]


def _claim(run: RunDir, job: SlurmJob | None) -> None:
    """Empty `live/` for a new life.

    Raises:
        ValueError: another supervisor is at work in this run directory.
    """
    earlier = RunInfo.read(run.run_info)
    if earlier is not None and not run.life_report(earlier.life).exists() and _is_alive(earlier, job):
        who = f"job {earlier.job_id}" if earlier.job_id else f"process {earlier.pid} on {earlier.host}"
        raise ValueError(f"{run.root} is in use by {who}: wait for it, end it, or choose another run.output_dir")
    shutil.rmtree(run.live, ignore_errors=True)
    run.live.mkdir(parents=True)
    run.exit_report.unlink(missing_ok=True)
    run.done.unlink(missing_ok=True)


def _is_alive(info: RunInfo, job: SlurmJob | None) -> bool:
    if info.job_id is not None:
        if shutil.which("squeue") is None:
            return False
        return (job is None or job.job_id != info.job_id) and is_running(info.job_id)
    if info.host != socket.gethostname() or info.pid == os.getpid():
        return False
    try:  # the number may belong to something else by now
        return b"r1reward" in Path(f"/proc/{info.pid}/cmdline").read_bytes()
    except OSError:
        return False


def _log_to(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler


def _tell(report: ExitReport, run: RunDir) -> None:
    """The last lines of the supervisor's log: what happened, in the words of the component that it happened to."""
    if report.log_tail:
        log.error("the end of %s:\n%s", run.root / (report.log or ""), "\n".join(f"  | {x}" for x in report.log_tail))
    level = logging.ERROR if report.outcome == "failed" else logging.INFO
    again = "; start the same command again to continue" if report.code == EXIT_REQUEUE else ""
    log.log(level, "%s: %s (exit code %d%s)", report.outcome, report.reason, report.code, again)
