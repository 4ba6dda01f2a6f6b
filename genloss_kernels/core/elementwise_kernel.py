"""One kernel pair for every loss that maps elements and then adds them up; a family supplies its formulas.

Operands are walked in one flat order, that of the dense ones. Each has a kind, two bits of KINDS: 0 absent, read as 1.0;
1 dense; 2 a single element; 3 broadcast or strided, found from the flat index by at most two divisions.
"""

import triton
import triton.language as tl

from .triton_math import narrowed, scalar

DENSE = tl.constexpr(1)
SINGLE = tl.constexpr(2)
STRIDED = tl.constexpr(3)


@triton.jit
def _strided_offset(base, lane, shape, magics, strides, SMALL: tl.constexpr):
    """Offsets of the flat indices base + lane in an operand with ``strides`` over ``shape``.

    Only the remainder of the base is divided by lane: below twice the size, so that one comparison does, or in a SMALL
    dimension so small that multiplying by ceil(2^32 / size) is exact.
    """
    offset = lane.to(tl.int64) * 0
    carry = lane
    rest = base
    for dim in tl.static_range(len(shape) - 1, 0, -1):
        size = shape[dim]
        within = (rest % size).to(tl.int32) + carry
        if (SMALL >> dim) & 1:
            carry = tl.umulhi(within.to(tl.uint32), magics[dim].to(tl.uint32)).to(tl.int32)
            within = within - carry * size
        else:
            carry = (within >= size).to(tl.int32)
            within = within - carry * size
        offset += within.to(tl.int64) * strides[dim]
        rest = rest // size
    return offset + (rest + carry) * strides[0]


