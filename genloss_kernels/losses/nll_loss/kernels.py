"""Kernels of the negative log-likelihood: a gather and a sum forward, one element a row backward."""

import triton
import triton.language as tl

from ...core.rows import row_offset


@triton.jit
def _labels(target_ptr, row, row_live, shape, target_strides, n_cols, ignore_index):
    """Labels of rows; which rows have a valid one, and which a valid label out of range."""
    label = tl.load(target_ptr + row_offset(row, shape, target_strides), mask=row_live, other=0).to(tl.int64)
    counted = row_live & (label != ignore_index)
    inside = (label >= 0) & (label < n_cols)
    return label, counted & inside, counted & (inside == 0)


@triton.jit
def _nll_forward_kernel(
    input_ptr, target_ptr, weight_ptr, loss_ptr, partials, shape, input_strides, target_strides, input_stride_col,
    n_rows, n_cols, ignore_index, REDUCE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program gathers BLOCK rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_live = row < n_rows
    label, valid, outside = _labels(target_ptr, row, row_live, shape, target_strides, n_cols, ignore_index)
    place = row_offset(row, shape, input_strides) + label * input_stride_col
    log_probability = tl.load(input_ptr + place, mask=valid, other=0.0).to(DTYPE)
    if weight_ptr is None:
        weight = tl.where(valid, 1.0, 0.0).to(DTYPE)
    else:
        weight = tl.load(weight_ptr + label, mask=valid, other=0.0).to(DTYPE)
    loss = -weight * log_probability
    # A label out of range must not pass for a loss.
    loss = tl.where(outside, float("nan"), loss)
    if REDUCE:
        tl.store(partials[0] + tl.program_id(0), tl.sum(loss, axis=0))
        if partials[1] is not None:
            tl.store(partials[1] + tl.program_id(0), tl.sum(weight, axis=0))
    else:
        tl.store(loss_ptr + row, loss, mask=row_live)


@triton.jit
def _nll_backward_kernel(
    target_ptr, weight_ptr, divisor_ptr, grad_loss_ptr, grad_ptr, grad_loss_stride,
    shape, target_strides, grad_strides, grad_stride_col, n_rows, n_cols, ignore_index,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes the gradient at BLOCK rows' labels; everything else was set to 0 before."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_live = row < n_rows
    label, valid, outside = _labels(target_ptr, row, row_live, shape, target_strides, n_cols, ignore_index)
    grad = tl.load(grad_loss_ptr + row * grad_loss_stride, mask=row_live, other=0.0).to(DTYPE)
    if weight_ptr is not None:
        grad = grad * tl.load(weight_ptr + label, mask=valid, other=0.0).to(DTYPE)
    if divisor_ptr is not None:
        grad = grad / tl.load(divisor_ptr)
    offset = row_offset(row, shape, grad_strides)
    tl.store(grad_ptr + offset + label * grad_stride_col, -grad, mask=valid)
    if tl.max(outside.to(tl.int32), axis=0) > 0:
        for col in range(n_cols):
            place = offset + tl.cast(col, tl.int64) * grad_stride_col
            tl.store(grad_ptr + place, tl.full((BLOCK,), float("nan"), DTYPE), mask=outside)
