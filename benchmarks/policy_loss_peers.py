"""Other implementations of the loss from materialised logits, where they can be imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_r1reward.algorithm.policy_loss import policy_loss
from megatron_r1reward.config.schema import AlgorithmSection
from megatron_r1reward.kernels.policy_loss.row_kernels import TokenInputs

# (inputs, rows per sequence) -> step(logits) -> gradient by the logits, which may be overwritten.
Step = Callable[[torch.Tensor], torch.Tensor]
Provider = Callable[[TokenInputs, int], Step]
Loss = Callable[[torch.Tensor, TokenInputs], torch.Tensor]


def providers(torch_loss: Loss) -> dict[str, Provider]:
    """Name and maker; a maker raises ImportError where the peer is missing."""

    def eager(inputs: TokenInputs, length: int) -> Step:
        return _by_autograd(lambda logits: torch_loss(logits, inputs))

    def compiled(inputs: TokenInputs, length: int) -> Step:
        function = torch.compile(torch_loss, dynamic=False)
        return _by_autograd(lambda logits: function(logits, inputs))

    return {
        "torch eager": eager,
        "torch.compile": compiled,
        "liger GRPO": liger,
        "fast-llm GRPO": fast_llm,
        "megatron CE + loss": megatron,
        "verl log-probs + loss": verl,
    }


def _by_autograd(loss: Callable[[torch.Tensor], torch.Tensor]) -> Step:
    def step(logits: torch.Tensor) -> torch.Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    return step


def _loss_of_log_probs(log_probs: torch.Tensor, inputs: TokenInputs) -> torch.Tensor:
    result = policy_loss(log_probs, inputs.old_log_probs, inputs.advantages, AlgorithmSection())
    return (result.per_token_loss * inputs.weights).sum()


def liger(inputs: TokenInputs, length: int) -> Step:
    """Liger's Triton GRPO loss, in place; no Pre-CLIP, one advantage per sequence."""
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    def cut(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, length)[:, :-1].contiguous()

    old, ids, mask = cut(inputs.old_log_probs), cut(inputs.targets), cut((inputs.weights != 0).long())
    advantages = inputs.advantages.view(-1, length)[:, 0].contiguous()

    def loss(logits: torch.Tensor) -> torch.Tensor:
        shaped = logits.view(-1, length, logits.shape[1])
        arguments = (shaped, old, None, ids, advantages, mask, 1.0, 0.0, 0.2, 0.2, True, "dapo", None, True)
        return GrpoLossFunction.apply(*arguments)[0]

    return _by_autograd(loss)


def fast_llm(inputs: TokenInputs, length: int) -> Step:
    """Fast-LLM's fused forward and backward."""
    from fast_llm.functional.triton.grpo_loss import triton_grpo_loss_forward_backward

    labels = torch.where(inputs.weights != 0, inputs.targets, -100)
    divisor = float((inputs.weights != 0).sum())

    def step(logits: torch.Tensor) -> torch.Tensor:
        result: Any = triton_grpo_loss_forward_backward(
            logits, labels, inputs.advantages, inputs.old_log_probs, grad_output=1.0, divisor=divisor
        )
        return result[1]

    return step


def megatron(inputs: TokenInputs, length: int) -> Step:
    """Megatron-core's vocab-parallel cross entropy as the source of the log-probs."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    if not dist.is_initialized():
        backend = "nccl" if inputs.weights.is_cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()

    def loss(logits: torch.Tensor) -> torch.Tensor:
        log_probs = -vocab_parallel_cross_entropy(logits[:, None], inputs.targets[:, None])[:, 0]
        return _loss_of_log_probs(log_probs, inputs)

    return _by_autograd(loss)


def verl(inputs: TokenInputs, length: int) -> Step:
    """verl's log-probs from logits (flash-attn's cross entropy where it is installed)."""
    from verl.utils.torch_functional import logprobs_from_logits

    return _by_autograd(lambda logits: _loss_of_log_probs(logprobs_from_logits(logits, inputs.targets), inputs))
