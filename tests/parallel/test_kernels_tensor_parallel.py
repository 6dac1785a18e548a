"""The fused losses with the vocabulary split over gloo ranks: float64 accuracy, and the same bits on every rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from kernel_cases import OPTIONS, make_case, relative, truth
from ranks import run_ranks

from megatron_r1reward.kernels.linear_log_probs import linear_log_probs
from megatron_r1reward.kernels.linear_policy_loss import linear_policy_loss
from megatron_r1reward.kernels.lm_head import HeadOptions, gather_sequence_parallel_rows

pytestmark = pytest.mark.parallel

ROWS, HIDDEN, VOCABULARY, PADDED = 12, 16, 250, 256
NAME = "everything"


def head_tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    return hidden, weight


def on_rank(implementation: str) -> dict[str, np.ndarray]:
    """Everything a rank computes, as arrays (a tensor in a queue is shared memory that ends with its process)."""
    dist.init_process_group("gloo", init_method="env://")
    group = dist.group.WORLD
    rank, ranks = dist.get_rank(), dist.get_world_size()
    options = OPTIONS[NAME]
    hidden, weight = head_tensors()
    _, inputs = make_case(ROWS, VOCABULARY)
    own = weight.chunk(ranks)[rank].clone()
    results: dict[str, torch.Tensor] = {}

    leaves = hidden.clone().requires_grad_(), own.clone().requires_grad_()
    head = HeadOptions(chunk_rows=5, vocab_size=VOCABULARY, implementation=implementation)
    fused = linear_policy_loss(*leaves, inputs, options, tensor_parallel_group=group, head_options=head)
    fused.total.backward()
    results |= {"log_probs": fused.log_probs, "entropy": fused.entropy, "flags": fused.flags}
    results |= {
        "total": fused.total.detach(),
        "hidden_gradient": leaves[0].grad,
        "weight_gradient": leaves[1].grad,
    }

    # Sequence parallel: every rank holds a slice of 16 positions, of which 12 carry a row, in any order.
    positions = torch.tensor([3, 0, 14, 7, 15, 8, 9, 1, 12, 5, 6, 10])
    sequence = torch.zeros(16, HIDDEN).index_copy(0, positions, hidden)
    local = sequence.chunk(ranks)[rank].clone().requires_grad_()
    if ranks > 1:
        rows = gather_sequence_parallel_rows(local, positions, group)
        assert torch.equal(rows.detach(), hidden)
        unreduced = replace(head, reduce_hidden_gradient=False)
        output = linear_policy_loss(rows, own, inputs, options, tensor_parallel_group=group, head_options=unreduced)
        output.total.backward()
        results["sequence_gradient"] = local.grad

    leaves = hidden.clone().requires_grad_(), own.clone().requires_grad_()
    log_probs, entropy = linear_log_probs(*leaves, inputs.targets, tensor_parallel_group=group, options=head)
    (log_probs * inputs.weights - 0.1 * entropy).sum().backward()
    results |= {"plain_log_probs": log_probs.detach(), "plain_hidden": leaves[0].grad, "plain_weight": leaves[1].grad}
    return {name: value.detach().numpy().copy() for name, value in results.items()}


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_agree_bitwise_and_match_float64(ranks: int, implementation: str) -> None:
    results = run_ranks(on_rank, ranks, implementation)
    options = OPTIONS[NAME]
    hidden, weight = head_tensors()
    _, inputs = make_case(ROWS, VOCABULARY)
    expected = truth(hidden.double() @ weight[:VOCABULARY].double().t(), inputs, options)
    for name in ("total", "log_probs", "entropy", "flags", "hidden_gradient", "plain_log_probs"):
        for other in results[1:]:
            assert np.array_equal(results[0][name], other[name]), name
    first = {name: torch.from_numpy(value) for name, value in results[0].items()}
    carries = inputs.weights != 0  # rows that were multiplied
    assert relative(first["log_probs"][carries], expected.log_probs[carries]) < 1e-6
    assert torch.equal(first["flags"], expected.flags)
    assert float(first["total"]) == pytest.approx(float(expected.loss.sum()), rel=1e-5)
    hidden_gradient = expected.gradient @ weight[:VOCABULARY].double()
    weight_gradient = expected.gradient.t() @ hidden.double()
    assert relative(first["hidden_gradient"], hidden_gradient) < 1e-5
    got_weight = torch.cat([torch.from_numpy(r["weight_gradient"]) for r in results])
    assert relative(got_weight[:VOCABULARY], weight_gradient) < 1e-5
    if ranks > 1:
        positions = torch.tensor([3, 0, 14, 7, 15, 8, 9, 1, 12, 5, 6, 10])
        sequence = torch.cat([torch.from_numpy(r["sequence_gradient"]) for r in results])
        assert relative(sequence[positions], hidden_gradient) < 1e-5
        assert (sequence[[2, 4, 11, 13]] == 0).all()


def test_log_probs_match_one_rank() -> None:
    one = run_ranks(on_rank, 1, "torch")[0]
    two = run_ranks(on_rank, 2, "torch")
    for name in ("plain_log_probs", "plain_hidden"):
        torch.testing.assert_close(torch.from_numpy(two[0][name]), torch.from_numpy(one[name]), rtol=1e-5, atol=1e-5)
    joined = torch.cat([torch.from_numpy(r["plain_weight"]) for r in two])
    torch.testing.assert_close(joined, torch.from_numpy(one["plain_weight"]), rtol=1e-5, atol=1e-5)
