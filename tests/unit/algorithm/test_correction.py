"""Sampler and trainer disagreeing by a known amount."""

import math

import pytest
import torch

from megatron_r1reward.algorithm.correction import mismatch_metrics, truncated_importance_weights


def test_equal_engines_do_not_disagree() -> None:
    log_probs = torch.tensor([-1.0, -0.3])
    gap = mismatch_metrics(log_probs, log_probs, threshold=0.5)
    assert gap == {"mean_abs": 0.0, "max_abs": 0.0, "kl": 0.0, "share_beyond": 0.0}


def test_known_gap() -> None:
    metrics = mismatch_metrics(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -0.9]), threshold=0.4)
    assert metrics["mean_abs"] == pytest.approx(0.3)
    assert metrics["max_abs"] == pytest.approx(0.5)
    assert metrics["share_beyond"] == 0.5
    assert metrics["kl"] == pytest.approx(((math.exp(0.5) - 1 - 0.5) + (math.exp(-0.1) - 1 + 0.1)) / 2, rel=1e-6)


def test_kl_estimates_the_divergence_of_sampler_from_trainer() -> None:
    sampler, trainer = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.6, 0.25, 0.15])
    drawn = torch.multinomial(sampler, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimate = mismatch_metrics(trainer.log()[drawn], sampler.log()[drawn], threshold=0.5)["kl"]
    assert estimate == pytest.approx(float((sampler * (sampler / trainer).log()).sum()), rel=0.05)


def test_what_is_no_number_counts_as_beyond() -> None:
    metrics = mismatch_metrics(torch.tensor([-1.0, math.nan, -math.inf, -2.0]), torch.full((4,), -1.0), threshold=1.0)
    assert metrics["share_beyond"] == 0.5


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        mismatch_metrics(torch.zeros(0), torch.zeros(0), threshold=0.5)


def test_truncated_weights() -> None:
    trainer = torch.tensor([-1.0, -1.0, -1.0, -math.inf], requires_grad=True)
    weights = truncated_importance_weights(trainer, torch.tensor([-1.0, -3.0, -math.inf, -1.0]), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 2.0, 0.0]))
    assert not weights.requires_grad
