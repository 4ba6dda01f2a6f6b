"""Kernels of the cosine embedding loss: one pass over pairs of rows each way."""

import triton
import triton.language as tl

from ...core.triton_math import narrowed, scalar

# What torch adds to squared norms, 1e-12 in fp32; and the least scale of a row: at its root no square counts any more.
EPSILON = tl.constexpr(9.999999960041972e-13)
LEAST_SCALE = tl.constexpr(1e-6)

# In fp32 no number above has an inverse of full precision; the squares of what this scales stay below 2^4.
_LARGEST_SCALE = tl.constexpr(2.0**126)


@triton.jit
def _inverse(largest):
    if largest.dtype == tl.float32:
        largest = tl.where(largest > _LARGEST_SCALE, _LARGEST_SCALE, largest)
    return 1.0 / largest


@triton.jit
def _tile(pointer, row, stride, col, live, DTYPE: tl.constexpr):
    return tl.load(pointer + row[:, None] * stride + col[None, :], mask=live, other=0.0).to(DTYPE)


@triton.jit
def _label(target_ptr, row, row_live, target_stride):
    label = tl.load(target_ptr + row * target_stride, mask=row_live, other=0)
    return label == 1, label == -1


@triton.jit
def _cosine_forward_kernel(
    first_ptr, second_ptr, target_ptr, loss_ptr, partials_ptr, stats_ptr, first_stride, second_stride, target_stride,
    n_rows, n_cols, margin: tl.float64, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Loss of ROWS pairs, stored or added up; inverse norms and cosine are kept for the backward.

    Squares are of numbers divided by the row's largest one so far, and rescaled when that grows.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_live = row < n_rows
    first_largest = tl.full((ROWS,), LEAST_SCALE, DTYPE)
    second_largest = first_largest
    first_square = tl.zeros((ROWS, COLS), DTYPE)
    second_square = first_square
    product = first_square
    for start in range(0, n_cols, COLS):
        col = start + tl.arange(0, COLS)
        live = row_live[:, None] & (col < n_cols)[None, :]
        x = _tile(first_ptr, row, first_stride, col, live, DTYPE)
        y = _tile(second_ptr, row, second_stride, col, live, DTYPE)
        first_before = _inverse(first_largest)
        second_before = _inverse(second_largest)
        first_largest = tl.maximum(first_largest, tl.max(tl.abs(x), axis=1))
        second_largest = tl.maximum(second_largest, tl.max(tl.abs(y), axis=1))
        first_inverse = _inverse(first_largest)
        second_inverse = _inverse(second_largest)
        first_shrink = (first_inverse / first_before)[:, None]
        second_shrink = (second_inverse / second_before)[:, None]
        x = x * first_inverse[:, None]
        y = y * second_inverse[:, None]
        first_square = first_square * (first_shrink * first_shrink) + x * x
        second_square = second_square * (second_shrink * second_shrink) + y * y
        product = product * (first_shrink * second_shrink) + x * y
    first_inverse = _inverse(first_largest)
    second_inverse = _inverse(second_largest)
    first_norm = tl.sqrt(tl.sum(first_square, axis=1) + EPSILON * first_inverse * first_inverse)
    second_norm = tl.sqrt(tl.sum(second_square, axis=1) + EPSILON * second_inverse * second_inverse)
    cosine = tl.sum(product, axis=1) / first_norm / second_norm
    tl.store(stats_ptr + row, first_inverse / first_norm, mask=row_live)
    tl.store(stats_ptr + n_rows + row, second_inverse / second_norm, mask=row_live)
    tl.store(stats_ptr + 2 * n_rows + row, cosine, mask=row_live)
    alike, unlike = _label(target_ptr, row, row_live, target_stride)
    excess = cosine - scalar(margin, DTYPE)
    # NaN is not below 0.
    loss = tl.where(alike, 1.0 - cosine, tl.where(unlike & (excess < 0.0) | (unlike == 0), 0.0, excess))
    if loss_ptr is None:
        tl.store(partials_ptr + tl.program_id(0), tl.sum(tl.where(row_live, loss, 0.0), axis=0))
    else:
        tl.store(loss_ptr + row, loss, mask=row_live)


@triton.jit
def _store(pointer, place, gradient, live):
    tl.store(pointer + place, narrowed(gradient, pointer), mask=live)


@triton.jit
def _cosine_backward_kernel(
    first_ptr, second_ptr, target_ptr, stats_ptr, upstream_ptr, first_grad_ptr, second_grad_ptr,
    first_stride, second_stride, target_stride, upstream_stride, n_rows, n_cols,
    margin: tl.float64, divisor: tl.float64, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS pairs: each the other's direction less what of it lies along its own, over its norm."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_live = row < n_rows
    first_inverse = tl.load(stats_ptr + row, mask=row_live, other=0.0)
    second_inverse = tl.load(stats_ptr + n_rows + row, mask=row_live, other=0.0)
    cosine = tl.load(stats_ptr + 2 * n_rows + row, mask=row_live, other=0.0)
    alike, unlike = _label(target_ptr, row, row_live, target_stride)
    active = unlike & (cosine - scalar(margin, DTYPE) >= 0.0)
    upstream = tl.load(upstream_ptr + row * upstream_stride, mask=row_live, other=0.0).to(DTYPE) / scalar(divisor, DTYPE)
    slope = tl.where(alike, -upstream, tl.where(active, upstream, 0.0))
    for start in range(0, n_cols, COLS):
        col = start + tl.arange(0, COLS)
        live = row_live[:, None] & (col < n_cols)[None, :]
        x = _tile(first_ptr, row, first_stride, col, live, DTYPE) * first_inverse[:, None]
        y = _tile(second_ptr, row, second_stride, col, live, DTYPE) * second_inverse[:, None]
        place = row[:, None] * n_cols + col[None, :]
        if first_grad_ptr is not None:
            _store(first_grad_ptr, place, (slope * first_inverse)[:, None] * (y - cosine[:, None] * x), live)
        if second_grad_ptr is not None:
            _store(second_grad_ptr, place, (slope * second_inverse)[:, None] * (x - cosine[:, None] * y), live)
