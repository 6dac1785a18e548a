"""Per-token loss, gradient coefficients and flags from merged statistics: O(1) bytes per row.

The formulas are those of `torch_rows.token_loss`, written with compare and select: hardware min/max drop NaN.
Triton only; no torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def kl_term(gap, kl_bound, KL: tl.constexpr):
    """(estimate, derivative by the log-prob) for gap = log_prob - reference; KL: 1, 2, 3 = k1, k2, k3."""
    if KL == 1:
        value = gap
        slope = gap * 0.0 + 1.0
    elif KL == 2:
        value = 0.5 * gap * gap
        slope = gap
    else:
        x = -gap
        direct = tl.exp2(x * LOG2_E) - 1.0
        # exp(x) - 1 - x cancels near 0: the series is exact to float32 there.
        tail = 0.5 * x * x * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0)))
        near = tl.abs(x) < 0.0625
        value = tl.where(near, tail, direct - x)
        slope = tl.where(near, -(x + tail), -direct)
        slope = tl.where(value > kl_bound, 0.0, slope)
        value = tl.where(value > kl_bound, kl_bound, value)
    return value, slope


@triton.jit
def row_loss(
    log_prob,
    entropy,
    old,
    reference,
    sampler,
    advantage,
    weight,
    carries,
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
):
    """(loss, d loss / d log_prob, d loss / d entropy, flags). Bounds are natural logs. Inputs of rows that carry
    nothing are 0: callers load with a mask."""
    rejected = carries & ((advantage != advantage) | (tl.abs(advantage) == INFINITY))
    usable = tl.where(rejected, 0.0, advantage)
    scaled = usable
    if IMPORTANCE:
        importance = tl.exp2((old - sampler) * LOG2_E)
        scaled = usable * tl.where(importance > importance_cap, importance_cap, importance)
    signal = carries & (usable != 0.0) & (scaled != 0.0)
    scaled = tl.where(signal, scaled, 0.0)
    log_ratio = tl.where(signal, log_prob - old, 0.0)
    below = log_ratio < preclip_low
    above = log_ratio > preclip_high
    log_ratio = tl.where(below, preclip_low, tl.where(above, preclip_high, log_ratio))
    negative = scaled < 0.0
    positive = scaled > 0.0
    clipped_low = negative & (log_ratio < clip_low)
    upper = tl.where(positive, clip_high, dual_clip)
    clipped_high = (positive | negative) & (log_ratio > upper)
    log_ratio = tl.where(clipped_low, clip_low, tl.where(clipped_high, upper, log_ratio))
    loss = tl.where(signal, -tl.exp2(log_ratio * LOG2_E) * scaled, 0.0)
    slope = tl.where(below | above | clipped_low | clipped_high, 0.0, loss)
    if KL != 0:
        value, derivative = kl_term(log_prob - reference, kl_bound, KL)
        loss += kl_coefficient * value
        slope += kl_coefficient * derivative
    loss -= tl.where(entropy_coefficient != 0.0, entropy_coefficient * entropy, 0.0)
    loss = tl.where(carries, loss * weight, 0.0)
    slope = tl.where(carries, slope * weight, 0.0)
    entropy_slope = tl.where(carries, -entropy_coefficient * weight, 0.0)
    broken = (loss != loss) | (tl.abs(loss) == INFINITY) | (slope != slope) | (tl.abs(slope) == INFINITY)
    flags = carries.to(tl.int32) + rejected.to(tl.int32) * 2
    flags += below.to(tl.int32) * 4 + above.to(tl.int32) * 8
    flags += clipped_low.to(tl.int32) * 16 + clipped_high.to(tl.int32) * 32
    flags += broken.to(tl.int32) * 64
    return loss, slope, entropy_slope, flags


@triton.jit
def merge_ranks(parts_ptr, ranks, rows, row, inside, BLOCK: tl.constexpr):
    """Statistics of whole rows from parts[ranks, 4, rows], added in rank order: the same bits on every rank."""
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    target_z = tl.full([BLOCK], float("-inf"), tl.float32)
    for rank in range(ranks):
        part = parts_ptr + rank * 4 * rows + row
        other_peak = tl.load(part, mask=inside, other=NEGATIVE_INFINITY)
        other_total = tl.load(part + rows, mask=inside, other=0.0)
        other_weighted = tl.load(part + 2 * rows, mask=inside, other=0.0)
        other_target = tl.load(part + 3 * rows, mask=inside, other=NEGATIVE_INFINITY)
        merged = tl.where(other_peak > peak, other_peak, peak)
        shift = tl.where(peak == NEGATIVE_INFINITY, 0.0, peak - merged)
        other_shift = tl.where(other_peak == NEGATIVE_INFINITY, 0.0, other_peak - merged)
        decay = tl.where(peak == NEGATIVE_INFINITY, 0.0, tl.exp2(shift))
        other_decay = tl.where(other_peak == NEGATIVE_INFINITY, 0.0, tl.exp2(other_shift))
        weighted = decay * (weighted + total * shift) + other_decay * (other_weighted + other_total * other_shift)
        total = decay * total + other_decay * other_total
        peak = merged
        target_z = tl.where(other_target > target_z, other_target, target_z)
    return peak, total, weighted, target_z


@triton.jit
def loss_kernel(
    parts_ptr,
    ranks,
    rows,
    old_ptr,
    advantage_ptr,
    weight_ptr,
    reference_ptr,
    sampler_ptr,
    log_prob_ptr,
    entropy_ptr,
    loss_ptr,
    grad_log_prob_ptr,
    grad_entropy_ptr,
    normalizer_ptr,
    flags_ptr,
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
    BLOCK: tl.constexpr,
):
    """Merge the ranks' parts and evaluate the loss of each row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    peak, total, weighted, target_z = merge_ranks(parts_ptr, ranks, rows, row, inside, BLOCK)
    total = tl.where(inside, total, 1.0)
    normalizer = peak + tl.log2(total)
    log_prob = (target_z - normalizer) * LN_2
    entropy = (tl.log2(total) - weighted / total) * LN_2
    weight = tl.load(weight_ptr + row, mask=inside, other=0.0)
    carries = inside & (weight != 0.0)
    old = tl.load(old_ptr + row, mask=carries, other=0.0)
    advantage = tl.load(advantage_ptr + row, mask=carries, other=0.0)
    reference = tl.zeros([BLOCK], tl.float32)
    sampler = tl.zeros([BLOCK], tl.float32)
    if KL != 0:
        reference = tl.load(reference_ptr + row, mask=carries, other=0.0)
    if IMPORTANCE:
        sampler = tl.load(sampler_ptr + row, mask=carries, other=0.0)
    loss, slope, entropy_slope, flags = row_loss(
        log_prob, entropy, old, reference, sampler, advantage, weight, carries,
        preclip_low, preclip_high, clip_low, clip_high, dual_clip,
        importance_cap, kl_coefficient, kl_bound, entropy_coefficient, KL, IMPORTANCE,
    )  # fmt: skip
    tl.store(log_prob_ptr + row, log_prob, mask=inside)
    tl.store(entropy_ptr + row, entropy, mask=inside)
    tl.store(loss_ptr + row, loss, mask=inside)
    tl.store(grad_log_prob_ptr + row, slope, mask=inside)
    tl.store(grad_entropy_ptr + row, entropy_slope, mask=inside)
    tl.store(normalizer_ptr + row, normalizer, mask=inside)
    tl.store(flags_ptr + row, flags, mask=inside)
