"""The LM head as a module that returns log-probs of targets instead of logits."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from megatron_r1reward.kernels.linear_log_probs import linear_log_probs


class ResponseHead(ColumnParallelLinear):
    """megatron-core's output layer, applied to response rows.

    It has to be *called*: overlapped parameter gathers complete in a hook before a module's forward, and a weight that
    is only read could still be last step's.
    """

    def forward(
        self, rows_RH: torch.Tensor, targets_R: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log-probs and entropies, float32 [2, R]; `weight` is the embedding's when that is tied and lives here."""
        head = self.weight if weight is None else weight
        return torch.stack(linear_log_probs(rows_RH, head, targets_R, tensor_parallel_group=self.tp_group))


def use_response_head(model: GPTModel) -> None:
    """Turn the output layer that a last stage has built into a `ResponseHead`; parameters stay what they are."""
    assert type(model.output_layer) is ColumnParallelLinear
    model.output_layer.__class__ = ResponseHead
