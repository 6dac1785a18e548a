from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from megatron_r1reward.config.schema import MonitorSection
from megatron_r1reward.monitor.sinks import ConsoleSink, JsonlSink, Monitor, TensorBoardSink, build_monitor, read_rows

QUIET = MonitorSection(tensorboard=False)


def log_steps(monitor: Monitor, steps: range, offset: float = 0.0) -> None:
    for step in steps:
        monitor.log(step, {"loss": step + offset})
    monitor.close()


def test_rows_have_step_time_and_metrics(tmp_path: Path) -> None:
    log_steps(build_monitor(QUIET, tmp_path, "sft"), range(1, 4))
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == [1.0, 2.0, 3.0]
    assert all(row["time"] > 1e9 for row in rows)


def test_rows_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log(1, {"loss": 0.5})
    assert read_rows(tmp_path / "metrics.jsonl")[0]["loss"] == 0.5
    sink.close()


def test_resuming_leaves_one_row_per_step(tmp_path: Path) -> None:
    log_steps(build_monitor(QUIET, tmp_path, "rl"), range(1, 8))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 8, "lo')  # killed while writing
    log_steps(build_monitor(QUIET, tmp_path, "rl", resumed_step=5), range(6, 10), offset=100.0)
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [
        *((step, float(step)) for step in range(1, 6)),
        *((step, step + 100.0) for step in range(6, 10)),
    ]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_fresh_run_keeps_the_old_curves_aside(tmp_path: Path) -> None:
    log_steps(build_monitor(QUIET, tmp_path, "rl"), range(1, 4))
    log_steps(build_monitor(QUIET, tmp_path, "rl"), range(1, 2), offset=9.0)
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [10.0]
    assert len(read_rows(tmp_path / "metrics.jsonl.previous")) == 3


def test_torn_last_line_is_tolerated_and_a_broken_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo')
    assert [row["step"] for row in read_rows(path)] == [1]
    path.write_text('{"step": 1}\ngarbage\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not a metrics row"):
        read_rows(path)


def test_values_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    monitor = build_monitor(QUIET, tmp_path, "rl")
    monitor.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-6})
    monitor.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (row["loss"], row["grad_norm"], row["lr"]) == (None, None, 1e-6)


def test_unknown_metric_reaches_no_sink(tmp_path: Path) -> None:
    monitor = build_monitor(QUIET, tmp_path, "rl")
    with pytest.raises(ValueError, match="not in the table"):
        monitor.log(1, {"loss": 1.0, "losss": 1.0})
    monitor.close()
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_console_prints_one_line_every_n_steps() -> None:
    stream = io.StringIO()
    sink = ConsoleSink("rl", every=5, console=Console(file=stream, width=40))
    for step in range(1, 11):
        sink.log(step, {"loss": 0.123456, "reward/mean": 1.5, "grad_norm": 2.0, "lr": 1e-6, "time/step": 3.25})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("rl step 5  loss 0.1235  reward/mean 1.5")


def test_tensorboard_has_the_curves_and_hides_replayed_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps, offset in ((None, range(1, 6), 0.0), (3, range(4, 7), 100.0)):
        sink = TensorBoardSink(tmp_path, resumed_step=resumed)
        for step in steps:
            sink.log(step, {"loss": step + offset})
        sink.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 2), (3, 3), (4, 104), (5, 105), (6, 106)]


@pytest.mark.parametrize(
    ("section", "package"),
    [({"wandb_project": "p"}, "wandb"), ({"mlflow_experiment": "e"}, "mlflow")],
)
def test_a_tracker_that_is_not_installed_is_a_clear_error(
    section: dict[str, str], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail even where it is installed
    with pytest.raises(ValueError, match=rf"monitor\.{next(iter(section))}.*{package} is not installed: pip install"):
        build_monitor(MonitorSection(tensorboard=False, **section), tmp_path, "rl")  # type: ignore[arg-type]


class RecordingTracker(ModuleType):
    """Stands in for the optional packages: records what their documented calls would have sent."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.sent: list[object] = []
        self.started: list[str | None] = []
        self.entities = SimpleNamespace(Metric=lambda *fields: fields)
        self.MlflowClient = lambda: self

    def init(self, *, id: str | None, **_: object) -> object:
        self.started.append(id)
        log = lambda metrics, step: self.sent.append((step, metrics))  # noqa: E731
        return SimpleNamespace(id=id or "wandb-1", log=log, finish=lambda: self.sent.append("finished"))

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return "experiment-1"

    def create_run(self, experiment_id: str, *, run_name: str) -> object:
        self.started.append(run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="mlflow-1"))

    def log_batch(self, run_id: str, *, metrics: list[tuple[str, float, int, int]]) -> None:
        self.sent += [(step, {name: value}) for name, value, _, step in metrics]

    def set_terminated(self, run_id: str) -> None:
        self.sent.append("finished")


@pytest.mark.parametrize(("key", "package"), [("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")])
def test_a_resumed_run_goes_on_in_the_same_tracker_run(
    key: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = RecordingTracker(package)
    monkeypatch.setitem(sys.modules, package, tracker)
    section = MonitorSection(tensorboard=False, **{key: "name"})  # type: ignore[arg-type]
    log_steps(build_monitor(section, tmp_path, "rl"), range(1, 2))
    log_steps(build_monitor(section, tmp_path, "rl", resumed_step=1), range(2, 3))
    assert tracker.sent == [(1, {"loss": 1.0}), "finished", (2, {"loss": 2.0}), "finished"]
    resumed_as = tracker.started[1:]
    assert resumed_as == (["wandb-1"] if package == "wandb" else [])
    assert (tmp_path / f"{package}_run_id").read_text().strip() == f"{package}-1"
