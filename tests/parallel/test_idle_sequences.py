"""Leaving out responses without any advantage changes neither the update nor its metrics, and saves their forward and
backward passes, also where a rank has no other responses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from forked_ranks import run_ranks
from parity_layouts import LAYOUTS, SINGLE
from updates import ACTIVE, Updated, update_and_sft_step

pytestmark = pytest.mark.parallel
NOT_COMPARED = ("tokens_per_second", "lr")


@pytest.fixture(scope="module")
def everything(folder: Path, parity_images: tuple[str, ...]) -> Updated:
    return run_ranks(update_and_sft_step, 1, folder, parity_images, SINGLE, {"skip_idle_sequences": False})[0]


def test_any_token_budget_gives_the_same_update(folder, parity_images, everything) -> None:
    """One micro-batch per optimizer step against several."""
    got = run_ranks(update_and_sft_step, 1, folder, parity_images, SINGLE, {}, 100_000)[0]
    assert got.ran == len(ACTIVE)
    for key, weight in everything.weights.items():
        assert np.abs(got.weights[key] - weight).max() < 2e-5, key


@pytest.mark.parametrize("name", ["single", "DP2 distributed optimizer", "PP2 VPP2"])
def test_the_update_is_the_same_without_idle_sequences(name, folder, parity_images, everything) -> None:
    layout = SINGLE if name == "single" else LAYOUTS[name]
    results = run_ranks(update_and_sft_step, layout.ranks, folder, parity_images, layout, {})
    got = results[0]
    assert everything.ran == 8
    kept = {"single": [3], "DP2 distributed optimizer": [3, 2], "PP2 VPP2": [3, 3]}[name]
    assert [rank.ran for rank in results] == kept, "a rank without advantages keeps one sequence per step"
    assert got.metrics["update/idle_sequences"] == 8 - (sum(kept) if "DP2" in name else 3)
    for key in everything.metrics.keys() - {"update/idle_sequences", *NOT_COMPARED}:
        assert got.metrics[key] == pytest.approx(everything.metrics[key], rel=2e-4, abs=1e-6), key
    for key, weight in everything.weights.items():
        assert np.abs(got.weights[key] - weight).max() < 2e-5, key
