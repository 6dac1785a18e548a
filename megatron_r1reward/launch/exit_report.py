"""How a life ended: exit codes, whether another turn helps, and the report that is left."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_r1reward.run_dir import ExitReport, Heartbeat, Outcome, RunDir, RunInfo, last_lines

EXIT_STALLED = 70  # no progress within cluster.stall_timeout_s
EXIT_UNFINISHED = 71  # a component left with exit code 0, but its work was not done
EXIT_LOST_NODE = 72  # a node stopped answering, and the job was not requeued
EXIT_TIME = 73  # the time limit is reached and another turn would not help
_TURNS_WITHOUT_PROGRESS = 3


class LifeEndedError(Exception):
    """Why this life is over."""

    def __init__(self, outcome: Outcome, code: int, reason: str, component: str | None = None) -> None:
        super().__init__(reason)
        self.outcome: Outcome = outcome
        self.code = code
        self.reason = reason
        self.component = component


def another_turn(
    end: LifeEndedError,
    run: RunDir,
    life: int,
    heartbeat: Heartbeat | None,
    *,
    resumes: bool,
    requeues: bool,
    late: bool,
) -> LifeEndedError:
    """The end itself where another turn brings the stage further, else a failure that says why not.

    Args:
        end: one whose outcome is "requeue".
        resumes: the stage continues from checkpoints; requeues: it gets further by being started again.
        late: the time limit is near.
    """
    if not requeues and late:
        return LifeEndedError(
            "failed",
            EXIT_TIME,
            "the time limit is reached, and this stage starts from the beginning each time: ask for more time (--time)",
        )
    if resumes and (turns := _turns_without_progress(run, life, heartbeat)) >= _TURNS_WITHOUT_PROGRESS:
        return LifeEndedError(
            "failed",
            EXIT_TIME,
            f"{turns} turns in a row ended without a new checkpoint ({end.reason}): one step and a save do not fit "
            "into the time that is left after starting; ask for more time (--time)",
        )
    return end


def _turns_without_progress(run: RunDir, life: int, heartbeat: Heartbeat | None) -> int:
    """How many lives in a row, this one included, have left the newest checkpoint where it was."""
    saved = heartbeat.saved_step if heartbeat is not None else None
    first = heartbeat.first_step if heartbeat is not None else None
    if saved is not None and first is not None and saved > first:
        return 0
    turns = 1
    for number in range(life - 1, -1, -1):
        earlier = ExitReport.read(run.life_report(number))
        if earlier is None or earlier.outcome != "requeue" or saved not in (None, earlier.saved_step):
            break
        turns += 1
    return turns


def write_report(end: LifeEndedError, run: RunDir, info: RunInfo, heartbeat: Heartbeat | None) -> ExitReport:
    """Leave `exit.json`, for this life and as the run's latest."""
    path = _log_of(run, info.life, end.component) if end.component is not None else None
    report = ExitReport(
        outcome=end.outcome,
        code=end.code,
        reason=end.reason,
        life=info.life,
        time=time.time(),
        component=end.component,
        log=str(path.relative_to(run.root)) if path is not None else None,
        log_tail=last_lines(path) if path is not None else (),
        job_id=info.job_id,
        step=heartbeat.step if heartbeat is not None else None,
        saved_step=heartbeat.saved_step if heartbeat is not None else None,
    )
    report.write(run.life_report(info.life))
    report.write(run.exit_report)
    return report


def _log_of(run: RunDir, life: int, component: str) -> Path:
    """The component's log; where it never came to write one, what srun had to say."""
    path = run.log(life, component)
    messages = path.with_suffix(".srun.log")
    return path if path.exists() and path.stat().st_size else messages if messages.exists() else path
