"""Run configurations without files: the models are the shipped configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_r1reward.config.schema import RunConfig

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_config() -> MakeConfig:
    """`make_config("Qwen2.5-VL-7B-Instruct", stage="rl", **{"parallel.tensor_model_parallel_size": 4})`."""

    def make(model: str, stage: str = "sft", **keys: Any) -> RunConfig:
        tree: dict[str, dict[str, Any]] = {
            "run": {"output_dir": "runs/x"},
            "model": {"path": f"models/{model}"},
            "data": {"train": "x.jsonl"},
            "judge": {"model_path": f"models/{model}"},
            stage: {},
        }
        for key, value in keys.items():
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = value
        return RunConfig.model_validate(tree)

    return make
