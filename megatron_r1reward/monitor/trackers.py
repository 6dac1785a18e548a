"""Experiment trackers that are optional installs: Weights & Biases and MLflow.

Both know a run by an id. The id is kept in the run directory, so that a resumed run goes on in the same curves.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_r1reward.files import write_text


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
