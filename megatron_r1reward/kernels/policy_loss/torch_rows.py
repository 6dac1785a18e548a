"""Row statistics and the in-place gradient in plain torch, a few rows at a time.

Temporaries hold one tile (TILE_ELEMENTS float32 numbers, small enough for a CPU's cache), whatever the size of the
logits. Same results as the Triton kernels up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_r1reward.kernels.policy_loss.options import VocabularyShard
from megatron_r1reward.kernels.policy_loss.statistics import LN_2, LOG2_E

TILE_ELEMENTS = 1 << 18  # 1 MiB of float32
FLOOR = -1e4  # 2^-1e4 is 0 in float32 and -1e4 * 0 is 0, where -inf * 0 would be NaN


def row_statistics(
    logits_RV: torch.Tensor,
    targets_R: torch.Tensor,
    read_R: torch.Tensor | None,
    shard: VocabularyShard,
    temperature: float,
) -> torch.Tensor:
    """The four numbers of `statistics` for each row, float32 [4, R]. Rows outside `read_R` are not touched: zeros.

    Args:
        logits_RV: any float type; columns beyond `shard.width` are padding.
        targets_R: int64 [R], global ids.
        read_R: bool [R]; None: all rows.
    """
    parts_4R = torch.zeros(4, logits_RV.shape[0], dtype=torch.float32, device=logits_RV.device)
    if shard.width == 0:
        parts_4R[[0, 3]] = -torch.inf
        return parts_4R
    column_R, here_R = local_columns(targets_R, shard)
    for rows in _tiles(logits_RV, read_R):
        z_CV = _scaled(logits_RV, rows, shard, temperature)
        target_C = z_CV.gather(1, column_R[rows, None]).squeeze(1)
        peak_C = z_CV.amax(dim=-1)
        z_CV.sub_(torch.where(peak_C == -torch.inf, 0.0, peak_C)[:, None]).clamp_(min=FLOOR)
        power_CV = z_CV.exp2()
        parts_4R[0, rows], parts_4R[1, rows] = peak_C, power_CV.sum(-1)
        parts_4R[2, rows] = power_CV.mul_(z_CV).sum(-1)
        parts_4R[3, rows] = torch.where(here_R[rows], target_C, -torch.inf)
    return parts_4R


def logit_gradient_(
    logits_RV: torch.Tensor,
    targets_R: torch.Tensor,
    normalizer_R: torch.Tensor,
    entropy_R: torch.Tensor,
    grad_log_prob_R: torch.Tensor,
    grad_entropy_R: torch.Tensor,
    shard: VocabularyShard,
    temperature: float,
    *,
    with_entropy: bool,
) -> None:
    """Overwrite logits with d loss / d logits = (g_a ([y] - p) - g_b p (ln p + H)) / temperature.

    Computed in float32 and rounded once. Rows whose coefficients are both 0 are not read, only zeroed. `with_entropy`
    False: grad_entropy_R is known to be 0.
    """
    has_gradient_R = (grad_log_prob_R != 0) | (grad_entropy_R != 0)
    column_R, here_R = local_columns(targets_R, shard)
    if shard.width:
        for rows in _tiles(logits_RV, has_gradient_R):
            log2_p_CV = _scaled(logits_RV, rows, shard, temperature).sub_(normalizer_R[rows, None])
            grad_a_C = grad_log_prob_R[rows] / temperature
            if with_entropy:
                p_CV = log2_p_CV.exp2()
                slope_C = grad_entropy_R[rows] / temperature
                # The bracket g_a + g_b (ln p + H), as an affine function of log2 p.
                log2_p_CV.clamp_(min=FLOOR).mul_((slope_C * LN_2)[:, None])
                log2_p_CV.add_((grad_a_C + slope_C * entropy_R[rows])[:, None])
                grad_CV = log2_p_CV.mul_(p_CV).neg_()
            else:
                grad_CV = log2_p_CV.exp2_().mul_(-grad_a_C[:, None])
            grad_CV.scatter_add_(1, column_R[rows, None], torch.where(here_R[rows], grad_a_C, 0.0)[:, None])
            logits_RV[rows, : shard.width] = grad_CV.to(logits_RV.dtype)
    logits_RV[:, shard.width :] = 0
    idle_R = (~has_gradient_R).nonzero().squeeze(1)
    if len(idle_R):
        logits_RV.index_fill_(0, idle_R, 0)


def local_columns(targets_R: torch.Tensor, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target within the shard (0 where it lies elsewhere) and whether it lies here."""
    column_R = targets_R - shard.start
    here_R = (column_R >= 0) & (column_R < shard.width)
    return torch.where(here_R, column_R, 0), here_R


def _tiles(logits_RV: torch.Tensor, read_R: torch.Tensor | None) -> Iterator[slice | torch.Tensor]:
    """Rows to read, tile by tile: slices where all rows are read, index lists where some are left out."""
    size = max(1, TILE_ELEMENTS // max(1, logits_RV.shape[1]))
    rows = logits_RV.shape[0]
    if read_R is None or bool(read_R.all()):
        yield from (slice(start, min(start + size, rows)) for start in range(0, rows, size))
        return
    yield from read_R.nonzero().squeeze(1).split(size) if bool(read_R.any()) else ()


def _scaled(
    logits_RV: torch.Tensor, rows: slice | torch.Tensor, shard: VocabularyShard, temperature: float
) -> torch.Tensor:
    """A fresh float32 tile in the log2 domain."""
    return logits_RV[rows, : shard.width].float().mul(LOG2_E / temperature)
