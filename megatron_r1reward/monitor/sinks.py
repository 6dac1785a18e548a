"""Where metrics go: console, JSONL, TensorBoard, and the trackers that are optional installs: W&B and MLflow.

A sink is resumed at a step: it then drops what the interrupted run had logged after that step, so that a curve has
one point per step however often the run was stopped.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from megatron_r1reward.files import write_jsonl, write_text
from megatron_r1reward.monitor.metrics import check_metrics
from megatron_r1reward.run_dir import RunDir

# What fits on one line and tells whether a run is healthy, in this order.
HEADLINE = (
    "loss",
    "sft/loss",
    "rm/loss",
    "rm/accuracy",
    "sft/token_accuracy",
    "reward/mean",
    "reward/result",
    "reward/format",
    "heldout/accuracy",
    "response/mean_tokens",
    "mismatch/max_abs",
    "grad_norm",
    "lr",
    "time/step",
)


class MetricSink(Protocol):
    """Takes the metrics of one step. Steps arrive in increasing order, names are known, values are floats."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MonitorSettings(Protocol):
    """The fields of the run file's `[monitor]` section that this package reads."""

    @property
    def tensorboard(self) -> bool: ...
    @property
    def wandb_project(self) -> str | None: ...
    @property
    def mlflow_experiment(self) -> str | None: ...
    @property
    def console_every(self) -> int: ...


class ConsoleSink:
    """One line per step with the headline metrics; never wrapped, so that a log file stays one line per step."""

    def __init__(self, stage: str, *, every: int = 1, console: Console | None = None) -> None:
        self._stage = stage
        self._every = every
        self._console = console or Console()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step % self._every:
            return
        parts = [f"[bold]{self._stage}[/] step {step}"]
        parts += [f"[dim]{name}[/] {metrics[name]:.4g}" for name in HEADLINE if name in metrics]
        self._console.print("  ".join(parts), soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Nothing is held open."""


class JsonlSink:
    """One row per step: `{"step": int, "time": seconds since the epoch, <metric>: number | null, ...}`.

    JSON has no NaN: a value that is not finite is written as null. With `resumed_step` the rows of later steps are
    dropped (atomically); without it an existing file is kept as `<name>.previous` and a new one begins.
    """

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if resumed_step is None:
                path.replace(path.with_name(path.name + ".previous"))
            else:
                truncate(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        row: dict[str, float | None] = {"step": step, "time": time.time()}
        row |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file. A torn last line (the writer was killed) is left out.

    Raises:
        ValueError: a line other than the last is not a row.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number} is not a metrics row ({error}): repair or remove it") from error
    return rows


def truncate(path: Path, last_step: int) -> None:
    """Drop the rows of later steps, atomically."""
    kept = [row for row in read_rows(path) if row["step"] <= last_step]
    write_jsonl(path, kept)


class TensorBoardSink:
    """TensorBoard event files under `directory`; on resume, TensorBoard itself hides the later steps."""

    def __init__(self, directory: Path, *, resumed_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # loads TensorBoard: only where it is asked for

        purge_step = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Monitor:
    """Checks metric names once and passes the metrics of a step to every sink."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises ValueError when a name is not in the table of metrics; then no sink has seen the step."""
        checked = check_metrics(metrics)
        for sink in self._sinks:
            sink.log(step, checked)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def build_monitor(config: MonitorSettings, output_dir: Path, stage: str, *, resumed_step: int | None = None) -> Monitor:
    """The monitor of one stage: console and `metrics.jsonl` always, the others as the run file asks.

    Args:
        config: the run file's `[monitor]` section.
        output_dir: the run directory; `metrics.jsonl` and `tensorboard/` are written into it.
        stage: "sft", "rl", ...: shown on the console, names the run at W&B and MLflow.
        resumed_step: the last step that the loaded checkpoint has done; None starts new curves.

    Raises:
        ValueError: W&B or MLflow is asked for but not installed.
    """
    sinks: list[MetricSink] = [
        ConsoleSink(stage, every=config.console_every),
        JsonlSink(RunDir(root=output_dir).metrics, resumed_step=resumed_step),
    ]
    if config.tensorboard:
        sinks.append(TensorBoardSink(output_dir / "tensorboard", resumed_step=resumed_step))
    if config.wandb_project is not None:
        from megatron_r1reward.monitor.sinks import WandbSink

        sinks.append(WandbSink(config.wandb_project, output_dir, stage, resumed_step=resumed_step))
    if config.mlflow_experiment is not None:
        from megatron_r1reward.monitor.sinks import MlflowSink

        sinks.append(MlflowSink(config.mlflow_experiment, output_dir, stage, resumed_step=resumed_step))
    return Monitor(sinks)


class WandbSink:
    """Weights & Biases; a resumed run continues under its old id."""

    def __init__(self, project: str, output_dir: Path, stage: str, *, resumed_step: int | None = None) -> None:
        wandb = _import_tracker("wandb", extra="wandb", key="monitor.wandb_project")
        id_file = output_dir / "wandb_run_id"
        run_id = _stored_id(id_file) if resumed_step is not None else None
        self._run = wandb.init(
            project=project, name=f"{output_dir.name}-{stage}", dir=str(output_dir), id=run_id, resume="allow"
        )
        _store_id(id_file, self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # W&B ignores a step below its last one: steps replayed after a resume keep their first values.
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """MLflow, at the tracking server that MLflow itself is configured for (MLFLOW_TRACKING_URI)."""

    def __init__(self, experiment: str, output_dir: Path, stage: str, *, resumed_step: int | None = None) -> None:
        mlflow = _import_tracker("mlflow", extra="mlflow", key="monitor.mlflow_experiment")
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient()
        id_file = output_dir / "mlflow_run_id"
        run_id = _stored_id(id_file) if resumed_step is not None else None
        if run_id is None:
            found = self._client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
            run = self._client.create_run(experiment_id, run_name=f"{output_dir.name}-{stage}")
            run_id = str(run.info.run_id)
            _store_id(id_file, run_id)
        self._run_id = run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        rows = [self._metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=rows)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _import_tracker(module: str, *, extra: str, key: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key} is set but {module} is not installed: pip install 'megatron-r1reward[{extra}]' or remove the key"
        ) from error


def _stored_id(path: Path) -> str | None:
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def _store_id(path: Path, run_id: str) -> None:
    write_text(path, run_id + "\n")