@triton.jit
def _operand(
    pointer, base, lane, shape, magics, strides, live,
    KIND: tl.constexpr, SMALL: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    if KIND == 0:
        value = tl.full(lane.shape, 1.0, DTYPE)
    elif KIND == SINGLE:
        value = tl.full(lane.shape, 0.0, DTYPE) + tl.load(pointer).to(DTYPE)
    else:
        if KIND == DENSE:
            pointers = pointer + base + lane
        else:
            pointers = pointer + _strided_offset(base, lane, shape, magics, strides, SMALL)
        if MASKED:
            value = tl.load(pointers, mask=live, other=0).to(DTYPE)
        else:
            value = tl.load(pointers).to(DTYPE)
    return value


@triton.jit
def span(program, n_elements, sample_size, segments, chunk, SAMPLE: tl.constexpr):
    """Sample and flat range of a program."""
    if SAMPLE:
        sample = (program // segments).to(tl.int64)
        low = sample * sample_size + (program % segments).to(tl.int64) * chunk
        high = tl.minimum(low + chunk, (sample + 1) * sample_size)
    else:
        sample = tl.full((), 0, tl.int64)
        low = program.to(tl.int64) * chunk
        high = tl.minimum(low + chunk, n_elements)
    return sample, low, high


@triton.jit
def _value_tile(
    operands, base, low, high, shape, magics, strides, loss_ptr, s0, s1, s2,
    VALUE: tl.constexpr, FLAGS: tl.constexpr, KINDS: tl.constexpr, SMALL: tl.constexpr,
    STORE: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    live = (base + lane >= low) & (base + lane < high)
    a = _operand(operands[0], base, lane, shape, magics, strides[0], live, KINDS & 3, SMALL, MASKED, DTYPE)
    b = _operand(operands[1], base, lane, shape, magics, strides[1], live, (KINDS >> 2) & 3, SMALL, MASKED, DTYPE)
    c = _operand(operands[2], base, lane, shape, magics, strides[2], live, (KINDS >> 4) & 3, SMALL, MASKED, DTYPE)
    d = _operand(operands[3], base, lane, shape, magics, strides[3], live, (KINDS >> 6) & 3, SMALL, MASKED, DTYPE)
    value = VALUE(a, b, c, d, s0, s1, s2, FLAGS)
    kept = tl.full(lane.shape, 1, tl.int32)
    if (KINDS >> 8) & 3:
        mask = _operand(operands[4], base, lane, shape, magics, strides[4], live, (KINDS >> 8) & 3, SMALL, MASKED, tl.int32)
        kept = (mask != 0).to(tl.int32)
        value = tl.where(mask != 0, value, 0.0)
    if MASKED:
        kept = tl.where(live, kept, 0)
    if STORE:
        if MASKED:
            tl.store(loss_ptr + base + lane, value, mask=live)
        else:
            tl.store(loss_ptr + base + lane, value)
    elif MASKED:
        value = tl.where(live, value, 0.0)
    return value, kept


@triton.jit
def evaluate(
    operands, low, high, shape, magics, strides, loss_ptr, s0, s1, s2,
    VALUE: tl.constexpr, FLAGS: tl.constexpr, KINDS: tl.constexpr, SMALL: tl.constexpr,
    STORE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values from ``low`` to ``high``, stored or added up by lane, and by lane how many the mask keeps."""
    start = tl.multiple_of(low // 16 * 16, 16)
    total = tl.zeros((BLOCK,), DTYPE)
    count = tl.zeros((BLOCK,), tl.int32)
    for tile in range(tl.cdiv(high - start, BLOCK).to(tl.int32)):
        base = start + tl.cast(tile, tl.int64) * BLOCK
        if (base >= low) & (base + BLOCK <= high):
            value, kept = _value_tile(
                operands, base, low, high, shape, magics, strides, loss_ptr, s0, s1, s2,
                VALUE, FLAGS, KINDS, SMALL, STORE, False, DTYPE, BLOCK,
            )  # fmt: skip
        else:
            value, kept = _value_tile(
                operands, base, low, high, shape, magics, strides, loss_ptr, s0, s1, s2,
                VALUE, FLAGS, KINDS, SMALL, STORE, True, DTYPE, BLOCK,
            )  # fmt: skip
        total += value
        count += kept
    return total, count


@triton.jit
def _elementwise_forward_kernel(
    operands, shape, magics, strides, loss_ptr, partials, n_elements, sample_size, segments, chunk,
    s0: tl.float64, s1: tl.float64, s2: tl.float64,
    VALUE: tl.constexpr, FLAGS: tl.constexpr, KINDS: tl.constexpr, SMALL: tl.constexpr,
    STORE: tl.constexpr, SAMPLE: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Value of each element, or its sum over what this program covers."""
    s0 = scalar(s0, DTYPE)
    s1 = scalar(s1, DTYPE)
    s2 = scalar(s2, DTYPE)
    _, low, high = span(tl.program_id(0), n_elements, sample_size, segments, chunk, SAMPLE)
    total, count = evaluate(
        operands, low, high, shape, magics, strides, loss_ptr, s0, s1, s2, VALUE, FLAGS, KINDS, SMALL, STORE, DTYPE, BLOCK
    )
    if not STORE:
        tl.store(partials[0] + tl.program_id(0), tl.sum(total, axis=0))
    if COUNT:
        tl.store(partials[1] + tl.program_id(0), tl.sum(count, axis=0))


@triton.jit
def _store_gradient(pointer, position, gradient, live, MASKED: tl.constexpr):
    if pointer is not None:
        gradient = narrowed(gradient, pointer)
        if MASKED:
            tl.store(pointer + position, gradient, mask=live)
        else:
            tl.store(pointer + position, gradient)


@triton.jit
def _gradient_tile(
    operands, grads, upstream, base, low, high, shape, magics, strides, divisor, s0, s1, s2,
    GRADIENT: tl.constexpr, FLAGS: tl.constexpr, KINDS: tl.constexpr, SMALL: tl.constexpr,
    SAMPLE: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    live = (base + lane >= low) & (base + lane < high)
    a = _operand(operands[0], base, lane, shape, magics, strides[0], live, KINDS & 3, SMALL, MASKED, DTYPE)
    b = _operand(operands[1], base, lane, shape, magics, strides[1], live, (KINDS >> 2) & 3, SMALL, MASKED, DTYPE)
    c = _operand(operands[2], base, lane, shape, magics, strides[2], live, (KINDS >> 4) & 3, SMALL, MASKED, DTYPE)
    d = _operand(operands[3], base, lane, shape, magics, strides[3], live, (KINDS >> 6) & 3, SMALL, MASKED, DTYPE)
    if SAMPLE:
        grad = tl.full(lane.shape, 0.0, DTYPE) + upstream
    else:
        grad = _operand(operands[5], base, lane, shape, magics, strides[5], live, (KINDS >> 10) & 3, SMALL, MASKED, DTYPE)
    grad = grad / divisor
    da, db, dc, dd = GRADIENT(a, b, c, d, s0, s1, s2, FLAGS)
    da = da * grad
    db = db * grad
    dc = dc * grad
    dd = dd * grad
    if (KINDS >> 8) & 3:
        mask = _operand(operands[4], base, lane, shape, magics, strides[4], live, (KINDS >> 8) & 3, SMALL, MASKED, tl.int32)
        da = tl.where(mask != 0, da, 0.0)
        db = tl.where(mask != 0, db, 0.0)
        dc = tl.where(mask != 0, dc, 0.0)
        dd = tl.where(mask != 0, dd, 0.0)
    position = base + lane
    _store_gradient(grads[0], position, da, live, MASKED)
    _store_gradient(grads[1], position, db, live, MASKED)
    _store_gradient(grads[2], position, dc, live, MASKED)
    _store_gradient(grads[3], position, dd, live, MASKED)


@triton.jit
def differentiate(
    operands, grads, upstream, low, high, shape, magics, strides, by, s0, s1, s2,
    GRADIENT: tl.constexpr, FLAGS: tl.constexpr, KINDS: tl.constexpr, SMALL: tl.constexpr,
    SAMPLE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradients from ``low`` to ``high``, times ``upstream`` (if not SAMPLE the sixth operand), divided ``by``."""
    start = tl.multiple_of(low // 16 * 16, 16)
    for tile in range(tl.cdiv(high - start, BLOCK).to(tl.int32)):
        base = start + tl.cast(tile, tl.int64) * BLOCK
        if (base >= low) & (base + BLOCK <= high):
            _gradient_tile(
                operands, grads, upstream, base, low, high, shape, magics, strides, by, s0, s1, s2,
                GRADIENT, FLAGS, KINDS, SMALL, SAMPLE, False, DTYPE, BLOCK,
            )  # fmt: skip
        else:
            _gradient_tile(
                operands, grads, upstream, base, low, high, shape, magics, strides, by, s0, s1, s2,
                GRADIENT, FLAGS, KINDS, SMALL, SAMPLE, True, DTYPE, BLOCK,
            )  # fmt: skip


@triton.jit
def _elementwise_backward_kernel(
    operands, grads, shape, magics, strides, divisor_ptr, n_elements, sample_size, segments, chunk, upstream_stride,
    divisor: tl.float64, s0: tl.float64, s1: tl.float64, s2: tl.float64,
    GRADIENT: tl.constexpr, FLAGS: tl.constexpr, KINDS: tl.constexpr, SMALL: tl.constexpr,
    SAMPLE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of each element, times the upstream gradient (the sixth operand) over the divisor."""
    s0 = scalar(s0, DTYPE)
    s1 = scalar(s1, DTYPE)
    s2 = scalar(s2, DTYPE)
    if divisor_ptr is None:
        by = scalar(divisor, DTYPE)
    else:
        by = tl.load(divisor_ptr).to(DTYPE)
    sample, low, high = span(tl.program_id(0), n_elements, sample_size, segments, chunk, SAMPLE)
    upstream = tl.full((), 0.0, DTYPE)
    if SAMPLE:
        upstream += tl.load(operands[5] + sample * upstream_stride).to(DTYPE)
    differentiate(
        operands, grads, upstream, low, high, shape, magics, strides, by, s0, s1, s2,
        GRADIENT, FLAGS, KINDS, SMALL, SAMPLE, DTYPE, BLOCK,
    )  # fmt: skip


@triton.jit
def _sample_sum_kernel(partials_ptr, loss_ptr, segments, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the segments of one sample in their order."""
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, segments, BLOCK):
        position = sample * segments + start + lane
        total += tl.load(partials_ptr + position, mask=start + lane < segments, other=0.0)
    tl.store(loss_ptr + sample, tl.sum(total, axis=0))
