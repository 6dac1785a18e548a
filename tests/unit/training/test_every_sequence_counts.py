"""Which updates may leave out responses without an advantage; tests/parallel/test_idle_sequences.py runs them."""

from __future__ import annotations

import pytest

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.training.rollout_batch import every_sequence_counts


@pytest.mark.parametrize(
    ("sections", "every"),
    [
        ({}, False),
        ({"algorithm": {"kl_coefficient": 0.1}}, False),  # inside the reward: it is part of the advantage
        ({"algorithm": {"kl_loss_coefficient": 0.1}}, True),
        ({"algorithm": {"entropy_coefficient": 0.01}}, True),
        ({"algorithm": {"skip_idle_sequences": False}}, True),
        ({"moe": {"load_balancing": "aux_loss"}}, True),
        ({"moe": {"z_loss_coefficient": 0.01}}, True),
    ],
)
def test_terms_that_reach_every_token_keep_every_sequence(sections: dict, every: bool) -> None:
    base = {"run": {"output_dir": "unused"}, "model": {"path": "unused"}, "data": {"train": "unused"}}
    assert every_sequence_counts(RunConfig.model_validate(base | sections)) == every
