"""RL that samples while it trains, with a real server: which weights sampled what, and what a restart repeats."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest
from reference import requests_running
from rl_runs import BATCH, STEPS, config, rows, run
from waiting import wait_until

from megatron_r1reward.monitor.timers import read_timeline
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.rollout.accounting import Accounting
from megatron_r1reward.rollout.pool import GenerateResult, RolloutPool

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("original_weights_afterwards")]


class KilledError(RuntimeError):
    pass


def killed() -> float:
    raise KilledError


def test_one_step_off_overlaps_and_repeats_itself_after_a_kill(
    shared_pool: RolloutPool, tiny_folder: Path, data: Path, topology: Topology, tmp_path: Path
) -> None:
    """Killed after step 3, with a checkpoint of step 2: steps 3 and 4 are those of the run that was left alone.

    No sample is right, so dynamic sampling replaces every prompt once, by what it remembers of the earlier steps.
    """
    again = {"dynamic_sampling_rounds": 1}
    whole = config(tmp_path / "whole", tiny_folder, data, "one_step_off", rl=again)
    account = run(whole, topology, shared_pool)
    assert account.asked == account.answered == 2 * STEPS * BATCH
    expected = rows(whole)
    assert [expected[step]["staleness/max"] for step in range(1, STEPS + 1)] == [0, 1, 1, 1]
    assert [expected[step]["staleness/mean"] for step in range(1, STEPS + 1)] == [0, 1, 1, 1]
    gaps = [expected[step]["mismatch/max_abs"] for step in range(1, STEPS + 1)]
    assert gaps[0] < 1e-3, "the first batch is on-policy"
    assert min(gaps[1:]) > 1e-3, "the weights moved meanwhile"
    timeline = read_timeline(whole.run.output_dir / "timeline.jsonl")
    spans = {(row["step"], row["phase"]): (row["start"], row["end"]) for row in timeline}
    for step in range(1, STEPS):
        generating, training = spans[step + 1, "generate"], spans[step, "log_probs"]
        assert generating[0] < training[1], "the next batch was begun before this one was trained on"
        assert generating[1] <= spans[step, "push"][0], "no request was in flight during the push"

    assert all(row["sampling/resampled"] == row["sampling/uninformative"] == BATCH for row in expected.values())

    broken = config(tmp_path / "broken", tiny_folder, data, "one_step_off", rl=again)
    with pytest.raises(KilledError):
        run(broken, topology, shared_pool, probe=killed)
    run(broken, topology, shared_pool)
    got = rows(broken)
    assert set(got) == set(expected)
    for step, row in expected.items():
        for name in ("loss", "grad_norm", "reward/mean", "response/mean_tokens", "entropy", "staleness/mean",
                     "mismatch/mean_abs", "correction/weight"):  # fmt: skip
            assert got[step][name] == pytest.approx(row[name], rel=2e-3, abs=2e-5), (step, name)


class PushInMidResponse:
    """A pool that holds the fourth batch back until the second push is about to begin, and that push until the
    servers sample this batch: which of the two is faster does not matter."""

    def __init__(self, pool: RolloutPool) -> None:
        self._pool = pool
        self._batches = itertools.count(1)
        self._about_to_push = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def submit(self, *given: Any, **options: Any) -> Future[GenerateResult]:
        if next(self._batches) == 4:
            assert self._about_to_push.wait(120)
        return self._pool.submit(*given, **options)

    def push_weights(self, *given: Any, version: int) -> None:
        if version == 2:
            wait_until(lambda: requests_running(self._pool) == 0)
            self._about_to_push.set()
            wait_until(lambda: requests_running(self._pool) > 0)
        self._pool.push_weights(*given, version=version)


def test_in_flight_switches_weights_in_mid_response(
    shared_pool: RolloutPool, tiny_folder: Path, data: Path, topology: Topology, tmp_path: Path
) -> None:
    settings = config(
        tmp_path / "run", tiny_folder, data, "in_flight", sampling={"max_tokens": 700}, checkpoint={"save_every": 100},
        asynchrony={"batches_ahead": 2, "max_staleness": 2}, rl={"rollout_batch_size": 2, "train_batch_size": 2},
    )  # fmt: skip
    shared_pool.total = Accounting()
    run(settings, topology, cast(RolloutPool, PushInMidResponse(shared_pool)))
    account = shared_pool.total
    assert account.retried == account.withdrawn == 0, "the server lives through it"
    assert account.asked == account.answered == STEPS * 2
    found = rows(settings)
    assert set(found) == set(range(1, STEPS + 1))
    assert max(row["staleness/max"] for row in found.values()) == 2
    assert found[4]["staleness/switched_fraction"] > 0
    assert sum(row["staleness/regenerated"] for row in found.values()) == 0


class PushAfterSampling:
    """A pool whose pushes wait until three batches have been asked for, and until all that was asked for is there."""

    def __init__(self, pool: RolloutPool) -> None:
        self._pool = pool
        self._asked: list[Future[GenerateResult]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def submit(self, *given: Any, **options: Any) -> Future[GenerateResult]:
        self._asked.append(self._pool.submit(*given, **options))
        return self._asked[-1]

    def push_weights(self, *given: Any, version: int) -> None:
        if version > 0:
            wait_until(lambda: len(self._asked) >= 3 and all(asked.done() for asked in self._asked))
        self._pool.push_weights(*given, version=version)


def test_in_flight_samples_again_what_is_too_old(
    shared_pool: RolloutPool, tiny_folder: Path, data: Path, topology: Topology, tmp_path: Path
) -> None:
    """Batches are begun two steps ahead, but only one is allowed. All three are sampled before the first push."""
    settings = config(
        tmp_path / "run", tiny_folder, data, "in_flight", rl={"steps": 3}, checkpoint={"save_every": 100},
        asynchrony={"batches_ahead": 2, "max_staleness": 1},
    )  # fmt: skip
    shared_pool.total = Accounting()
    run(settings, topology, cast(RolloutPool, PushAfterSampling(shared_pool)))
    account = shared_pool.total
    found = rows(settings)
    assert [found[step]["staleness/regenerated"] for step in (1, 2, 3)] == [0, 0, 2 * BATCH]
    assert [found[step]["staleness/max"] for step in (1, 2, 3)] == [0, 1, 0]
    assert account.samples == 2 * 4 * BATCH
    assert found[3]["mismatch/max_abs"] < 1e-3, "by the weights of now"
