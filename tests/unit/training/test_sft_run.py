"""A whole SFT run of a tiny model: through the loop that it shares with RL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1reward.config.schema import ParallelSection, RunConfig
from megatron_r1reward.parallel import setup
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training import sft


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_where_it_was(tiny_folder: Path, topology: Topology, tmp_path: Path) -> None:
    """Asked to stop after the first step, then started again: the weights of the run that was left alone."""
    rows = [
        {"id": str(number), "message": json.dumps([{"role": "user", "content": f"Which digit? {number}"}]),
         "image": [], "response": f"<think>The image shows {number}.</think><answer>1</answer>"}
        for number in range(8)
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(name: str) -> RunConfig:
        return RunConfig.model_validate(
            {
                "run": {"output_dir": tmp_path / name},
                "model": {"path": tiny_folder, "precision": "fp32"},
                "data": {"train": tmp_path / "train.jsonl", "token_budget": 600},
                "sft": {"steps": 3, "global_batch_size": 4},
                "optimizer": {"lr": 3e-3, "warmup_fraction": 0.0, "schedule": "constant"},
                "checkpoint": {"save_every": 100},
                "monitor": {"tensorboard": False},
            }
        )

    assert sft.run(config("whole"), topology) == tmp_path / "whole" / "hf"
    stop = tmp_path / "stopped" / "live" / "stop.json"
    stop.parent.mkdir(parents=True)
    stop.write_text("{}")
    assert sft.run(config("stopped"), topology) is None
    assert not (tmp_path / "stopped" / "DONE").exists()
    stop.unlink()
    sft.run(config("stopped"), topology)
    for name in ("whole", "stopped"):
        logged = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in logged] == [1, 2, 3]
        assert all(row["time/step"] > 0 and "time/save" in row and "time/heldout" not in row for row in logged)
        assert json.loads((tmp_path / name / "DONE").read_text())["step"] == 3
    weights = [load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
