"""The chunked LM head against float64 autograd on the whole [rows, vocabulary] tensor."""

from __future__ import annotations

import pytest
import torch

from megatron_r1reward.kernels.linear_log_probs import linear_log_probs


def dense(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = torch.log_softmax(hidden @ weight.t(), dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(101, 16, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(0, 101, (37,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
def test_values_and_gradients_for_every_chunk_size(case, chunk):
    hidden, weight, targets = case
    coefficients = torch.randn(2, 37, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for function, dtype in ((dense, torch.float64), (linear_log_probs, torch.float32)):
        h, w = (x.to(dtype).clone().requires_grad_() for x in (hidden, weight))
        extra = {"chunk_rows": chunk} if function is linear_log_probs else {}
        log_probs, entropy = function(h, w, targets, **extra)
        (coefficients[0].to(dtype) * log_probs + coefficients[1].to(dtype) * entropy).sum().backward()
        results.append((log_probs, entropy, h.grad, w.grad))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=3e-5, rtol=1e-5)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[100.0], [-100.0]], requires_grad=True)
    weight = torch.tensor([[10.0], [-10.0], [0.0]])
    log_probs, entropy = linear_log_probs(hidden, weight, torch.tensor([0, 0]))
    torch.testing.assert_close(log_probs.detach(), torch.tensor([0.0, -2000.0]))
    log_probs.sum().backward()
    assert hidden.grad.isfinite().all()
    assert entropy.isfinite().all()


def test_rows_without_gradient_are_exactly_zero(case):
    hidden, weight, targets = (x.float() if x.is_floating_point() else x for x in case)
    hidden.requires_grad_()
    mask = torch.zeros(37)
    mask[5] = 1.0
    (linear_log_probs(hidden, weight, targets)[0] * mask).sum().backward()
    assert (hidden.grad[mask == 0] == 0).all()
    assert (hidden.grad[5] != 0).any()
