"""The profiler hook: which steps and ranks it records. tests/parallel/test_qwen3_vl_training.py profiles a real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_r1reward.config.schema import ProfileSection
from megatron_r1reward.training.loop import StepProfiler


def run(section: ProfileSection, folder: Path, *, rank: int = 0, steps: int = 4) -> list[str]:
    """The traces of a run of `steps` steps."""
    profiler = StepProfiler(section, output_dir=folder, rank=rank)
    for number in range(1, steps + 1):
        with profiler.step(number):
            torch.ones(8, 8) @ torch.ones(8, 8)
    return sorted(path.name for path in (folder / "profile").glob("*"))


def test_chosen_steps_of_chosen_ranks_are_traced(tmp_path: Path) -> None:
    section = ProfileSection(start_step=2, steps=2, ranks=(1,))
    assert run(section, tmp_path, rank=0) == []
    assert run(section, tmp_path, rank=1) == ["rank1-step2.json", "rank1-step3.json"]
    trace = json.loads((tmp_path / "profile" / "rank1-step2.json").read_text())
    assert "aten::mm" in {event.get("name") for event in trace["traceEvents"]}


def test_without_a_first_step_nothing_is_traced(tmp_path: Path) -> None:
    assert run(ProfileSection(), tmp_path) == []


def test_an_error_inside_a_profiled_step_is_not_swallowed(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileSection(start_step=1), output_dir=tmp_path, rank=0)
    with pytest.raises(RuntimeError, match="inside"), profiler.step(1):
        raise RuntimeError("inside")
    with profiler.step(2):
        pass


def test_nsight_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU")
    with pytest.raises(ValueError, match="there is no GPU: use 'torch'"):
        StepProfiler(ProfileSection(start_step=1, tool="nsys"), output_dir=tmp_path, rank=0)
    StepProfiler(ProfileSection(tool="nsys"), output_dir=tmp_path, rank=0)  # nothing is recorded: nothing is needed
