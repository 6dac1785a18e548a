"""What a step sees is a function of (seed, step)."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_r1reward.data.loader import EpochSampler, is_swapped


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
