"""A run with nothing to learn from, under `health.policy = "stop"`: saved on every rank, and ended with the reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_alarms import CAUSES, FINE, LEARNING

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.training import alarms, resume, rl
from megatron_r1reward.training.loop import run_to_end

STEP = FINE | LEARNING | {"reward/mean": 1.0}


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize(("policy", "last"), [("stop", 3), ("warn", 6)])
def test_the_run_saves_and_stops(
    policy: str, last: int, is_main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank decides by itself, from metrics that are the same everywhere."""
    config = RunConfig.model_validate(
        {
            "run": {"output_dir": tmp_path}, "model": {"path": tmp_path}, "data": {"train": tmp_path / "train.jsonl"},
            "rl": {"steps": 6}, "checkpoint": {"save_every": 100}, "health": {"policy": policy, "patience": 2},
        }
    )  # fmt: skip
    saver = SimpleNamespace(close=lambda: None, poll=lambda: None)
    topology = SimpleNamespace(world_size=1, is_main=is_main, rank=0, from_main=lambda value: value)
    state: Any = SimpleNamespace(config=config, step=0, topology=topology, saver=saver)
    saved: list[int] = []

    def step(state: Any, main: Any, timer: Any) -> dict[str, float]:
        state.step += 1
        return STEP | (CAUSES["no spread"][0] if state.step > 1 else {})

    monkeypatch.setattr(rl, "train_step", step)
    monkeypatch.setattr(resume, "save", lambda state, **options: saved.append(state.step))
    nothing = lambda *given: None  # noqa: E731
    control: Any = SimpleNamespace(finished_step=nothing, stop_requested=lambda: False, saving=nothing, saved=nothing)
    if policy == "warn":
        assert run_to_end(state, rl._stage(state, None), control)
    else:
        with pytest.raises(alarms.SignalGoneError, match=r"saved after step 3; .*nothing to learn from for 2 steps"):
            run_to_end(state, rl._stage(state, None), control)
    assert saved == [last]
