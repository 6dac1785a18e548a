"""The loss on materialised logits: autograd, in-place backward, torch.library checks, torch.compile."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import OPTIONS, Result, assert_matches, make_case, relative, truth

from megatron_r1reward.kernels.policy_loss import operators
from megatron_r1reward.kernels.policy_loss.from_logits import PolicyLossOutput, policy_loss_from_logits
from megatron_r1reward.kernels.policy_loss.options import PolicyLossOptions, TokenInputs

IMPLEMENTATIONS = ("torch", "triton", "triton_row")


def loss_of(
    logits: torch.Tensor, inputs: TokenInputs, options: PolicyLossOptions, implementation: str, **extra: object
) -> tuple[PolicyLossOutput, torch.Tensor, torch.Tensor]:
    """(output, what the loss was given, leaf behind it)."""
    leaf = logits.clone().requires_grad_()
    given = leaf * 1.0
    return policy_loss_from_logits(given, inputs, options, implementation=implementation, **extra), given, leaf


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["paper", "entropy", "everything"])
def test_autograd_with_an_upstream_factor(name: str, implementation: str) -> None:
    options = OPTIONS[name]
    logits, inputs = make_case(10, 700, options)
    output, given, leaf = loss_of(logits, inputs, options, implementation)
    (output.total * 0.25).backward()
    assert leaf.grad is not None
    expected = truth(logits, inputs, options)
    got = Result(
        log_probs=output.log_probs,
        entropy=output.entropy,
        loss=output.loss,
        flags=output.flags,
        gradient=leaf.grad / 0.25,
    )
    assert_matches(got, expected, gradient_tolerance=5e-6)
    assert float(output.total.detach()) == pytest.approx(float(expected.loss.sum()), rel=1e-5, abs=1e-5)
    assert torch.equal(given.detach(), leaf.grad)  # the gradient lies where the logits were


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_second_backward_raises(implementation: str) -> None:
    logits, inputs = make_case(6, 300, OPTIONS["paper"])
    output, _, _ = loss_of(logits, inputs, OPTIONS["paper"], implementation)
    output.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"overwritten its logits.*overwrite=False"):
        output.total.backward()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_without_overwriting_logits_stay_and_backward_repeats(implementation: str) -> None:
    options = OPTIONS["paper"]
    logits, inputs = make_case(6, 300, options)
    leaf = logits.clone().requires_grad_()
    output = policy_loss_from_logits(leaf, inputs, options, implementation=implementation, overwrite=False)
    output.total.backward(retain_graph=True)
    assert leaf.grad is not None
    first = leaf.grad.clone()
    output.total.backward()
    assert torch.equal(leaf.detach(), logits)
    torch.testing.assert_close(leaf.grad, 2 * first)
    assert relative(first, truth(logits, inputs, options).gradient) < 5e-6


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_idle_rows_can_be_skipped_in_the_forward(implementation: str) -> None:
    options = PolicyLossOptions(filter="paper")
    logits, inputs = make_case(10, 200, options)
    z = torch.tensor([1.0, 0.0, -1.0, 5.0, 1.0, 1.0, 0.0, -5.0, 2.0, math.nan])
    inputs = replace(inputs, advantages=z, standardization=None, weights=torch.ones(10))
    expected = truth(logits, inputs, options)
    idle = (z == 0) | (z.abs() > 3) | z.isnan()
    logits[idle] = math.nan
    output, _, leaf = loss_of(logits, inputs, options, implementation, read_idle_rows=False)
    output.total.backward()
    assert (output.log_probs[idle] == 0).all()
    assert torch.equal(output.flags & 3, expected.flags & 3)
    assert relative(leaf.grad, expected.gradient) < 5e-6


def test_padded_vocabulary_gets_no_gradient() -> None:
    options = OPTIONS["entropy"]
    logits, inputs = make_case(6, 300, options)
    padded = torch.cat([logits, torch.full((6, 20), 9.0)], dim=1)
    for implementation in IMPLEMENTATIONS:
        _, _, leaf = loss_of(padded, inputs, options, implementation, vocab_size=300)
        output, _, leaf = loss_of(padded, inputs, options, implementation, vocab_size=300)
        output.total.backward()
        assert relative(leaf.grad[:, :300], truth(logits, inputs, options).gradient) < 5e-6
        assert (leaf.grad[:, 300:] == 0).all()


def test_row_variant_of_several_tiles_in_bfloat16() -> None:
    options = OPTIONS["everything"]
    logits, inputs = make_case(6, 40_001, options, dtype=torch.bfloat16)
    output, _, leaf = loss_of(logits, inputs, options, "triton_row")
    output.total.backward()
    assert relative(leaf.grad, truth(logits, inputs, options).gradient) < 2.5e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(5)}, r"weights has shape \(5,\) beside 6 rows"),
        ({"advantages": torch.ones(6, dtype=torch.float64)}, r"advantages is torch.float64"),
        ({"reference_log_probs": None}, r"pass reference_log_probs"),
        ({"sampler_log_probs": None}, r"pass sampler_log_probs"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    options = OPTIONS["everything"]
    logits, inputs = make_case(6, 100, options)
    with pytest.raises(ValueError, match=message):
        policy_loss_from_logits(logits, replace(inputs, **change), options)


def test_a_leaf_is_not_overwritten() -> None:
    logits, inputs = make_case(6, 100, OPTIONS["paper"])
    with pytest.raises(ValueError, match="overwrite=False"):
        policy_loss_from_logits(logits.requires_grad_(), inputs, OPTIONS["paper"])


def operator_arguments(implementation: str, *, overwrite: bool) -> tuple[object, ...]:
    options = OPTIONS["everything"]
    logits, inputs = make_case(6, 96, options)
    return (
        logits.requires_grad_(), inputs.targets, inputs.weights != 0, inputs.old_log_probs, inputs.advantages,
        inputs.weights, inputs.reference_log_probs, inputs.sampler_log_probs, inputs.standardization,
        0, 96, 1, "", options.pack(), overwrite, implementation,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_opcheck(implementation: str) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch of each operator."""
    arguments = operator_arguments(implementation, overwrite=False)
    torch.library.opcheck(operators.policy_loss, arguments)
    options, inputs = OPTIONS["everything"], make_case(6, 96, OPTIONS["everything"])[1]
    logits = arguments[0].detach()
    statistics = (logits, inputs.targets, inputs.weights != 0, 0, 96, 0.9, implementation)
    torch.library.opcheck(operators.row_statistics, statistics)
    parts = operators.row_statistics(*statistics)
    torch.library.opcheck(operators.gather_statistics, (parts, 1, ""))
    rows = (parts[None], *arguments[2:3], inputs.targets, *arguments[3:9], options.pack(), implementation)
    torch.library.opcheck(operators.rows_loss, rows)
    _, entropy, normalizer, _, grad_log_prob, grad_entropy, _ = operators.rows_loss(*rows)
    torch.library.opcheck(
        operators.logit_gradient_,
        (
            *(logits.clone(), inputs.targets, normalizer, entropy, grad_log_prob, grad_entropy),
            *(0, 96, 0.9, True, implementation),
        ),
    )


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_compiles_as_one_graph(overwrite: bool, implementation: str) -> None:
    options = OPTIONS["everything"]
    _, inputs = make_case(6, 96, options)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(6, 16, generator=generator), torch.randn(96, 16, generator=generator)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        output = policy_loss_from_logits(
            hidden @ weight.t(), inputs, options, implementation=implementation, overwrite=overwrite
        )
        return output.total * 0.5

    def gradients(function: object) -> tuple[torch.Tensor, ...]:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for expected, got in zip(gradients(loss), gradients(compiled), strict=True):
        torch.testing.assert_close(got, expected)
