"""One read of a row: its softmax statistics. Row-parallel, no atomics: the same bits on every run.

Formulas and the log2 domain: `row_kernels`. Triton only; no torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def row_statistics(row_ptr, columns, scale, BLOCK: tl.constexpr):
    """(peak, total, weighted) of one row, z = logit * scale; one cross-warp reduction per block (the maximum).

    `total` and `weighted` stay per-lane vectors until the end.
    """
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + column, mask=column < columns, other=NEGATIVE_INFINITY).to(tl.float32) * scale
        new_peak = tl.maximum(peak, tl.max(z, 0))
        # While everything so far is -inf, -inf - -inf would be NaN.
        anchor = tl.where(new_peak == NEGATIVE_INFINITY, 0.0, new_peak)
        shift = tl.where(peak == NEGATIVE_INFINITY, 0.0, peak - anchor)
        decay = tl.where(peak == NEGATIVE_INFINITY, 0.0, tl.exp2(shift))
        distance = z - anchor
        power = tl.exp2(distance)
        # power > 0 leaves out -inf * 0; power != power lets a NaN logit through.
        term = tl.where((power > 0.0) | (power != power), power * distance, 0.0)
        weighted = decay * (weighted + total * shift) + term
        total = total * decay + power
        peak = new_peak
    return peak, tl.sum(total, 0), tl.sum(weighted, 0)


@triton.jit
def statistics_kernel(
    logits_ptr,
    row_stride,
    targets_ptr,
    parts_ptr,
    rows,
    columns,
    first_column,
    scale,
    BLOCK: tl.constexpr,
):
    """parts[4, rows] of this shard."""
    row = tl.program_id(0).to(tl.int64)  # row * row_stride passes 2^31
    row_ptr = logits_ptr + row * row_stride
    peak, total, weighted = row_statistics(row_ptr, columns, scale, BLOCK)
    column = tl.load(targets_ptr + row) - first_column
    here = (column >= 0) & (column < columns)
    target = tl.load(row_ptr + tl.where(here, column, 0), mask=here, other=NEGATIVE_INFINITY)
    tl.store(parts_ptr + row, peak)
    tl.store(parts_ptr + rows + row, total)
    tl.store(parts_ptr + 2 * rows + row, weighted)
    tl.store(parts_ptr + 3 * rows + row, target.to(tl.float32) * scale)
