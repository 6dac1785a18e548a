"""d loss / d logits, written over the logits: one read and one write of a row that has a gradient, one write of a row
that has none. Triton only; no torch."""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def row_gradient(
    row_ptr,
    columns,
    padded_columns,
    scale,
    inverse_temperature,
    target_column,
    normalizer,
    entropy,
    grad_log_prob,
    grad_entropy,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Overwrite the row with (g_a ([y] - p) - g_b p (ln p + H)) / temperature, computed in float32 and rounded once;
    padding columns with 0.

    REVERSE starts with the columns that were read last: they are still in the cache.
    """
    blocks = tl.cdiv(padded_columns, BLOCK)
    for index in range(blocks):
        if REVERSE:
            start = (blocks - 1 - index) * BLOCK
        else:
            start = index * BLOCK
        column = start + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + column, mask=column < columns, other=NEGATIVE_INFINITY).to(tl.float32) * scale
        log2_p = z - normalizer
        p = tl.exp2(log2_p)
        gradient = -grad_log_prob * p
        if ENTROPY:
            # p == 0 has ln p = -inf; a NaN must get through.
            gradient -= grad_entropy * tl.where(p == 0.0, 0.0, p * (log2_p * LN_2 + entropy))
        gradient = tl.where(column == target_column, gradient + grad_log_prob, gradient) * inverse_temperature
        gradient = tl.where(column < columns, gradient, 0.0)
        tl.store(row_ptr + column, gradient.to(row_ptr.dtype.element_ty), mask=column < padded_columns)


@triton.jit
def zero_row(row_ptr, padded_columns, BLOCK: tl.constexpr):
    """Fill a row with zeros."""
    for start in range(0, padded_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(row_ptr + column, tl.zeros([BLOCK], row_ptr.dtype.element_ty), mask=column < padded_columns)


@triton.jit
def gradient_kernel(
    logits_ptr,
    row_stride,
    targets_ptr,
    normalizer_ptr,
    entropy_ptr,
    grad_log_prob_ptr,
    grad_entropy_ptr,
    columns,
    padded_columns,
    first_column,
    scale,
    inverse_temperature,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """One row per program; rows whose coefficients are both 0 are not read."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    grad_log_prob = tl.load(grad_log_prob_ptr + row)
    grad_entropy = tl.load(grad_entropy_ptr + row)
    row_ptr = logits_ptr + row * row_stride
    if (grad_log_prob != 0.0) | (grad_entropy != 0.0):
        target_column = tl.load(targets_ptr + row) - first_column
        row_gradient(
            row_ptr, columns, padded_columns, scale, inverse_temperature, target_column,
            tl.load(normalizer_ptr + row), tl.load(entropy_ptr + row), grad_log_prob, grad_entropy,
            BLOCK, ENTROPY, False,
        )  # fmt: skip
    else:
        zero_row(row_ptr, padded_columns, BLOCK)
