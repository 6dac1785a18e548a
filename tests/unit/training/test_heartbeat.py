"""What a trainer tells its supervisor, and hears from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.run_dir import Heartbeat, RunDir, StopRequest
from megatron_r1reward.training.heartbeat import RunControl


def topology(rank: int = 0) -> Topology:
    return Topology(
        rank=rank, world_size=1, device=torch.device("cpu"), tensor_parallel_rank=0, tensor_parallel_size=1,
        pipeline_parallel_rank=0, pipeline_parallel_size=1, data_parallel_rank=rank, data_parallel_size=1,
        solo=None,  # type: ignore[arg-type]  # no collective is called
    )  # fmt: skip


def beat(root: Path) -> Heartbeat:
    heartbeat = Heartbeat.read(RunDir(root=root).heartbeat)
    assert heartbeat is not None
    return heartbeat


def test_heartbeats_tell_the_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("megatron_r1reward.training.heartbeat.time.monotonic", lambda: float(next(clock)))
    control = RunControl(tmp_path, topology(), total_steps=9)
    control.loading()
    assert (beat(tmp_path).phase, beat(tmp_path).step, beat(tmp_path).first_step) == ("loading", 0, None)
    control.begin(4, resumed=True)
    assert (beat(tmp_path).phase, beat(tmp_path).first_step, beat(tmp_path).saved_step) == ("training", 4, 4)
    control.finished_step(5)
    control.saving()
    assert (beat(tmp_path).phase, beat(tmp_path).step, beat(tmp_path).longest_step_s) == ("saving", 5, 10)
    control.saved(5)
    assert (beat(tmp_path).saved_step, beat(tmp_path).longest_save_s) == (5, 10)
    control.stopped()
    assert (beat(tmp_path).phase, beat(tmp_path).total_steps) == ("stopped", 9)


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    RunControl(tmp_path, topology(rank=1)).loading()
    assert not RunDir(root=tmp_path).heartbeat.exists()


def test_stop_is_heard(tmp_path: Path) -> None:
    control = RunControl(tmp_path, topology())
    assert not control.stop_requested()
    StopRequest(reason="enough").write(RunDir(root=tmp_path).stop)
    assert control.stop_requested()
