"""A run with nothing to learn from, under `health.policy = "stop"`: saved on every rank, and ended with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_alarms import CAUSES, FINE, LEARNING

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.training import alarms, resume, rl
from megatron_r1reward.training.loop import run_to_end

STEP = FINE | LEARNING | {"reward/mean": 1.0}
CONTROL: Any = SimpleNamespace(
    **dict.fromkeys(("finished_step", "saving", "saved"), lambda *given: None), stop_requested=lambda: False
)


def state_of(folder: Path, policy: str, *, is_main: bool, step: int = 0) -> Any:
    config = RunConfig.model_validate(
        {
            "run": {"output_dir": folder}, "model": {"path": folder}, "data": {"train": folder / "train.jsonl"},
            "rl": {"steps": 6}, "checkpoint": {"save_every": 100}, "health": {"policy": policy, "patience": 2},
        }
    )  # fmt: skip
    saver = SimpleNamespace(close=lambda: None, poll=lambda: None)
    topology = SimpleNamespace(world_size=1, is_main=is_main, rank=0, decided_by_main=lambda decide: decide())
    return SimpleNamespace(config=config, step=step, topology=topology, saver=saver)


def without_training(monkeypatch: pytest.MonkeyPatch, changed: Callable[[int], Mapping[str, float]]) -> list[int]:
    """Steps are learning but for what is `changed` in them; the steps after which the run is saved."""
    saved: list[int] = []

    def step(state: Any, main: Any, timer: Any) -> dict[str, float]:
        state.step += 1
        return {**STEP, **changed(state.step)}

    monkeypatch.setattr(rl, "train_step", step)
    monkeypatch.setattr(resume, "save", lambda state, **options: saved.append(state.step))
    return saved


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize(("policy", "last"), [("stop", 3), ("warn", 6)])
def test_the_run_saves_and_stops(
    policy: str, last: int, is_main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank decides by itself, from metrics that are the same everywhere."""
    state = state_of(tmp_path, policy, is_main=is_main)
    saved = without_training(monkeypatch, lambda step: CAUSES["no spread"][0] if step > 1 else {})
    if policy == "warn":
        assert run_to_end(state, rl._stage(state, None), CONTROL)
    else:
        with pytest.raises(alarms.SignalGoneError, match=r"saved after step 3; .*nothing to learn from for 2 steps"):
            run_to_end(state, rl._stage(state, None), CONTROL)
    assert saved == [last]


@pytest.mark.parametrize("is_main", [True, False])
def test_a_run_that_goes_on_knows_its_best_step(is_main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those up to the checkpoint; the main rank has the file, the others hear of it."""
    rows = [{"step": 1, "reward/result": 0.9}, {"step": 2, "reward/result": 0.8}, {"step": 3, "reward/result": 1.0}]
    if is_main:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    state = state_of(tmp_path, "stop", is_main=is_main, step=2)
    if not is_main:
        state.topology.decided_by_main = lambda decide: 0.9
    saved = without_training(monkeypatch, lambda step: {"reward/result": 0.2})
    with pytest.raises(alarms.SignalGoneError, match=r"got worse for 2 steps: 20.0 % of the samples are right, 90.0 %"):
        run_to_end(state, rl._stage(state, None), CONTROL)
    assert saved == [4]
