"""A loss of two terms over tensors of their own, in one grid: the first programs take the first."""

import triton
import triton.language as tl

from .elementwise_kernel import differentiate, evaluate, span
from .reduction_kernel import _total
from .triton_math import scalar


@triton.jit
def _term_sum(
    program, operands, shape, magics, strides, sizes, s0,
    VALUE: tl.constexpr, FLAGS: tl.constexpr, KINDS: tl.constexpr, SMALL: tl.constexpr, SAMPLE: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    nothing = scalar(0.0, DTYPE)
    _, low, high = span(program, sizes[0], sizes[1], sizes[2], sizes[3], SAMPLE)
    total, _ = evaluate(
        operands, low, high, shape, magics, strides, None, scalar(s0, DTYPE), nothing, nothing,
        VALUE, FLAGS, KINDS, SMALL, False, DTYPE, BLOCK,
    )  # fmt: skip
    return tl.sum(total, axis=0)


@triton.jit
def _pair_forward_kernel(
    operands, shapes, magics, strides, sizes, partials, first_programs, first_s0: tl.float64, second_s0: tl.float64,
    FIRST_VALUE: tl.constexpr, SECOND_VALUE: tl.constexpr, FIRST_FLAGS: tl.constexpr, SECOND_FLAGS: tl.constexpr,
    FIRST_KINDS: tl.constexpr, SECOND_KINDS: tl.constexpr, FIRST_SMALL: tl.constexpr, SECOND_SMALL: tl.constexpr,
    FIRST_SAMPLE: tl.constexpr, SECOND_SAMPLE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of a term's values over what this program covers."""
    program = tl.program_id(0)
    if program < first_programs:
        total = _term_sum(
            program, operands[0], shapes[0], magics[0], strides[0], sizes[0], first_s0,
            FIRST_VALUE, FIRST_FLAGS, FIRST_KINDS, FIRST_SMALL, FIRST_SAMPLE, DTYPE, BLOCK,
        )  # fmt: skip
        tl.store(partials[0] + program, total)
    else:
        total = _term_sum(
            program - first_programs, operands[1], shapes[1], magics[1], strides[1], sizes[1], second_s0,
            SECOND_VALUE, SECOND_FLAGS, SECOND_KINDS, SECOND_SMALL, SECOND_SAMPLE, DTYPE, BLOCK,
        )  # fmt: skip
        tl.store(partials[1] + program - first_programs, total)


@triton.jit
def _beta(beta, beta_ptr, DTYPE: tl.constexpr):
    if beta_ptr is None:
        value = scalar(beta, DTYPE)
    else:
        value = tl.load(beta_ptr).to(DTYPE)
    return value


@triton.jit
def _sample_sums(partials_ptr, sample, live, segments, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the segments of BLOCK samples, each in its order."""
    total = tl.zeros((BLOCK,), DTYPE)
    for segment in range(segments):
        total += tl.load(partials_ptr + sample * segments + segment, mask=live, other=0.0)
    return total


@triton.jit
def _pair_total_kernel(
    partials, outputs, sums_ptr, beta_ptr, first_count, second_count, segments,
    beta: tl.float64, capacity: tl.float64, first_divisor: tl.float64, second_divisor: tl.float64,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both terms, each divided, and their sum; with ``sums_ptr`` the second adds up the samples' distances from capacity."""
    first = _total(partials[0], first_count, DTYPE, BLOCK)
    if sums_ptr is None:
        second = _total(partials[1], second_count, DTYPE, BLOCK)
    else:
        lane = tl.arange(0, BLOCK)
        distances = tl.zeros((BLOCK,), DTYPE)
        for start in range(0, second_count, BLOCK):
            sample = (start + lane).to(tl.int64)
            live = sample < second_count
            sums = _sample_sums(partials[1], sample, live, segments, DTYPE, BLOCK)
            tl.store(sums_ptr + sample, sums, mask=live)
            distances += tl.where(live, tl.abs(sums - scalar(capacity, DTYPE)), 0.0)
        second = tl.sum(distances, axis=0)
    first = first / scalar(first_divisor, DTYPE)
    second = second / scalar(second_divisor, DTYPE)
    tl.store(outputs[0], first + _beta(beta, beta_ptr, DTYPE) * second)
    tl.store(outputs[1], first)
    tl.store(outputs[2], second)


@triton.jit
def _pair_samples_kernel(
    partials, outputs, sums_ptr, beta_ptr, n_samples, first_segments, second_segments,
    beta: tl.float64, capacity: tl.float64, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The terms and their sum of each sample."""
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = sample < n_samples
    first = _sample_sums(partials[0], sample, live, first_segments, DTYPE, BLOCK)
    second = _sample_sums(partials[1], sample, live, second_segments, DTYPE, BLOCK)
    if sums_ptr is not None:
        tl.store(sums_ptr + sample, second, mask=live)
        second = tl.abs(second - scalar(capacity, DTYPE))
    tl.store(outputs[0] + sample, first + _beta(beta, beta_ptr, DTYPE) * second, mask=live)
    tl.store(outputs[1] + sample, first, mask=live)
    tl.store(outputs[2] + sample, second, mask=live)


@triton.jit
def _upstream(pointer, stride, sample, DTYPE: tl.constexpr):
    value = scalar(0.0, DTYPE)
    if pointer is not None:
        value += tl.load(pointer + sample * stride).to(DTYPE)
    return value


@triton.jit
def _term_gradients(
    operands, grads, upstream, low, high, shape, magics, strides, divisor, s0,
    GRADIENT: tl.constexpr, FLAGS: tl.constexpr, KINDS: tl.constexpr, SMALL: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    nothing = scalar(0.0, DTYPE)
    # As in a reduction by sample the upstream gradient is one number here, which this program has read.
    differentiate(
        operands, grads, upstream, low, high, shape, magics, strides, scalar(divisor, DTYPE),
        scalar(s0, DTYPE), nothing, nothing, GRADIENT, FLAGS, KINDS, SMALL, True, DTYPE, BLOCK,
    )  # fmt: skip


@triton.jit
def _pair_backward_kernel(
    operands, shapes, magics, strides, sizes, grads, upstreams, upstream_strides, sums_ptr, beta_ptr, first_programs,
    beta: tl.float64, capacity: tl.float64, first_divisor: tl.float64, second_divisor: tl.float64,
    first_s0: tl.float64, second_s0: tl.float64,
    FIRST_GRADIENT: tl.constexpr, SECOND_GRADIENT: tl.constexpr, FIRST_FLAGS: tl.constexpr, SECOND_FLAGS: tl.constexpr,
    FIRST_KINDS: tl.constexpr, SECOND_KINDS: tl.constexpr, FIRST_SMALL: tl.constexpr, SECOND_SMALL: tl.constexpr,
    FIRST_SAMPLE: tl.constexpr, SECOND_SAMPLE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one term, whose upstream gradient is the sum's and its own."""
    program = tl.program_id(0)
    if program < first_programs:
        size = sizes[0]
        sample, low, high = span(program, size[0], size[1], size[2], size[3], FIRST_SAMPLE)
        upstream = _upstream(upstreams[0], upstream_strides[0], sample, DTYPE)
        upstream += _upstream(upstreams[1], upstream_strides[1], sample, DTYPE)
        _term_gradients(
            operands[0], grads[0], upstream, low, high, shapes[0], magics[0], strides[0], first_divisor, first_s0,
            FIRST_GRADIENT, FIRST_FLAGS, FIRST_KINDS, FIRST_SMALL, DTYPE, BLOCK,
        )  # fmt: skip
    else:
        size = sizes[1]
        sample, low, high = span(program - first_programs, size[0], size[1], size[2], size[3], SECOND_SAMPLE)
        upstream = _upstream(upstreams[2], upstream_strides[2], sample, DTYPE)
        if upstreams[0] is not None:
            upstream += _beta(beta, beta_ptr, DTYPE) * _upstream(upstreams[0], upstream_strides[0], sample, DTYPE)
        if sums_ptr is not None:
            over = tl.load(sums_ptr + sample) - scalar(capacity, DTYPE)
            upstream = tl.where(over > 0.0, upstream, tl.where(over < 0.0, -upstream, over))
        _term_gradients(
            operands[1], grads[1], upstream, low, high, shapes[1], magics[1], strides[1], second_divisor, second_s0,
            SECOND_GRADIENT, SECOND_FLAGS, SECOND_KINDS, SECOND_SMALL, DTYPE, BLOCK,
        )  # fmt: skip
