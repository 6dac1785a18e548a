"""What a step sees is a function of (seed, step)."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from megatron_r1reward.data.loader import EpochSampler, is_swapped, seeded_sample
from megatron_r1reward.types import Preference


def test_every_example_once_per_epoch_and_batches_run_across_epochs():
    sampler = EpochSampler(10, seed=3)
    draws = [draw for step in range(5) for draw in sampler.batch(step, 4)]
    assert Counter(draw.index for draw in draws) == dict.fromkeys(range(10), 2)
    assert [draw.epoch for draw in draws] == [0] * 10 + [1] * 10
    assert [draw.index for draw in draws[:10]] != [draw.index for draw in draws[10:]], "a new order each epoch"


def test_a_step_can_be_asked_for_without_the_ones_before():
    assert (
        EpochSampler(7, seed=1).batch(5, 3)
        == [draw for step in range(6) for draw in EpochSampler(7, seed=1).batch(step, 3)][-3:]
    )
    assert EpochSampler(7, seed=1).batch(0, 7) != EpochSampler(7, seed=2).batch(0, 7)


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        EpochSampler(0, seed=0)


def test_swapping_is_fair_repeatable_and_redrawn():
    coins = [is_swapped("random", seed=0, epoch=0, preference_id=str(i)) for i in range(2000)]
    assert 0.45 < sum(coins) / 2000 < 0.55
    assert coins == [is_swapped("random", seed=0, epoch=0, preference_id=str(i)) for i in range(2000)]
    assert coins != [is_swapped("random", seed=0, epoch=1, preference_id=str(i)) for i in range(2000)]
    assert is_swapped("always", seed=0, epoch=0, preference_id="a")
    assert not is_swapped("never", seed=0, epoch=0, preference_id="a")


@pytest.mark.parametrize(("rows", "batch", "epochs"), [(200, 256, 1), (1000, 256, 1), (1000, 256, 3), (512, 256, 2)])
def test_epochs_are_whole_passes(rows: int, batch: int, epochs: int) -> None:
    """200 rows in batches of 256 are one pass, not 1.28 of them."""
    steps = math.ceil(epochs * rows / batch)
    sampler = EpochSampler(rows, seed=0, draws=epochs * rows)
    drawn = Counter(draw.index for step in range(steps) for draw in sampler.batch(step, batch))
    assert set(drawn.values()) == {epochs}
    assert len(drawn) == rows


def test_the_last_batch_has_a_row_for_every_rank() -> None:
    sampler = EpochSampler(9, seed=0, draws=9, at_least=4)
    assert [len(sampler.batch(step, 8)) for step in range(2)] == [8, 4]
    assert len(EpochSampler(9, seed=0).batch(5, 8)) == 8, "without a limit batches are full"


def test_a_sample_is_not_the_beginning_of_the_file() -> None:
    rows = [
        Preference(id=f"{kind}-{i}", question="", responses=("", ""), label=1, image_paths=())
        for kind in "ab"
        for i in range(100)
    ]
    drawn = seeded_sample(rows, 40, seed=0)
    kinds = Counter(row.id[0] for row in drawn)
    assert 10 <= kinds["a"] <= 30
    assert sorted(drawn, key=rows.index) == list(drawn), "in the order of the file"
    assert {row.id for row in drawn} == {row.id for row in seeded_sample(rows[::-1], 40, seed=0)}
    assert {row.id for row in drawn} <= {row.id for row in seeded_sample(rows, 60, seed=0)}
    assert {row.id for row in drawn} != {row.id for row in seeded_sample(rows, 40, seed=1)}
    assert seeded_sample(rows, None, seed=0) == seeded_sample(rows, 1000, seed=0) == tuple(rows)
