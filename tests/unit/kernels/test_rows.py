"""The row kernels, torch and interpreted Triton, against float64 autograd through the plain torch truth."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import OPTIONS, TEMPERATURES, assert_matches, make_case, relative, replaced, run_rows, truth

from megatron_r1reward.kernels.choose_kernel import row_kernels
from megatron_r1reward.kernels.policy_loss.row_kernels import (
    Flag,
    LogitRows,
    PolicyLossOptions,
    TokenInputs,
    VocabularyShard,
    count_flags,
)

IMPLEMENTATIONS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16)
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
# Every option in both dtypes; tensor-parallel sizes take turns, and the option with all terms on meets each of them.
MATRIX = [
    (name, (1, 2, 4)[(number + shift) % 3], dtype)
    for number, name in enumerate(OPTIONS)
    for shift, dtype in enumerate(DTYPES)
]
MATRIX += [("everything", ranks, torch.bfloat16) for ranks in (1, 2, 4)] + [("everything", 2, torch.float16)]

both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.mark.slow
@both
@pytest.mark.parametrize(("name", "ranks", "dtype"), MATRIX)
def test_matches_float64(name: str, ranks: int, dtype: torch.dtype, implementation: str) -> None:
    options, temperature = OPTIONS[name], TEMPERATURES.get(name, 1.0)
    logits, inputs = make_case(15, 1000, temperature=temperature, dtype=dtype)
    got = run_rows(implementation, logits, inputs, options, ranks=ranks, temperature=temperature)
    expected = truth(logits, inputs, options, temperature=temperature)
    assert_matches(got, expected, gradient_tolerance=GRADIENT_TOLERANCE[dtype])
    assert (got.gradient[inputs.weights == 0] == 0).all()


def test_the_matrix_reaches_every_flag() -> None:
    seen = 0
    for options in OPTIONS.values():
        logits, inputs = make_case(15, 1000)
        inputs.advantages[1] = math.nan
        for flags in truth(logits, inputs, options).flags.tolist():
            seen |= flags
    assert seen == sum(Flag) - Flag.NON_FINITE


@pytest.mark.slow
@both
@pytest.mark.parametrize("vocabulary", [20_001, 152_064])
def test_rows_of_several_tiles(vocabulary: int, implementation: str) -> None:
    options = OPTIONS["everything"]
    logits, inputs = make_case(6, vocabulary, dtype=torch.bfloat16)
    got = run_rows(implementation, logits, inputs, options)
    assert_matches(got, truth(logits, inputs, options), gradient_tolerance=2.5e-3)


@both
@pytest.mark.parametrize("dual_clip", [math.inf, 3.0])
def test_extreme_log_ratios(dual_clip: float, implementation: str) -> None:
    """Log-ratios up to infinity, both signs of the advantage: finite losses, no gradient, the right flag."""
    options = PolicyLossOptions(dual_clip=dual_clip)
    gaps, advantages = zip(
        *itertools.product([50.0, 88.0, 100.0, 1e4, math.inf, -50.0, -88.0, -100.0, -1e4, -math.inf], [1.0, -1.0]),
        strict=True,
    )
    gap, advantage = torch.tensor(gaps), torch.tensor(advantages)
    logits, inputs = make_case(20, 300)
    inputs = TokenInputs(targets=inputs.targets, old_log_probs=-gap, advantages=advantage, weights=torch.ones(20))
    got = run_rows(implementation, logits, inputs, options)
    ratio = torch.where(gap > 0, 1e3, 1e-3)
    bound = min(1e3, dual_clip)
    expected = torch.where(advantage > 0, -ratio.clamp(max=1.2), ratio.clamp(min=0.8, max=bound))
    torch.testing.assert_close(got.loss, expected, rtol=1e-5, atol=0)
    assert (got.gradient == 0).all()
    assert ((got.flags & Flag.PRECLIPPED_HIGH) != 0).tolist() == (gap > 0).tolist()
    assert ((got.flags & Flag.PRECLIPPED_LOW) != 0).tolist() == (gap < 0).tolist()
    assert (got.flags & Flag.NON_FINITE == 0).all()


@both
def test_without_preclip_an_overflow_is_reported(implementation: str) -> None:
    options = PolicyLossOptions(preclip_min=0.0, preclip_max=math.inf)
    logits, inputs = make_case(2, 64)
    inputs = TokenInputs(
        targets=inputs.targets,
        old_log_probs=torch.tensor([-200.0, -200.0]),
        advantages=torch.tensor([-1.0, 1.0]),
        weights=torch.ones(2),
    )
    got = run_rows(implementation, logits, inputs, options)
    assert got.loss.isfinite().tolist() == [False, True]
    assert (got.flags & Flag.NON_FINITE).tolist() == [Flag.NON_FINITE, 0]


@both
def test_nan_in_masked_rows_never_leaks(implementation: str) -> None:
    options = OPTIONS["everything"]
    logits, inputs = make_case(12, 700, dtype=torch.bfloat16)
    weights = inputs.weights.clone()
    weights[::2] = 0.0
    inputs = replaced(inputs, weights=weights)
    clean = run_rows(implementation, logits, inputs, options)
    logits[::2] = math.nan
    poisoned = {
        name: getattr(inputs, name).index_fill(0, torch.arange(0, 12, 2), math.nan)
        for name in ("old_log_probs", "advantages", "reference_log_probs", "sampler_log_probs")
    }
    got = run_rows(implementation, logits, replaced(inputs, **poisoned), options)
    for name in ("loss", "flags", "gradient"):
        assert torch.equal(getattr(got, name), getattr(clean, name)), name
    assert (got.gradient[::2] == 0).all()


@both
@pytest.mark.parametrize("name", ["paper", "everything"])
def test_nan_in_an_active_row_is_reported_and_stays_there(name: str, implementation: str) -> None:
    options = OPTIONS[name]
    logits, inputs = make_case(6, 300)
    inputs = replaced(inputs, advantages=torch.full((6,), 0.5), weights=torch.ones(6))
    logits[1, 7] = math.nan
    got = run_rows(implementation, logits, inputs, options)
    assert ((got.flags & Flag.NON_FINITE) != 0).tolist() == [False, True, False, False, False, False]
    assert got.gradient[[0, 2, 3, 4, 5]].isfinite().all()
    assert not got.log_probs[1].isfinite()


@both
def test_rows_without_gradient_are_not_read(implementation: str) -> None:
    """Their logits turn into NaN between forward and backward; their gradient is an exact zero all the same."""
    options = PolicyLossOptions()
    logits, inputs = make_case(10, 300)
    kernels = row_kernels(implementation)
    rows = LogitRows(logits=logits, targets=inputs.targets, shard=VocabularyShard(start=0, width=300))
    statistics, loss = kernels.loss(kernels.statistics(rows)[None], inputs, options)
    idle = loss.grad_log_prob == 0
    assert 2 < int(idle.sum()) < 10
    before = logits.clone()
    logits[idle] = math.nan
    kernels.gradient_(rows, statistics, loss.grad_log_prob, None)
    assert (logits[idle] == 0).all()
    assert relative(logits, truth(before, inputs, options).gradient) < 5e-6


@both
def test_advantages_that_are_no_numbers_are_rejected(implementation: str) -> None:
    logits, inputs = make_case(6, 200)
    advantages = torch.tensor([0.0, 2.9, math.nan, math.inf, -math.inf, -1.4])
    inputs = replaced(inputs, advantages=advantages, weights=torch.ones(6))
    got = run_rows(implementation, logits, inputs, PolicyLossOptions())
    assert ((got.flags & Flag.REJECTED) != 0).tolist() == [False, False, True, True, True, False]
    assert count_flags(got.flags)["rejected"] == 3
    assert (got.loss[2:5] == 0).all()
    assert_matches(got, truth(logits, inputs, PolicyLossOptions()), gradient_tolerance=5e-6)


@both
def test_a_token_far_from_the_reference_is_bounded(implementation: str) -> None:
    """k3 of 20 nats is 4.9e8; with the default bound it weighs 10 and no longer pulls, on both sides."""
    options = PolicyLossOptions(kl_coefficient=1.0, kl_bound=10.0)
    logits, inputs = make_case(5, 64)
    exact = logits.double().log_softmax(-1).gather(1, inputs.targets[:, None]).squeeze(1)
    gap = torch.tensor([-20.0, -200.0, 12.0, -2.0, 3.0])
    inputs = replaced(
        inputs, advantages=torch.zeros(5), weights=torch.ones(5), reference_log_probs=(exact - gap).float()
    )
    got = run_rows(implementation, logits, inputs, options)
    assert got.loss[:3].tolist() == [10.0, 10.0, 10.0]
    assert (got.gradient[:3] == 0).all()
    assert (got.gradient[3:] != 0).any(dim=1).all()
    assert_matches(got, truth(logits, inputs, options), gradient_tolerance=5e-6)


@both
@pytest.mark.parametrize("ranks", [1, 4])
def test_logits_of_minus_infinity(ranks: int, implementation: str) -> None:
    """A banned block that covers a whole shard, and a row that is certain of its target."""
    options = PolicyLossOptions(entropy_coefficient=0.1)
    logits, inputs = make_case(8, 512)
    logits[:, 128:384] = -math.inf
    logits[1, :511] = -math.inf
    targets = torch.where((inputs.targets >= 128) & (inputs.targets < 384), 5, inputs.targets)
    targets[1] = 511
    inputs = replaced(inputs, targets=targets, old_log_probs=torch.full((8,), -3.0))
    got = run_rows(implementation, logits, inputs, options, ranks=ranks)
    assert abs(float(got.log_probs[1])) < 1e-6
    assert abs(float(got.entropy[1])) < 1e-6
    assert_matches(got, truth(logits, inputs, options), gradient_tolerance=5e-6)


@both
def test_strided_rows_and_padded_vocabulary(implementation: str) -> None:
    """Row stride 640, 500 columns, 12 columns of padding that the softmax must not see."""
    options = OPTIONS["entropy"]
    logits, inputs = make_case(8, 500)
    memory = torch.full((8, 640), 7.7)
    view = memory[:, :512]
    view[:, :500] = logits
    kernels = row_kernels(implementation)
    rows = LogitRows(logits=view, targets=inputs.targets, shard=VocabularyShard(start=0, width=500))
    statistics, loss = kernels.loss(kernels.statistics(rows)[None], inputs, options)
    kernels.gradient_(rows, statistics, loss.grad_log_prob, loss.grad_entropy)
    assert relative(view[:, :500], truth(logits, inputs, options).gradient) < 5e-6
    assert (view[:, 500:] == 0).all()
    assert (memory[:, 512:] == torch.tensor(7.7)).all()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_runs_repeat_bit_for_bit(implementation: str) -> None:
    options = OPTIONS["everything"]
    logits, inputs = make_case(10, 512, dtype=torch.bfloat16)
    first, second = (run_rows(implementation, logits, inputs, options, ranks=4) for _ in range(2))
    assert torch.equal(first.gradient, second.gradient)
    assert torch.equal(first.log_probs, second.log_probs)


def test_both_kinds_of_kl_gap_are_accurate_near_zero() -> None:
    """k3 near 0 cancels in float32 if written as exp(x) - 1 - x."""
    options = PolicyLossOptions(kl_coefficient=1.0, kl_estimator="k3")
    logits, inputs = make_case(8, 64)
    exact = logits.double().log_softmax(-1).gather(1, inputs.targets[:, None]).squeeze(1)
    gap = torch.tensor([1e-3, -1e-3, 3e-2, -3e-2, 6e-2, 7e-2, 0.5, -0.5])
    inputs = TokenInputs(
        targets=inputs.targets,
        old_log_probs=exact.float(),
        advantages=torch.zeros(8),
        weights=torch.ones(8),
        reference_log_probs=(exact - gap).float(),
    )
    expected = truth(logits, inputs, options)
    for implementation in IMPLEMENTATIONS:
        got = run_rows(implementation, logits, inputs, options)
        # The log-probs themselves are rounded to 2e-7: relative to a gap of 1e-3 that is 4e-4 of its square.
        torch.testing.assert_close(got.loss.double(), expected.loss, rtol=2e-3, atol=0)


HUGE_ROWS = """
import sys; sys.path.insert(0, sys.argv[2])
import interpreted_triton, torch
from megatron_r1reward.kernels.choose_kernel import row_kernels
from megatron_r1reward.kernels.policy_loss.row_kernels import LogitRows, VocabularyShard
from megatron_r1reward.kernels.policy_loss.torch_rows import merge_parts
stride = 2**30 + 64  # fits int32; two of them do not
rows = torch.randn(3, 300).bfloat16()
far = torch.empty(2 * stride + 300, dtype=torch.bfloat16).as_strided((3, 300), (stride, 1))  # touched lazily
far.copy_(rows)
kernels, targets = row_kernels(sys.argv[1]), torch.tensor([5, 6, 7])
near, away = (LogitRows(logits=x, targets=targets, shard=VocabularyShard(start=0, width=300)) for x in (rows, far))
parts = kernels.statistics(near)
assert torch.equal(parts, kernels.statistics(away))
for x in (near, away):
    kernels.gradient_(x, merge_parts(parts[None]), torch.ones(3), None)
assert torch.equal(rows, far)
"""


@pytest.mark.slow
@both
def test_row_offsets_beyond_32_bits(implementation: str) -> None:
    """In a process of its own: an overflowing offset ends in a segmentation fault."""
    tests = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", HUGE_ROWS, implementation, str(tests)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
