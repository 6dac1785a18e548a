"""Cutting micro-batches further, for schedules that need a certain number of them."""

from __future__ import annotations

import pytest

from megatron_r1reward.training.schedule import complete


@pytest.mark.parametrize(
    ("parts", "multiple", "at_least", "number"),
    [
        ([[0, 1, 2]], 1, 1, 1),
        ([[0, 1, 2], [3]], 4, 1, 4),
        ([[0], [1], [2]], 2, 1, 4),
        ([[0, 1]], 2, 5, 6),
        ([], 2, 1, 2),
    ],
)
def test_the_number_fits_and_every_sequence_stays(parts, multiple, at_least, number) -> None:
    cut = complete(parts, multiple, at_least)
    assert len(cut) == number
    assert sorted(i for part in cut for i in part) == sorted(i for part in parts for i in part)
