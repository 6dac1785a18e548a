"""What ran when, from several threads and over several lives of a run."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from megatron_r1reward.monitor.timers import PhaseTimer, Timeline, read_timeline


def test_phases_of_all_threads_share_one_clock(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "run" / "timeline.jsonl")
    timer = PhaseTimer(on_phase=timeline.add)
    timeline.step = 7
    before = time.time()

    def generate() -> None:
        with timeline.phase("generate", step=8):
            time.sleep(0.01)

    thread = threading.Thread(target=generate)
    with timer.phase("update"):
        thread.start()
        thread.join()
    after = time.time()
    timeline.close()
    generated, updated = read_timeline(tmp_path / "run" / "timeline.jsonl")
    assert (generated["step"], generated["phase"], updated["step"], updated["phase"]) == (8, "generate", 7, "update")
    assert updated["start"] <= generated["start"] < generated["end"] <= updated["end"]
    assert before - 1 < updated["start"] <= updated["end"] < after + 1, "seconds since the epoch"


def test_a_resumed_run_forgets_the_steps_that_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    first = Timeline(path)
    for step in (1, 2, 3):
        first.add("update", 0.0, 1.0, step=step)
    first.close()
    second = Timeline(path, resumed_step=2)
    second.add("update", 2.0, 3.0, step=3)
    second.close()
    assert [row["step"] for row in read_timeline(path)] == [1, 2, 3]
    Timeline(path).close()
    assert read_timeline(path) == []


def test_a_phase_that_raises_is_recorded(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.jsonl")
    with pytest.raises(RuntimeError), timeline.phase("score", step=1):
        raise RuntimeError("judge")
    timeline.close()
    assert [row["phase"] for row in read_timeline(tmp_path / "timeline.jsonl")] == ["score"]


def test_without_a_file_nothing_happens() -> None:
    timeline = Timeline(None)
    timeline.add("update", 0.0, 1.0)
    timeline.close()
