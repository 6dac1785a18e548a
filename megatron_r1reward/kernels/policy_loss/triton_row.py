"""The whole loss of one row in one program (no vocabulary parallelism): statistics, loss and gradient over the logits.

The second read of the row is expected in the L2 cache. The upstream gradient is taken as 1. Triton only; no torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_r1reward.kernels.policy_loss.triton_gradient import row_gradient, zero_row
from megatron_r1reward.kernels.policy_loss.triton_loss import row_loss
from megatron_r1reward.kernels.policy_loss.triton_softmax import row_statistics

LN_2 = tl.constexpr(0.6931471805599453)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def row_kernel(
    logits_ptr,
    row_stride,
    targets_ptr,
    old_ptr,
    advantage_ptr,
    weight_ptr,
    reference_ptr,
    sampler_ptr,
    log_prob_ptr,
    entropy_ptr,
    loss_ptr,
    has_gradient_ptr,
    flags_ptr,
    columns,
    padded_columns,
    scale,
    inverse_temperature,
    preclip_low,
    preclip_high,
    clip_low,
    clip_high,
    dual_clip,
    importance_cap,
    kl_coefficient,
    kl_bound,
    entropy_coefficient,
    KL: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Branches instead of an early return: that makes Triton spill registers."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    target_column = tl.load(targets_ptr + row)
    # Before the statistics: their reductions hold the barriers that keep a faster warp from overwriting this column
    # while a slower one still has to read it.
    here = (target_column >= 0) & (target_column < columns)
    target = tl.load(row_ptr + tl.where(here, target_column, 0), mask=here, other=NEGATIVE_INFINITY)
    peak, total, weighted = row_statistics(row_ptr, columns, scale, BLOCK)
    normalizer = peak + tl.log2(total)
    log_prob = (target.to(tl.float32) * scale - normalizer) * LN_2
    entropy = (tl.log2(total) - weighted / total) * LN_2
    weight = tl.load(weight_ptr + row)
    carries = weight != 0.0
    old = tl.load(old_ptr + row, mask=carries, other=0.0)
    advantage = tl.load(advantage_ptr + row, mask=carries, other=0.0)
    reference = 0.0
    sampler = 0.0
    if KL != 0:
        reference = tl.load(reference_ptr + row, mask=carries, other=0.0)
    if IMPORTANCE:
        sampler = tl.load(sampler_ptr + row, mask=carries, other=0.0)
    loss, slope, entropy_slope, flags = row_loss(
        log_prob, entropy, old, reference, sampler, advantage, weight, carries,
        preclip_low, preclip_high, clip_low, clip_high, dual_clip,
        importance_cap, kl_coefficient, kl_bound, entropy_coefficient, KL, IMPORTANCE,
    )  # fmt: skip
    has_gradient = (slope != 0.0) | (entropy_slope != 0.0)
    tl.store(log_prob_ptr + row, log_prob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(loss_ptr + row, loss)
    tl.store(has_gradient_ptr + row, has_gradient.to(tl.int8))
    tl.store(flags_ptr + row, flags)
    if has_gradient:
        row_gradient(
            row_ptr, columns, padded_columns, scale, inverse_temperature, target_column,
            normalizer, entropy, slope, entropy_slope, BLOCK, ENTROPY, True,
        )  # fmt: skip
    else:
        zero_row(row_ptr, padded_columns, BLOCK)
