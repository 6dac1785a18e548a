"""The LM head as a module that returns log-probs of targets, or the policy loss itself, instead of logits."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from megatron_r1reward.kernels import choose_kernel
from megatron_r1reward.kernels.linear_log_probs import linear_log_probs
from megatron_r1reward.kernels.linear_policy_loss import linear_policy_loss
from megatron_r1reward.kernels.policy_loss.from_logits import PolicyLossOutput
from megatron_r1reward.kernels.policy_loss.options import PolicyLossOptions, TokenInputs

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LossRequest:
    """Asks a model's last chunk for the policy loss of a micro-batch, formed in the LM head, instead of log-probs."""

    inputs: TokenInputs  # one entry per response token of the micro-batch
    options: PolicyLossOptions


class ResponseHead(ColumnParallelLinear):
    """megatron-core's output layer, applied to response rows.

    It has to be *called*: overlapped parameter gathers complete in a hook before a module's forward, and a weight that
    is only read could still be last step's.
    """

    implementation: str = "auto"  # of the row kernels, see `kernels.choose_kernel`

    def forward(
        self,
        rows_RH: torch.Tensor,
        targets_R: torch.Tensor,
        weight: torch.Tensor | None = None,
        request: LossRequest | None = None,
    ) -> torch.Tensor | PolicyLossOutput:
        """Log-probs and entropies, float32 [2, R], or what `request` asks for; `weight` is the embedding's when that is
        tied and lives here."""
        head = self.weight if weight is None else weight
        reduce = not self.config.sequence_parallel  # else the gathering of the rows does it
        if request is not None:
            return linear_policy_loss(
                rows_RH,
                head,
                request.inputs,
                request.options,
                tensor_parallel_group=self.tp_group,
                reduce_hidden_gradient=reduce,
                implementation=self.implementation,
            )
        return torch.stack(
            linear_log_probs(
                rows_RH,
                head,
                targets_R,
                tensor_parallel_group=self.tp_group,
                reduce_hidden_gradient=reduce,
                implementation=self.implementation,
            )
        )


def use_response_head(model: GPTModel) -> None:
    """Turn the output layer that a last stage has built into a `ResponseHead`; parameters stay what they are."""
    assert type(model.output_layer) is ColumnParallelLinear
    model.output_layer.__class__ = ResponseHead


def choose_kernels(model: torch.nn.Module, implementation: str) -> None:
    """Run the LM head of a model chunk with this implementation of the row kernels, and log which one that is.

    Raises:
        ValueError: it cannot run on this device; the message says why.
    """
    for module in model.modules():
        if isinstance(module, ResponseHead):
            weight = next(module.parameters(), None)
            sample = torch.empty(0) if weight is None else weight  # tied: the embedding's, of the same device and type
            request = choose_kernel.request_for(
                sample,
                padded=False,
                tensor_parallel_size=module.tp_group.size(),
                options=PolicyLossOptions(),
                rows_only=True,
                columns=module.output_size_per_partition,
            )
            choice = choose_kernel.choose(request, requested=implementation)
            log.info("LM head and policy loss run in %r: %s", choice.name, choice.reason)
            module.implementation = implementation
