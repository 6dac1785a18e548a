"""Back to the last good checkpoint with a lower learning rate, where the learning signal is gone (`health.policy =
"rollback"`).

    alarm -> the newest checkpoint whose weights still sampled a step without it -> later ones are removed
          -> written down in checkpoints/rollbacks.json -> loaded, rate lowered, trained on from there

A checkpoint says how many rollbacks it has seen; the rates of those that it has not seen are lowered when it is loaded.
So a run that is killed at any moment goes on as it would have.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_r1reward.checkpoint.dist import LATEST, describe_problem, step_of
from megatron_r1reward.files import read_json, write_text
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training.alarms import SignalGoneError, steps_ahead
from megatron_r1reward.training.state import TrainState

log = logging.getLogger(__name__)
FILE = "rollbacks.json"


class RollBackError(Exception):
    """Raised on all ranks: the signal has been gone since step `began`."""

    def __init__(self, reason: str, *, began: int, step: int) -> None:
        super().__init__(reason)
        self.reason, self.began, self.step = reason, began, step


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """One entry of `rollbacks.json`."""

    step: int  # after which the alarm was raised
    began: int  # the first step of it
    to: int  # the step of the checkpoint that was loaded
    factor: float  # of the learning rate
    reason: str
    done: bool = False  # later checkpoints are removed


def history(root: Path, topology: Topology) -> tuple[Rollback, ...]:
    """The rollbacks of this run so far; one that was interrupted is completed. Collective."""

    def read() -> tuple[Rollback, ...]:
        found = tuple(Rollback(**entry) for entry in read_json(root / FILE)) if (root / FILE).is_file() else ()
        if found and not found[-1].done:
            found = _complete(root, found)
        return found

    return topology.decided_by_main(read)


def roll_back(state: TrainState, alarm: RollBackError) -> None:
    """Make the last good checkpoint the newest one; it is loaded by `resume.resume`. Collective.

    Raises:
        SignalGoneError: it was tried often enough, or there is no such checkpoint.
    """
    config, root = state.config, state.saver.root
    state.saver.poll(blocking=True)
    past = history(root, state.topology)
    if len(past) >= config.health.max_rollbacks:
        raise SignalGoneError(
            f"{alarm.reason}; rolled back {len(past)} times (health.max_rollbacks), and it came again: mend the "
            "cause, or lower optimizer.lr in a new run; checkpoints/rollbacks.json tells what was tried"
        )
    last = alarm.began - 2 - steps_ahead(config)  # its weights sampled the step before the alarm began

    def choose() -> tuple[Rollback, ...] | None:
        good = (f for f in sorted(root.glob("step-????????"), reverse=True) if step_of(f) <= last)
        folder = next((f for f in good if describe_problem(f) is None), None)
        if folder is None:
            return None
        entry = Rollback(
            step=alarm.step,
            began=alarm.began,
            to=step_of(folder),
            factor=config.health.rollback_factor,
            reason=alarm.reason,
        )
        _write(root, (*past, entry))
        return _complete(root, (*past, entry))

    now = state.topology.decided_by_main(choose)
    if now is None:
        raise SignalGoneError(
            f"{alarm.reason}; there is no checkpoint of step {last} or earlier to go back to: lower "
            f"checkpoint.save_every (now {config.checkpoint.save_every})"
        )
    log.warning(
        "step %d: %s; going back to step %d, the learning rate is multiplied by %g (rollback %d of at most %d)",
        alarm.step,
        alarm.reason,
        now[-1].to,
        now[-1].factor,
        len(now),
        config.health.max_rollbacks,
    )


def lower_rate(state: TrainState, unseen: Sequence[Rollback]) -> None:
    """Multiply the checkpoint's learning rate, the policy's or its critic's, by the factors of the rollbacks that it
    has not seen."""
    factor, scheduler = math.prod(entry.factor for entry in unseen), state.scheduler
    scheduler.max_lr *= factor
    scheduler.min_lr *= factor
    for group in state.optimizer.param_groups:
        group["max_lr"], group["min_lr"] = scheduler.max_lr, scheduler.min_lr
    scheduler.step(increment=0)


def _complete(root: Path, entries: tuple[Rollback, ...]) -> tuple[Rollback, ...]:
    """Remove the checkpoints after the one that the last entry goes back to."""
    to = entries[-1].to
    for folder in sorted(root.glob("step-????????"), reverse=True):
        if step_of(folder) > to:
            shutil.rmtree(folder)
    write_text(root / LATEST, f"step-{to:08d}", durable=True)
    done = (*entries[:-1], replace(entries[-1], done=True))
    _write(root, done)
    return done


def _write(root: Path, entries: Sequence[Rollback]) -> None:
    write_text(root / FILE, json.dumps([asdict(entry) for entry in entries], indent=2) + "\n", durable=True)
