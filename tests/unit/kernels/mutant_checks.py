"""The compact checks that a mutant has to pass: a few cases that reach every branch, in seconds."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from kernel_cases import OPTIONS, TEMPERATURES, assert_matches, make_case, relative, run_rows, truth

from megatron_r1reward.kernels.choose_kernel import row_kernels, whole_row_kernel
from megatron_r1reward.kernels.linear_policy_loss import linear_policy_loss
from megatron_r1reward.kernels.lm_head import HeadOptions
from megatron_r1reward.kernels.policy_loss.row_kernels import (
    LogitRows,
    PolicyLossOptions,
    TokenInputs,
    VocabularyShard,
)

NAMES = ("everything", "tight_preclip", "k2", "importance", "dual_clip", "entropy", "k3 bound")


def check_rows(implementation: str) -> None:
    for number, name in enumerate(NAMES):
        options, temperature = OPTIONS[name], TEMPERATURES.get(name, 1.0)
        logits, inputs = make_case(12, 96, temperature=temperature)
        ranks = 2 if number % 2 else 1
        got = run_rows(implementation, logits, inputs, options, ranks=ranks, temperature=temperature)
        assert_matches(got, truth(logits, inputs, options, temperature=temperature), gradient_tolerance=5e-6)
    options = OPTIONS["paper"]
    logits, inputs = make_case(12, 96)
    advantages = inputs.advantages.clone()
    advantages[1], advantages[2] = math.nan, math.inf
    inputs = replace(inputs, advantages=advantages)
    logits[0] = math.nan  # a masked row
    expected = truth(logits.nan_to_num(), inputs, options)
    assert_matches(run_rows(implementation, logits, inputs, options), expected, gradient_tolerance=5e-6)
    logits[3, 5] = math.nan
    inputs = replace(inputs, advantages=torch.full((12,), 1.5))
    assert int(run_rows(implementation, logits, inputs, options).flags[3]) & 64


def check_masked_nan(implementation: str) -> None:
    options = OPTIONS["everything"]
    logits, inputs = make_case(10, 96)
    clean = run_rows(implementation, logits, inputs, options)
    masked = (inputs.weights == 0).nonzero().squeeze(1)
    poisoned = {
        name: getattr(inputs, name).index_fill(0, masked, math.nan)
        for name in ("old_log_probs", "advantages", "reference_log_probs", "sampler_log_probs")
    }
    got = run_rows(implementation, logits.index_fill(0, masked, math.nan), replace(inputs, **poisoned), options)
    for name in ("loss", "flags", "gradient"):
        assert torch.equal(getattr(got, name), getattr(clean, name)), name


def check_banned_and_padded(implementation: str) -> None:
    """-inf logits over whole shards; padding columns; several tiles."""
    options = PolicyLossOptions(entropy_coefficient=0.1)
    logits, inputs = make_case(6, 128)
    logits[:, 32:96] = -math.inf
    inputs = replace(inputs, targets=inputs.targets % 32, old_log_probs=torch.full((6,), -3.0))
    got = run_rows(implementation, logits, inputs, options, ranks=4)
    assert_matches(got, truth(logits, inputs, options), gradient_tolerance=5e-6)
    memory = torch.full((6, 160), 7.7)
    memory[:, :128] = logits
    view, kernels = memory[:, :144], row_kernels(implementation)
    rows = LogitRows(logits=view, targets=inputs.targets, shard=VocabularyShard(start=0, width=128))
    statistics, loss = kernels.loss(kernels.statistics(rows)[None], inputs, options)
    kernels.gradient_(rows, statistics, loss.grad_log_prob, loss.grad_entropy)
    assert relative(view[:, :128], truth(logits, inputs, options).gradient) < 5e-6
    assert (view[:, 128:] == 0).all()
    options = OPTIONS["entropy"]
    logits, inputs = make_case(3, 8_300)
    logits[:, 8_192:] += 12.0  # the peak lies in the second tile
    inputs = replace(inputs, old_log_probs=torch.full((3,), -5.0))
    got = run_rows(implementation, logits, inputs, options)
    assert_matches(got, truth(logits, inputs, options), gradient_tolerance=5e-6)


def check_small_kl(implementation: str) -> None:
    options = PolicyLossOptions(kl_coefficient=1.0, kl_estimator="k3")
    logits, inputs = make_case(4, 64)
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


def check_head() -> None:
    """An upstream factor through every path: chunks, whole rows of several tiles, ids that are never sampled."""
    generator = torch.Generator().manual_seed(0)
    excluded, temperature = (3, 50), 0.8
    for implementation, vocabulary in (("torch", 96), ("triton", 96), ("triton_row", 96), ("triton_row", 17_000)):
        options = OPTIONS["paper" if implementation == "torch" else "everything"]
        hidden, weight = torch.randn(12, 8, generator=generator), torch.randn(vocabulary, 8, generator=generator)
        _, inputs = make_case(12, vocabulary)
        inputs = replace(inputs, targets=torch.where((inputs.targets == 3) | (inputs.targets == 50), 4, inputs.targets))
        logits = hidden.double() @ weight.double().t()
        logits[:, list(excluded)] = -math.inf
        expected = truth(logits, inputs, options, temperature=temperature)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        head = HeadOptions(chunk_rows=5, implementation=implementation, temperature=temperature, excluded_ids=excluded)
        (linear_policy_loss(*leaves, inputs, options, head_options=head).total * 0.5).backward()
        assert relative(leaves[0].grad, 0.5 * expected.gradient @ weight.detach().double()) < 1e-5
        assert relative(leaves[1].grad, 0.5 * expected.gradient.t() @ hidden.detach().double()) < 1e-5


def check_whole_rows() -> None:
    """Rows of weight 0 and clipped rows are zeroed by the whole-row kernel itself."""
    logits, inputs = make_case(12, 96)
    rows = LogitRows(logits=logits.clone(), targets=inputs.targets, shard=VocabularyShard(start=0, width=96))
    result = whole_row_kernel("triton_row")(rows, inputs, OPTIONS["paper"])
    expected = truth(logits, inputs, OPTIONS["paper"])
    assert relative(rows.logits, expected.gradient) < 5e-6
    assert (rows.logits[~result.has_gradient] == 0).all()
    assert 0 < int(result.has_gradient.sum()) < 9


def check_far_rows() -> None:
    """Offsets past 2^31 elements: memory that is reserved, and touched only where the rows lie."""
    stride, rows = 2**30 + 64, torch.randn(3, 40).bfloat16()
    far = torch.empty(2 * stride + 40, dtype=torch.bfloat16).as_strided((3, 40), (stride, 1))
    far.copy_(rows)
    kernels, one, targets = row_kernels("triton"), torch.ones(3), torch.tensor([5, 6, 7])
    near, away = (LogitRows(logits=x, targets=targets, shard=VocabularyShard(start=0, width=40)) for x in (rows, far))
    parts = kernels.statistics(near)
    assert torch.equal(parts, kernels.statistics(away))
    statistics = row_kernels("torch").loss(parts[None], make_inputs(targets), PolicyLossOptions())[0]
    for x in (near, away):
        kernels.gradient_(x, statistics, one, None)
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
    check_head()
    check_whole_rows()
    check_far_rows()
