"""The files of a run directory: what is written is what is read; half a file is never seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1reward.run_dir import (
    Address,
    Component,
    ExitReport,
    Heartbeat,
    Record,
    RunDir,
    RunInfo,
    StopRequest,
    exists_on_shared,
)

TRAINER = Component(name="trainer", nodes=("n1", "n2"), tasks=4, gpus_per_node=2)
RECORDS = [
    RunInfo(
        stage="rl", life=1, launcher="slurm", host="n1", pid=7, started=1.5, ends=None, job_id="12",
        slurm_restarts=1, components=(TRAINER,),
    ),
    Address(component="judge-0", url="http://n2:8000", served_name="judge", host="n2", ready_at=3.0),
    Heartbeat(component="trainer", host="n1", pid=8, time=2.0, phase="saving", step=3, total_steps=9),
    StopRequest(reason="the time limit is near", time=4.0),
    ExitReport(outcome="failed", code=13, reason="trainer died", life=0, time=5.0, log_tail=("a", "b")),
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_survive_the_disk(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "live" / "record.json"
    record.write(path)
    assert type(record).read(path) == record
    assert [item.name for item in path.parent.iterdir()] == ["record.json"], "no staging file stays"


def test_absent_and_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "stop.json"
    assert StopRequest.read(path) is None
    path.write_text('{"time": 1}')
    with pytest.raises(ValueError, match=r"stop\.json.*reason.*remove it"):
        StopRequest.read(path)


def test_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "stop.json"
    path.write_text(json.dumps({"reason": "x", "time": 1.0, "mood": "good"}))
    assert StopRequest.read(path) == StopRequest(reason="x", time=1.0)


def test_lives_and_addresses_are_in_numerical_order(tmp_path: Path) -> None:
    run = RunDir(root=tmp_path)
    for life in (10, 2, 0):
        run.logs(life).mkdir()
    (tmp_path / "logs-old").mkdir()
    assert run.lives() == [0, 2, 10]
    for index in (10, 9):
        name = f"rollout-{index}"
        Address(component=name, url=f"http://n{index}:1", served_name="policy", host="n", ready_at=0.0).write(
            run.address(name)
        )
    assert [address.url for address in run.addresses("rollout")] == ["http://n9:1", "http://n10:1"]
    assert run.addresses("judge") == []


def test_a_file_is_seen_in_a_fresh_listing(tmp_path: Path) -> None:
    assert not exists_on_shared(tmp_path / "absent" / "file")
    (tmp_path / "file").touch()
    assert exists_on_shared(tmp_path / "file")
