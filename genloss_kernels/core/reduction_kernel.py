"""The kernel that adds up what the programs of a loss left behind."""

import triton
import triton.language as tl

from .triton_math import scalar


@triton.jit
def _total(partials_ptr, n, ZERO: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ZERO)
    for start in range(0, n, BLOCK):
        total += tl.load(partials_ptr + start + lane, mask=start + lane < n, other=0).to(ZERO)
    return tl.sum(total, axis=0)


@triton.jit
def _reduction_kernel(
    partials, outputs, divisor_ptr, n, divisor: tl.float64,
    BY_NORMALIZER: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum each of ``partials`` in a fixed order; divide the first sum, the loss, by its divisor."""
    if outputs[0] is not None:
        loss = _total(partials[0], n, DTYPE, BLOCK)
        if BY_NORMALIZER:
            normalizer = _total(partials[1], n, DTYPE, BLOCK)
            tl.store(outputs[1], normalizer)
            loss = loss / normalizer
        elif divisor_ptr is not None:
            loss = loss / tl.load(divisor_ptr).to(DTYPE)
        else:
            loss = loss / scalar(divisor, DTYPE)
        tl.store(outputs[0], loss)
    if outputs[2] is not None:
        tl.store(outputs[2], _total(partials[2], n, tl.int64, BLOCK))
    if outputs[3] is not None:
        tl.store(outputs[3], _total(partials[3], n, tl.int64, BLOCK))
