"""A judge that stays away: every rank saves what was trained, and the run stops with the reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.reward.consistency import JudgeDownError
from megatron_r1reward.training import resume, rl
from megatron_r1reward.training.loop import run_to_end


def state_at(step: int, tmp_path: Path) -> Any:
    config = RunConfig.model_validate(
        {
            "run": {"output_dir": tmp_path},
            "model": {"path": tmp_path},
            "data": {"train": tmp_path / "train.jsonl"},
            "rl": {"steps": 10},
            "checkpoint": {"save_every": 4},
        }
    )
    saver = SimpleNamespace(close=lambda: None, poll=lambda: None)
    topology = SimpleNamespace(
        world_size=1, is_main=True, rank=0, from_main=lambda value: value, decided_by_main=lambda decide: decide()
    )
    return SimpleNamespace(config=config, step=step, topology=topology, saver=saver)


def main_rank() -> Any:
    def take(step: int) -> None:
        raise JudgeDownError("no verdict in 6 steps")

    producer = SimpleNamespace(take=take, state=lambda: {"ready": None, "accuracies": "{}"})
    services = SimpleNamespace(pool=None, probe=None)
    timeline = SimpleNamespace(add=lambda *phase: None)
    return SimpleNamespace(services=services, producer=producer, timeline=timeline, monitor=None)


@pytest.mark.parametrize(("step", "saves"), [(6, [6]), (8, [])])  # step 8 has just been saved
def test_the_run_saves_and_stops(step: int, saves: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(resume, "save", lambda state, **options: saved.append(state.step))
    state = state_at(step, tmp_path)
    with pytest.raises(JudgeDownError, match="no verdict in 6 steps"):
        run_to_end(state, rl._stage(state, main_rank()), SimpleNamespace())  # type: ignore[arg-type]
    assert saved == saves


def test_the_reason_reaches_every_rank(tmp_path: Path) -> None:
    """A rank without services raises what the main rank says."""
    said = JudgeDownError("said by the main rank")
    state = state_at(1, tmp_path)
    state.topology = SimpleNamespace(world_size=2, is_main=False, from_main=lambda value: said)
    with pytest.raises(JudgeDownError, match="said by the main rank"):
        rl.take_rollouts(state, None)
