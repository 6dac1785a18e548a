"""The compact checks that a mutant has to pass: a few cases that reach every branch, in seconds."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from kernel_cases import OPTIONS, Result, assert_matches, make_case, relative, run_rows, truth

from megatron_r1reward.kernels.linear_policy_loss import linear_policy_loss
from megatron_r1reward.kernels.policy_loss.from_logits import policy_loss_from_logits
from megatron_r1reward.kernels.policy_loss.options import PolicyLossOptions, TokenInputs, VocabularyShard
from megatron_r1reward.kernels.policy_loss.row_kernels import row_kernels

NAMES = ("everything", "released_filter", "tight_preclip", "k2", "importance", "dual_clip", "entropy")


def check_rows(implementation: str) -> None:
    for number, name in enumerate(NAMES):
        options = OPTIONS[name]
        logits, inputs = make_case(12, 96, options)
        ranks = 2 if number % 2 else 1
        got = run_rows(implementation, logits, inputs, options, ranks=ranks)
        assert_matches(got, truth(logits, inputs, options), gradient_tolerance=5e-6)
    options = OPTIONS["paper"]
    logits, inputs = make_case(12, 96, options)
    advantages = inputs.advantages.clone()
    advantages[1], advantages[2] = math.nan, math.inf
    # A mean far from 0 tells a filter on raw advantages from one on standardised ones.
    inputs = replace(inputs, advantages=advantages * 0.5 + 10.0, standardization=torch.tensor([10.0, 2.0]))
    logits[0] = math.nan  # a masked row
    expected = truth(logits.nan_to_num(), inputs, options)
    assert_matches(run_rows(implementation, logits, inputs, options), expected, gradient_tolerance=5e-6)
    released = PolicyLossOptions(filter="released_code")
    z = torch.tensor([0.0, 2.9, 3.1, -2.9, -1.4, -1.6, 4.4, 4.6, -5.0, 1.0, 0.5, 11.0])
    centred = replace(inputs, advantages=z * 0.5 + 1.5, standardization=torch.tensor([1.5, 2.0]))
    expected = truth(logits.nan_to_num(), centred, released)
    assert_matches(run_rows(implementation, logits, centred, released), expected, gradient_tolerance=5e-6)
    logits[3, 5] = math.nan
    inputs = replace(inputs, advantages=torch.full((12,), 10.5))
    assert int(run_rows(implementation, logits, inputs, options).flags[3]) & 64


def check_masked_nan(implementation: str) -> None:
    options = OPTIONS["everything"]
    logits, inputs = make_case(10, 96, options)
    clean = run_rows(implementation, logits, inputs, options)
    masked = (inputs.weights == 0).nonzero().squeeze(1)
    poisoned = {
        name: getattr(inputs, name).index_fill(0, masked, math.nan)
        for name in ("old_log_probs", "advantages", "reference_log_probs", "sampler_log_probs")
    }
    got = run_rows(implementation, logits.index_fill(0, masked, math.nan), replace(inputs, **poisoned), options)
    for name in ("log_probs", "entropy", "loss", "flags", "gradient"):
        assert torch.equal(getattr(got, name), getattr(clean, name)), name


def check_banned_and_padded(implementation: str) -> None:
    """-inf logits over whole shards; padding columns; several tiles."""
    options = PolicyLossOptions(entropy_coefficient=0.1)
    logits, inputs = make_case(6, 128, options)
    logits[:, 32:96] = -math.inf
    inputs = replace(inputs, targets=inputs.targets % 32, old_log_probs=torch.full((6,), -3.0))
    got = run_rows(implementation, logits, inputs, options, ranks=4)
    assert_matches(got, truth(logits, inputs, options), gradient_tolerance=5e-6)
    memory = torch.full((6, 160), 7.7)
    memory[:, :128] = logits
    view, kernels, shard = memory[:, :144], row_kernels(implementation), VocabularyShard(start=0, width=128)
    read = inputs.weights != 0
    parts = kernels.statistics(view, inputs.targets, read, shard, 1.0)
    assert (parts[:, ~read] == 0).all()
    statistics, loss = kernels.loss(parts[None], inputs, read, options)
    coefficients = loss.grad_log_prob, loss.grad_entropy
    kernels.gradient_(view, inputs.targets, statistics, *coefficients, shard, 1.0, with_entropy=True)
    assert relative(view[:, :128], truth(logits, inputs, options).gradient) < 5e-6
    assert (view[:, 128:] == 0).all()
    options = OPTIONS["entropy"]
    logits, inputs = make_case(3, 8_300, options)
    logits[:, 8_192:] += 12.0  # the peak lies in the second tile
    inputs = replace(inputs, old_log_probs=torch.full((3,), -5.0))
    got = run_rows(implementation, logits, inputs, options)
    assert_matches(got, truth(logits, inputs, options), gradient_tolerance=5e-6)


def check_small_kl(implementation: str) -> None:
    options = PolicyLossOptions(kl_coefficient=1.0, kl_estimator="k3")
    logits, inputs = make_case(4, 64, options)
    exact = logits.double().log_softmax(-1).gather(1, inputs.targets[:, None]).squeeze(1)
    inputs = TokenInputs(
        targets=inputs.targets,
        old_log_probs=exact.float(),
        advantages=torch.zeros(4),
        weights=torch.ones(4),
        reference_log_probs=(exact - torch.tensor([0.01, -0.03, 0.05, -0.5])).float(),
    )
    got, expected = run_rows(implementation, logits, inputs, options), truth(logits, inputs, options)
    torch.testing.assert_close(got.loss.double(), expected.loss, rtol=2e-3, atol=0)
    assert relative(got.gradient, expected.gradient) < 1e-4


def check_autograd() -> None:
    """An upstream factor through every path, the one-launch row kernel of several tiles included."""
    options = OPTIONS["everything"]
    for implementation, vocabulary in (("torch", 96), ("triton", 96), ("triton_row", 17_000)):
        logits, inputs = make_case(6, vocabulary, options)
        leaf = logits.clone().requires_grad_()
        output = policy_loss_from_logits(leaf * 1.0, inputs, options, implementation=implementation)
        (output.total * 0.25).backward()
        got = Result(
            log_probs=output.log_probs,
            entropy=output.entropy,
            loss=output.loss,
            flags=output.flags,
            gradient=leaf.grad / 0.25,
        )
        assert_matches(got, truth(logits, inputs, options), gradient_tolerance=5e-6)


def check_head() -> None:
    options = OPTIONS["paper"]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 8, generator=generator), torch.randn(96, 8, generator=generator)
    _, inputs = make_case(12, 96, options)
    expected = truth(hidden.double() @ weight.double().t(), inputs, options)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    (linear_policy_loss(*leaves, inputs, options, chunk_rows=5).total * 0.5).backward()
    assert relative(leaves[0].grad, 0.5 * expected.gradient @ weight.detach().double()) < 1e-5
    assert relative(leaves[1].grad, 0.5 * expected.gradient.t() @ hidden.detach().double()) < 1e-5


def check_far_rows() -> None:
    """Offsets past 2^31 elements: memory that is reserved, and touched only where the rows lie."""
    stride, rows = 2**30 + 64, torch.randn(3, 40).bfloat16()
    far = torch.empty(2 * stride + 40, dtype=torch.bfloat16).as_strided((3, 40), (stride, 1))
    far.copy_(rows)
    kernels, shard = row_kernels("triton"), VocabularyShard(start=0, width=40)
    targets, read, one = torch.tensor([5, 6, 7]), torch.ones(3, dtype=torch.bool), torch.ones(3)
    near_parts, far_parts = (kernels.statistics(x, targets, read, shard, 1.0) for x in (rows, far))
    assert torch.equal(near_parts, far_parts)
    statistics = row_kernels("torch").loss(near_parts[None], make_inputs(targets), read, PolicyLossOptions())[0]
    for x in (rows, far):
        kernels.gradient_(x, targets, statistics, one, 0 * one, shard, 1.0, with_entropy=False)
    assert torch.equal(rows, far)


def make_inputs(targets: torch.Tensor) -> TokenInputs:
    one = torch.ones(len(targets))
    return TokenInputs(targets=targets, old_log_probs=-one, advantages=one, weights=one)


def run() -> None:
    """Raise at the first check that fails."""
    for implementation in ("triton", "torch"):
        check_rows(implementation)
        check_masked_nan(implementation)
        check_banned_and_padded(implementation)
        check_small_kl(implementation)
    check_autograd()
    check_head()
    check_far_rows()
