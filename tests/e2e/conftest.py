"""One real vLLM server for the whole session, and the transformers model that says what it should answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from reference import SERVER, Reference

from megatron_r1reward.demo.digits import build_digits
from megatron_r1reward.parallel import setup
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.rollout.open_pool import open_rollout_pool
from megatron_r1reward.rollout.pool import RolloutPool


@pytest.fixture(scope="session")
def reference(tiny_folder: Path) -> Reference:
    return Reference(tiny_folder)


@pytest.fixture(scope="session")
def shared_pool(
    tiny_folder: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RolloutPool]:
    """A pool with one server of `tiny_folder`. A test that pushes weights pushes the original ones afterwards."""
    logs = tmp_path_factory.mktemp("server-logs")
    with open_rollout_pool(
        SERVER,
        model_path=tiny_folder,
        tokenizer=reference.tokenizer,
        log_dir=logs,
        media_roots=[Path("/")],
        in_flight=True,
    ) as pool:
        yield pool


@pytest.fixture(scope="module")
def original_weights_afterwards(shared_pool: RolloutPool, reference: Reference) -> Iterator[None]:
    yield
    shared_pool.push_weights(*reference.weights(), version=0)


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    from megatron_r1reward.config.schema import ParallelSection

    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits."""
    folder = tmp_path_factory.mktemp("digits")
    build_digits(folder, seed=0, sft_rows=8, pool_rows=24, heldout_pairs=4, judge_rows=8, categories=("digit",))
    return folder
