"""Softmax statistics of rows whose vocabulary is split over ranks: four numbers per row and rank, merged in rank order.

All in the log2 domain: z = logit * log2(e) / temperature. The four numbers of a shard are

    peak      m = max z
    total     s = sum 2^(z - m)
    weighted  t = sum 2^(z - m) (z - m)      shifted, so that the entropy does not cancel
    target    z of the row's target, -inf where another rank holds it
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


@dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """Float32 [R] each, the same bits on every tensor-parallel rank."""

    log_probs: torch.Tensor  # of the targets, natural log
    entropy: torch.Tensor  # nats
    normalizer: torch.Tensor  # log2 sum 2^z: what the backward needs to rebuild probabilities

    def take(self, rows: torch.Tensor) -> RowStatistics:
        """Those of the given rows."""
        return RowStatistics(
            log_probs=self.log_probs[rows], entropy=self.entropy[rows], normalizer=self.normalizer[rows]
        )


def gather_parts(parts_4R: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The parts of all ranks, [ranks, 4, R]: ONE all-gather of 16 bytes per row and rank."""
    if group is None:
        return parts_4R[None]
    parts_T4R = parts_4R.new_empty(group.size(), *parts_4R.shape)
    dist.all_gather_into_tensor(parts_T4R.view(-1), parts_4R.reshape(-1), group=group)
    return parts_T4R


def merge_parts(parts_T4R: torch.Tensor) -> RowStatistics:
    """Statistics of the whole row. Every rank adds in rank order, so all ranks get the same bits.

    A row without any finite logit gives log-prob and entropy NaN.
    """
    peak_R, total_R, weighted_R, target_R = parts_T4R[0].unbind()
    for part_4R in parts_T4R[1:]:
        other_peak_R, other_total_R, other_weighted_R, other_target_R = part_4R.unbind()
        merged_R = torch.maximum(peak_R, other_peak_R)
        shift_R, other_shift_R = _shift(peak_R, merged_R), _shift(other_peak_R, merged_R)
        scale_R, other_scale_R = _scale(peak_R, shift_R), _scale(other_peak_R, other_shift_R)
        weighted_R = scale_R * (weighted_R + total_R * shift_R)
        weighted_R = weighted_R + other_scale_R * (other_weighted_R + other_total_R * other_shift_R)
        total_R = scale_R * total_R + other_scale_R * other_total_R
        peak_R, target_R = merged_R, torch.maximum(target_R, other_target_R)
    normalizer_R = peak_R + total_R.log2()
    return RowStatistics(
        log_probs=(target_R - normalizer_R) * LN_2,
        entropy=(total_R.log2() - weighted_R / total_R) * LN_2,
        normalizer=normalizer_R,
    )


def _shift(peak_R: torch.Tensor, merged_R: torch.Tensor) -> torch.Tensor:
    """peak - merged, and 0 where the shard has no finite logit (-inf - -inf would be NaN)."""
    return torch.where(peak_R == -math.inf, 0.0, peak_R - merged_R)


def _scale(peak_R: torch.Tensor, shift_R: torch.Tensor) -> torch.Tensor:
    return torch.where(peak_R == -math.inf, 0.0, shift_R.exp2())
