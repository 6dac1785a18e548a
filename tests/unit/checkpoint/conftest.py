"""A tiny training state on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.parallel import setup
from megatron_r1reward.parallel.setup import Topology


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"path": str(tiny_folder), "precision": "fp32"},
            "data": {"train": "unused"},
            "optimizer": {"lr": 1e-3},
        }
    )


@pytest.fixture(scope="module")
def topology(config: RunConfig) -> Iterator[Topology]:
    yield setup.initialize(config.parallel, seed=0)
    setup.shutdown()
