"""One interface to the row-wise work, in plain torch or Triton: statistics, loss, gradient over the logits."""

from __future__ import annotations

import importlib
from typing import Protocol

import torch

from megatron_r1reward.kernels.policy_loss import torch_rows
from megatron_r1reward.kernels.policy_loss.options import PolicyLossOptions, TokenInputs, VocabularyShard
from megatron_r1reward.kernels.policy_loss.statistics import RowStatistics, merge_parts
from megatron_r1reward.kernels.policy_loss.token_loss import TokenLoss, token_loss


class RowKernels(Protocol):
    """Shapes as in `torch_rows`; `logits_RV` is the rank's shard, rows may be strided, columns are contiguous."""

    def statistics(
        self,
        logits_RV: torch.Tensor,
        targets_R: torch.Tensor,
        read_R: torch.Tensor,
        shard: VocabularyShard,
        temperature: float,
    ) -> torch.Tensor:
        """The shard's four numbers per row: float32 [4, R]."""

    def loss(
        self, parts_T4R: torch.Tensor, inputs: TokenInputs, read_R: torch.Tensor, options: PolicyLossOptions
    ) -> tuple[RowStatistics, TokenLoss]:
        """Merge the parts of all ranks in rank order and evaluate the loss of each row."""

    def gradient_(
        self,
        logits_RV: torch.Tensor,
        targets_R: torch.Tensor,
        statistics: RowStatistics,
        grad_log_prob_R: torch.Tensor,
        grad_entropy_R: torch.Tensor,
        shard: VocabularyShard,
        temperature: float,
        *,
        with_entropy: bool,
    ) -> None:
        """Overwrite the logits with their gradient."""


class TorchRows:
    """Plain torch: any device; temporaries of one tile."""

    def statistics(
        self,
        logits_RV: torch.Tensor,
        targets_R: torch.Tensor,
        read_R: torch.Tensor,
        shard: VocabularyShard,
        temperature: float,
    ) -> torch.Tensor:
        return torch_rows.row_statistics(logits_RV, targets_R, read_R, shard, temperature)

    def loss(
        self, parts_T4R: torch.Tensor, inputs: TokenInputs, read_R: torch.Tensor, options: PolicyLossOptions
    ) -> tuple[RowStatistics, TokenLoss]:
        merged = merge_parts(parts_T4R)
        zero = torch.zeros((), device=parts_T4R.device)
        merged = RowStatistics(
            log_probs=torch.where(read_R, merged.log_probs, zero),
            entropy=torch.where(read_R, merged.entropy, zero),
            normalizer=torch.where(read_R, merged.normalizer, zero),
        )
        return merged, token_loss(merged.log_probs, merged.entropy, inputs, options)

    def gradient_(
        self,
        logits_RV: torch.Tensor,
        targets_R: torch.Tensor,
        statistics: RowStatistics,
        grad_log_prob_R: torch.Tensor,
        grad_entropy_R: torch.Tensor,
        shard: VocabularyShard,
        temperature: float,
        *,
        with_entropy: bool,
    ) -> None:
        torch_rows.logit_gradient_(
            logits_RV,
            targets_R,
            statistics.normalizer,
            statistics.entropy,
            grad_log_prob_R,
            grad_entropy_R,
            shard,
            temperature,
            with_entropy=with_entropy,
        )


class TritonRows:
    """Three Triton kernels; CUDA tensors, or CPU tensors under the interpreter. Triton is imported on first use."""

    def __init__(self) -> None:
        self._launch = importlib.import_module("megatron_r1reward.kernels.policy_loss.triton_launch")

    def statistics(
        self,
        logits_RV: torch.Tensor,
        targets_R: torch.Tensor,
        read_R: torch.Tensor,
        shard: VocabularyShard,
        temperature: float,
    ) -> torch.Tensor:
        return self._launch.row_statistics(logits_RV, targets_R, read_R, shard, temperature)

    def loss(
        self, parts_T4R: torch.Tensor, inputs: TokenInputs, read_R: torch.Tensor, options: PolicyLossOptions
    ) -> tuple[RowStatistics, TokenLoss]:
        return self._launch.rows_loss(parts_T4R, inputs, read_R, options)

    def gradient_(
        self,
        logits_RV: torch.Tensor,
        targets_R: torch.Tensor,
        statistics: RowStatistics,
        grad_log_prob_R: torch.Tensor,
        grad_entropy_R: torch.Tensor,
        shard: VocabularyShard,
        temperature: float,
        *,
        with_entropy: bool,
    ) -> None:
        self._launch.logit_gradient_(
            logits_RV,
            targets_R,
            statistics.normalizer,
            statistics.entropy,
            grad_log_prob_R,
            grad_entropy_R,
            shard,
            temperature,
            with_entropy=with_entropy,
        )


def row_kernels(implementation: str) -> RowKernels:
    """The row kernels of a name that `dispatch` has chosen: "torch" or "triton"."""
    match implementation:
        case "torch":
            return TorchRows()
        case "triton":
            return TritonRows()
    raise ValueError(f"no row kernels named {implementation!r}: use 'torch' or 'triton'")
