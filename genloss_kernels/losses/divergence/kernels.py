"""Kernels of divergences and entropy: forward and backward, by long rows and by tiles of many short or strided ones.

Both traversals share the device functions. ``a`` is the distribution under which a divergence takes its mean, ``b`` the
other one; a Jensen-Shannon divergence weighs the two by ``weights``, and an entropy has no b, whose pointers are then a's.

The state of a lane is a tuple of tensors of one shape:

maximum_a, total_a      largest logit so far, and the sum of exp(a - maximum_a)
maximum_b, total_b      the same of b
moment                  sum of exp(a - maximum_a) * [(a - maximum_a) - (b - maximum_b)]
hole                    largest a where b is -inf, or so far below its maximum that it counts as that
"""

import triton
import triton.language as tl

from ...core.rows import aligned_row, edge_columns, first_aligned, row_offset
from ...core.triton_math import exp_flushed, expm1_excess, log1p_unit, log_share_excess, lowest, narrowed, scalar

KL = tl.constexpr(0)
JS = tl.constexpr(1)
ENTROPY = tl.constexpr(2)

# Farther than any two logits that matter, and not so far that a row of such differences overflows; as reference.FAR.
_FAR = tl.constexpr(1e30)

# A divergence below this is summed once more from terms of the second order, as one pass is off by about 1e-7.
_CLOSE = tl.constexpr(2.0**-10)


@triton.jit
def _logits(pointers, live, inverse_temperature, MASKED: tl.constexpr, DTYPE: tl.constexpr):
    if MASKED:
        y = tl.load(pointers, mask=live, other=0.0).to(DTYPE) * inverse_temperature
        y = tl.where(live, y, -float("inf"))
    else:
        y = tl.load(pointers).to(DTYPE) * inverse_temperature
    return y


@triton.jit
def _places(cols, stride_col, VEC: tl.constexpr):
    return cols if VEC > 1 else cols.to(tl.int64) * stride_col


@triton.jit
def _pair(
    a_first, b_first, cols, a_stride_col, b_stride_col, live, inverse_temperature,
    KIND: tl.constexpr, VEC: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Logits of a and b over the temperature, in some columns of rows; -inf where not live."""
    a = _logits(a_first + _places(cols, a_stride_col, VEC), live, inverse_temperature, MASKED, DTYPE)
    if KIND == ENTROPY:
        b = a
    else:
        b = _logits(b_first + _places(cols, b_stride_col, VEC), live, inverse_temperature, MASKED, DTYPE)
    return a, b


@triton.jit
def _initial_state(SHAPE: tl.constexpr, DTYPE: tl.constexpr):
    low = tl.full(SHAPE, lowest(DTYPE), DTYPE)
    zero = tl.zeros(SHAPE, DTYPE)
    return low, zero, low, zero, zero, tl.full(SHAPE, -float("inf"), DTYPE)


@triton.jit
def _hole(a, below):
    """The hole that a pair makes whose b lies so much below the maximum."""
    return tl.where(below < -_FAR, a, -float("inf"))


@triton.jit
def _sunk(hole, maximum_a, total_b, rise):
    """The hole once b's maximum has risen: all that there is of b may lie far below now."""
    return tl.where((rise > _FAR) & (total_b > 0.0), maximum_a, hole)


@triton.jit
def _one(y):
    """1 for a number, 0 for -inf, NaN for NaN."""
    return tl.where(y >= lowest(y.dtype), 1.0, tl.where(y == y, 0.0, y))


@triton.jit
def _first_state(a, b, KIND: tl.constexpr):
    """:func:`_update` of the initial state, for lanes that take one pair each: no exponential."""
    low = lowest(a.dtype)
    hole = a
    if KIND == KL:
        hole = _hole(a, b - tl.maximum(b, low))
    return tl.maximum(a, low), _one(a), tl.maximum(b, low), _one(b), tl.zeros_like(a), hole


@triton.jit
def _update(state, a, b, KIND: tl.constexpr):
    """Take one more pair into each lane: one exponential for each of the two, and no exchange between lanes."""
    maximum_a, total_a, maximum_b, total_b, moment, hole = state
    change_a = a - maximum_a
    e_a = exp_flushed(-tl.abs(change_a))
    rises = change_a > 0.0
    decay = tl.where(rises, e_a, 1.0)
    weight = tl.where(rises, 1.0, e_a)
    # By how much the maxima rise, and how far below them the pair lies then; finite, since a 0 may be a factor.
    rise = tl.minimum(tl.maximum(change_a, 0.0), _FAR)
    below = tl.maximum(tl.minimum(change_a, 0.0), -_FAR)
    if KIND != ENTROPY:
        change_b = b - maximum_b
        e_b = exp_flushed(-tl.abs(change_b))
    if KIND == KL:
        hole = tl.maximum(_sunk(hole, maximum_a, total_b, change_b), _hole(a, change_b))
        rise -= tl.minimum(tl.maximum(change_b, 0.0), _FAR)
        below -= tl.maximum(tl.minimum(change_b, 0.0), -_FAR)
    if KIND != ENTROPY:
        total_b = tl.where(change_b > 0.0, total_b * e_b + 1.0, total_b + e_b)
        maximum_b = tl.maximum(maximum_b, b)
    if KIND != JS:
        moment = (moment - rise * total_a) * decay + weight * below
    total_a = total_a * decay + weight
    return tl.maximum(maximum_a, a), total_a, maximum_b, total_b, moment, hole


@triton.jit
def _update_by_vectors(state, a, b, KIND: tl.constexpr):
    """:func:`_update` for lanes that take a vector each, (lanes, vector), which a thread holds.

    The vector's maximum first, so that the totals decay once a vector and nothing is chosen for each element.
    """
    maximum_a, total_a, maximum_b, total_b, moment, hole = state
    top_a = tl.maximum(maximum_a, tl.max(a, axis=1))
    change_a = a - top_a[:, None]
    e_a = exp_flushed(change_a)
    decay = exp_flushed(maximum_a - top_a)
    # By how much the maxima rise, and how far below them the pairs lie then; finite, since a 0 may be a factor.
    rise = tl.minimum(top_a - maximum_a, _FAR)
    below = tl.maximum(change_a, -_FAR)
    if KIND != ENTROPY:
        top_b = tl.maximum(maximum_b, tl.max(b, axis=1))
        change_b = b - top_b[:, None]
    if KIND == KL:
        rise -= tl.minimum(top_b - maximum_b, _FAR)
        below -= tl.maximum(change_b, -_FAR)
        hole = tl.maximum(_sunk(hole, maximum_a, total_b, top_b - maximum_b), tl.max(_hole(a, change_b), axis=1))
    if KIND != ENTROPY:
        total_b = total_b * exp_flushed(maximum_b - top_b) + tl.sum(exp_flushed(change_b), axis=1)
    if KIND != JS:
        moment = (moment - rise * total_a) * decay + tl.sum(e_a * below, axis=1)
    if KIND != ENTROPY:
        maximum_b = top_b
    total_a = total_a * decay + tl.sum(e_a, axis=1)
    return top_a, total_a, maximum_b, total_b, moment, hole


@triton.jit
def _relative(state, top_a, top_b, KIND: tl.constexpr):
    """Totals of a and b, the moment and the hole, relative to maxima that are no lower."""
    maximum_a, total_a, maximum_b, total_b, moment, hole = state
    change_a = maximum_a - top_a
    decay = tl.exp(change_a)
    below = tl.maximum(change_a, -_FAR)
    if KIND != ENTROPY:
        change_b = maximum_b - top_b
    if KIND == KL:
        below -= tl.maximum(change_b, -_FAR)
        hole = _sunk(hole, maximum_a, total_b, -change_b)
    if KIND != ENTROPY:
        total_b = tl.exp(change_b) * total_b
    if KIND != JS:
        moment = decay * (moment + total_a * below)
    return decay * total_a, total_b, moment, hole


@triton.jit
def _collapse(state, AXIS: tl.constexpr, KIND: tl.constexpr):
    """Merge the lanes along an axis, in an order that does not depend on timing."""
    top_a = tl.max(state[0], axis=AXIS)
    top_b = tl.max(state[2], axis=AXIS)
    total_a, total_b, moment, hole = _relative(state, tl.expand_dims(top_a, AXIS), tl.expand_dims(top_b, AXIS), KIND)
    return (
        top_a, tl.sum(total_a, axis=AXIS), top_b, tl.sum(total_b, axis=AXIS), tl.sum(moment, axis=AXIS),
        tl.max(hole, axis=AXIS),
    )  # fmt: skip


@triton.jit
def _merge(state, other, KIND: tl.constexpr):
    top_a = tl.maximum(state[0], other[0])
    top_b = tl.maximum(state[2], other[2])
    total_a, total_b, moment, hole = _relative(state, top_a, top_b, KIND)
    other_a, other_b, other_moment, other_hole = _relative(other, top_a, top_b, KIND)
    return (
        top_a, total_a + other_a, top_b, total_b + other_b, moment + other_moment, tl.maximum(hole, other_hole),
    )  # fmt: skip


@triton.jit
def _log_ratio(x, y):
    """log(x / y), to the last digits where x is close to y."""
    high = tl.maximum(x, y)
    low = tl.minimum(x, y)
    excess = (high - low) / low
    log = tl.where(excess < 1.0, log1p_unit(tl.minimum(excess, 1.0)), tl.log(high / low))
    log = tl.where(x < y, -log, log)
    # The minimum drops NaN.
    return tl.where((x == x) & (y == y), log, x + y)


@triton.jit
def _row(state, KIND: tl.constexpr):
    """Maximum and log of the total of a and of b, two more numbers for the gradient, and the divergence, 0 for JS.

    From a row's collapsed state. The two numbers are the mean under a of the logits' difference, or the entropy, and 0.
    """
    maximum_a, total_a, maximum_b, total_b, moment, hole = state
    log_a = tl.log(total_a)
    log_b = log_a
    first = tl.zeros_like(maximum_a)
    value = first
    if KIND != ENTROPY:
        log_b = tl.log(total_b)
    if KIND == KL:
        first = moment / total_a
        value = _log_ratio(total_b, total_a) + first
        # Where the student has no mass and the teacher has.
        missing = (tl.exp((hole - maximum_a) - log_a) > 0.0) & (value == value)
        value = tl.where(missing, float("inf"), value)
        # No distribution at all.
        value = tl.where(total_b == 0.0, float("nan"), value)
        first = tl.where(missing, float("inf"), first)
    if KIND == ENTROPY:
        first = log_a - moment / total_a
        value = first
    return (maximum_a, log_a, maximum_b, log_b, first, tl.zeros_like(maximum_a)), value


@triton.jit
def _mixture(a, b, row, weights):
    """A pair's larger log-probability, whether that is b's, the smaller's distance below it, and both weights.

    The larger one is NaN if either is, and what is below it is finite; all terms have the larger probability as a factor.
    """
    maximum_a, log_a, maximum_b, log_b, _, _ = row
    log_p = (a - maximum_a) - log_a
    log_q = (b - maximum_b) - log_b
    # Relative to the maxima: of close distributions nothing large is subtracted.
    lead = ((b - maximum_b) - (a - maximum_a)) - (log_b - log_a)
    behind = lead > 0.0
    # A comparison, as there is no distance between two of -inf.
    difference = tl.where(tl.abs(lead) < _FAR, -tl.abs(lead), -_FAR)
    weight_a, weight_b = weights
    return (
        tl.maximum(log_p, log_q, propagate_nan=tl.PropagateNan.ALL), behind, difference,
        tl.where(behind, weight_b, weight_a), tl.where(behind, weight_a, weight_b),
    )  # fmt: skip


@triton.jit
def _js_terms(a, b, row, weights):
    """A pair's terms of the divergence, of KL(a || mixture) and of KL(b || mixture).

    With z the smaller probability over the larger and m = 1 - w + w z, the first is w z log z - m log m. That is computed as
    w G(z - 1) - G(w (z - 1)) with G(v) = (1 + v) log(1 + v) - v, which is of the second order, so that equal distributions
    give 0 and close ones keep their digits.
    """
    log_larger, behind, difference, other, weight = _mixture(a, b, row, weights)
    larger = tl.exp(log_larger)
    change, excess = expm1_excess(difference)
    z = change + 1.0
    near = tl.where(difference > -0.5, change * difference - excess, z * difference - change)
    log_mixture, of_mixture = log_share_excess(other + weight * z, weight * change)
    above = -larger * log_mixture
    below = larger * z * (difference - log_mixture)
    return larger * (weight * near - of_mixture), tl.where(behind, below, above), tl.where(behind, above, below)


@triton.jit
def _js_logarithms(a, b, row, weights):
    """A pair's probabilities p and q, and log(p / m) and log(q / m) for their mixture m."""
    log_larger, behind, difference, other, weight = _mixture(a, b, row, weights)
    larger = tl.exp(log_larger)
    z = tl.exp(difference)
    log_mixture, _ = log_share_excess(other + weight * z, weight * (z - 1.0))
    smaller = larger * z
    below = difference - log_mixture
    return (
        tl.where(behind, smaller, larger), tl.where(behind, larger, smaller),
        tl.where(behind, below, -log_mixture), tl.where(behind, -log_mixture, below),
    )  # fmt: skip


@triton.jit
def _kl_terms(a, b, row):
    """A pair's p (exp(d) - 1 - d) for d = log q - log p, which add up to the divergence and are never negative."""
    maximum_a, log_a, maximum_b, log_b, _, _ = row
    p = tl.exp((a - maximum_a) - log_a)
    q = tl.exp((b - maximum_b) - log_b)
    return _kl_term(p, q, ((b - maximum_b) - (a - maximum_a)) - (log_b - log_a))


@triton.jit
def _kl_term(p, q, difference):
    _, excess = expm1_excess(difference)
    term = tl.where(tl.abs(difference) < 0.5, p * excess, (q - p) - p * difference)
    return tl.where(p == 0.0, q, term)


@triton.jit
def _terms(a, b, row, weights, KIND: tl.constexpr):
    """A pair's term of the divergence; for JS also of the two means that the gradient needs."""
    if KIND == JS:
        term, of_a, of_b = _js_terms(a, b, row, weights)
    else:
        term = _kl_terms(a, b, row)
        of_a = term
        of_b = term
    return term, of_a, of_b


@triton.jit
def _with_means(row, of_a, of_b):
    maximum_a, log_a, maximum_b, log_b, _, _ = row
    return maximum_a, log_a, maximum_b, log_b, of_a, of_b


@triton.jit
def _gradients(a, b, row, weights, KIND: tl.constexpr, GRAD_A: tl.constexpr, GRAD_B: tl.constexpr):
    """Derivatives of a row's divergence with respect to the logits over the temperature."""
    maximum_a, log_a, maximum_b, log_b, first, second = row
    grad_a = a
    grad_b = b
    if KIND == JS:
        p, q, over_p, over_q = _js_logarithms(a, b, row, weights)
        weight_a, weight_b = weights
        if GRAD_A:
            grad_a = weight_a * p * (over_p - first)
        if GRAD_B:
            grad_b = weight_b * q * (over_q - second)
    else:
        below = a - maximum_a
        p = tl.exp(below - log_a)
        if GRAD_A:
            if KIND == ENTROPY:
                grad_a = -p * ((below - log_a) + first)
            else:
                grad_a = p * ((below - (b - maximum_b)) - first)
            grad_a = tl.where(p == 0.0, 0.0, grad_a)
        if GRAD_B:
            grad_b = tl.exp((b - maximum_b) - log_b) - p
    return grad_a, grad_b


@triton.jit
def _save(saved_ptr, values, row, row_live, n_rows, KIND: tl.constexpr):
    maximum_a, log_a, maximum_b, log_b, first, second = values
    n_rows = tl.cast(n_rows, tl.int64)
    tl.store(saved_ptr + row, maximum_a, mask=row_live)
    tl.store(saved_ptr + n_rows + row, log_a, mask=row_live)
    tl.store(saved_ptr + 2 * n_rows + row, first, mask=row_live)
    if KIND != ENTROPY:
        tl.store(saved_ptr + 3 * n_rows + row, maximum_b, mask=row_live)
        tl.store(saved_ptr + 4 * n_rows + row, log_b, mask=row_live)
    if KIND == JS:
        tl.store(saved_ptr + 5 * n_rows + row, second, mask=row_live)


@triton.jit
def _saved(saved_ptr, row, row_live, n_rows, KIND: tl.constexpr):
    n_rows = tl.cast(n_rows, tl.int64)
    maximum_a = tl.load(saved_ptr + row, mask=row_live, other=0.0)
    log_a = tl.load(saved_ptr + n_rows + row, mask=row_live, other=0.0)
    first = tl.load(saved_ptr + 2 * n_rows + row, mask=row_live, other=0.0)
    maximum_b = maximum_a
    log_b = log_a
    second = first
    if KIND != ENTROPY:
        maximum_b = tl.load(saved_ptr + 3 * n_rows + row, mask=row_live, other=0.0)
        log_b = tl.load(saved_ptr + 4 * n_rows + row, mask=row_live, other=0.0)
    if KIND == JS:
        second = tl.load(saved_ptr + 5 * n_rows + row, mask=row_live, other=0.0)
    return maximum_a, log_a, maximum_b, log_b, first, second


@triton.jit
def _finish(
    values, value, factor, row, row_live, place, loss_ptr, partial_ptr, saved_ptr, n_rows,
    KIND: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Store the rows' losses, or their sum, and what the backward needs unless it finds that anew."""
    loss = tl.where(row_live, value * factor, 0.0)
    if REDUCE:
        tl.store(partial_ptr + place, tl.sum(loss, axis=0) if loss.type.is_block() else loss)
    else:
        tl.store(loss_ptr + row, loss, mask=row_live)
    if saved_ptr is not None:
        _save(saved_ptr, values, row, row_live, n_rows, KIND)


@triton.jit
def _edges(
    a_first, b_first, head, body, n_cols, inverse_temperature, KIND: tl.constexpr, VEC: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The elements of a ragged row before its first whole vector and after its last, which are fewer than two vectors'."""
    cols = edge_columns(tl.arange(0, 2 * VEC), head, body)
    return _pair(a_first, b_first, cols, 1, 1, cols < n_cols - head, inverse_temperature, KIND, VEC, True, DTYPE)


@triton.jit
def _second_pass(
    tail_a, tail_b, a_first, b_first, a_stride_col, b_stride_col, head, body, n_cols, values, inverse_temperature, weights,
    KIND: tl.constexpr, WHOLE: tl.constexpr, VEC: tl.constexpr, RAGGED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a row's terms; a WHOLE row but for its edges is at hand as the tail."""
    if WHOLE:
        total, of_a, of_b = _terms(tail_a, tail_b, values, weights, KIND)
    else:
        # Half a tile: a Jensen-Shannon divergence adds up three sums of long terms, 111 registers in a whole one.
        PART: tl.constexpr = BLOCK // 2 if KIND == JS else BLOCK
        lane = tl.arange(0, PART)
        full = body // PART * PART
        total = tl.zeros((PART,), DTYPE)
        of_a = total
        of_b = total
        for start in range(0, full, PART):
            cols = start + lane
            a, b = _pair(
                a_first, b_first, cols, a_stride_col, b_stride_col, lane, inverse_temperature, KIND, VEC, False, DTYPE
            )  # fmt: skip
            term, term_of_a, term_of_b = _terms(a, b, values, weights, KIND)
            total += term
            of_a += term_of_a
            of_b += term_of_b
        cols = full + lane
        a, b = _pair(
            a_first, b_first, cols, a_stride_col, b_stride_col, lane < tl.multiple_of(body - full, VEC),
            inverse_temperature, KIND, VEC, True, DTYPE,
        )  # fmt: skip
        term, term_of_a, term_of_b = _terms(a, b, values, weights, KIND)
        total += term
        of_a += term_of_a
        of_b += term_of_b
    total = tl.sum(total, axis=0)
    of_a = tl.sum(of_a, axis=0)
    of_b = tl.sum(of_b, axis=0)
    if RAGGED:
        a, b = _edges(a_first, b_first, head, body, n_cols, inverse_temperature, KIND, VEC, DTYPE)
        term, term_of_a, term_of_b = _terms(a, b, values, weights, KIND)
        total += tl.sum(term, axis=0)
        of_a += tl.sum(term_of_a, axis=0)
        of_b += tl.sum(term_of_b, axis=0)
    return total, of_a, of_b


@triton.jit
def _divergence_forward_rows_kernel(
    a_ptr, b_ptr, loss_ptr, partial_ptr, saved_ptr, shape, a_strides, b_strides, a_stride_col, b_stride_col,
    n_rows, n_cols, inverse_temperature: tl.float64, weight_a: tl.float64, weight_b: tl.float64, factor: tl.float64,
    KIND: tl.constexpr, WHOLE: tl.constexpr, REDUCE: tl.constexpr,
    VEC: tl.constexpr, RAGGED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program walks one row, a Jensen-Shannon divergence twice unless it holds the WHOLE row."""
    inverse_temperature = scalar(inverse_temperature, DTYPE)
    weights = (scalar(weight_a, DTYPE), scalar(weight_b, DTYPE))
    row = tl.program_id(0).to(tl.int64)
    offset = row_offset(row, shape, a_strides)
    head, first, body = aligned_row(offset, n_cols, VEC, RAGGED)
    a_first = a_ptr + first
    b_first = b_ptr + first_aligned(row_offset(row, shape, b_strides), head, VEC, RAGGED)
    body = tl.multiple_of(body, VEC)
    lane = tl.arange(0, BLOCK)
    if WHOLE:
        full = 0
    else:
        full = body // BLOCK * BLOCK
    tail_a, tail_b = _pair(
        a_first, b_first, full + lane, a_stride_col, b_stride_col, lane < tl.multiple_of(body - full, VEC),
        inverse_temperature, KIND, VEC, True, DTYPE,
    )  # fmt: skip
    state = _collapse(_first_state(tail_a, tail_b, KIND), 0, KIND)
    if full > 0:
        vectors = (tl.arange(0, BLOCK // VEC) * VEC)[:, None] + tl.arange(0, VEC)[None, :]
        lanes = _initial_state((BLOCK // VEC,), DTYPE)
        for start in range(0, full, BLOCK):
            a, b = _pair(
                a_first, b_first, start + vectors, a_stride_col, b_stride_col, vectors, inverse_temperature,
                KIND, VEC, False, DTYPE,
            )  # fmt: skip
            lanes = _update_by_vectors(lanes, a, b, KIND)
        state = _merge(_collapse(lanes, 0, KIND), state, KIND)
    if RAGGED:
        a, b = _edges(a_first, b_first, head, body, n_cols, inverse_temperature, KIND, VEC, DTYPE)
        state = _merge(state, _collapse(_first_state(a, b, KIND), 0, KIND), KIND)
    values, value = _row(state, KIND)
    if KIND == JS:
        again = True
    elif KIND == KL:
        again = value < _CLOSE
    else:
        again = False
    if again:
        value, of_a, of_b = _second_pass(
            tail_a, tail_b, a_first, b_first, a_stride_col, b_stride_col, head, body, n_cols, values, inverse_temperature,
            weights, KIND, WHOLE, VEC, RAGGED, DTYPE, BLOCK,
        )  # fmt: skip
        if KIND == JS:
            values = _with_means(values, of_a, of_b)
    factor = scalar(factor, DTYPE)
    _finish(values, value, factor, row, row >= 0, row, loss_ptr, partial_ptr, saved_ptr, n_rows, KIND, REDUCE)


@triton.jit
def _give(
    firsts, cols, strides, live, values, grad, inverse_temperature, weights,
    KIND: tl.constexpr, GRAD_A: tl.constexpr, GRAD_B: tl.constexpr, VEC: tl.constexpr, MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients in some columns of rows, from the logits there and the rows' numbers; of a, b and their gradients each."""
    a_first, b_first, grad_a_first, grad_b_first = firsts
    a_stride_col, b_stride_col, grad_a_stride_col, grad_b_stride_col = strides
    a, b = _pair(
        a_first, b_first, cols, a_stride_col, b_stride_col, live, inverse_temperature, KIND, VEC, MASKED, DTYPE
    )  # fmt: skip
    _store_gradients(
        a, b, grad_a_first + _places(cols, grad_a_stride_col, VEC), grad_b_first + _places(cols, grad_b_stride_col, VEC),
        live, values, grad, weights, KIND, GRAD_A, GRAD_B, MASKED,
    )  # fmt: skip


@triton.jit
def _store_gradients(
    a, b, grad_a_pointers, grad_b_pointers, live, values, grad, weights,
    KIND: tl.constexpr, GRAD_A: tl.constexpr, GRAD_B: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    grad_a, grad_b = _gradients(a, b, values, weights, KIND, GRAD_A, GRAD_B)
    if GRAD_A:
        grad_a = narrowed(grad_a * grad, grad_a_pointers)
        if MASKED:
            tl.store(grad_a_pointers, grad_a, mask=live)
        else:
            tl.store(grad_a_pointers, grad_a)
    if GRAD_B:
        grad_b = narrowed(grad_b * grad, grad_b_pointers)
        if MASKED:
            tl.store(grad_b_pointers, grad_b, mask=live)
        else:
            tl.store(grad_b_pointers, grad_b)


@triton.jit
def _divergence_backward_rows_kernel(
    a_ptr, b_ptr, grad_a_ptr, grad_b_ptr, saved_ptr, grad_loss_ptr, grad_loss_stride,
    shape, a_strides, b_strides, grad_a_strides, grad_b_strides,
    a_stride_col, b_stride_col, grad_a_stride_col, grad_b_stride_col, n_rows, n_cols, n_splits, split_cols,
    inverse_temperature: tl.float64, weight_a: tl.float64, weight_b: tl.float64, factor: tl.float64,
    KIND: tl.constexpr, GRAD_A: tl.constexpr, GRAD_B: tl.constexpr,
    VEC: tl.constexpr, RAGGED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes one row's gradients, or one share of them."""
    inverse_temperature = scalar(inverse_temperature, DTYPE)
    weights = (scalar(weight_a, DTYPE), scalar(weight_b, DTYPE))
    row = (tl.program_id(0) // n_splits).to(tl.int64)
    split = tl.program_id(0) % n_splits
    values = _saved(saved_ptr, row, row >= 0, n_rows, KIND)
    grad = tl.load(grad_loss_ptr + row * grad_loss_stride).to(DTYPE) * scalar(factor, DTYPE)
    offset = row_offset(row, shape, a_strides)
    head, first, body = aligned_row(offset, n_cols, VEC, RAGGED)
    a_first = a_ptr + first
    b_first = b_ptr + first_aligned(row_offset(row, shape, b_strides), head, VEC, RAGGED)
    grad_a_first = grad_a_ptr + first_aligned(row_offset(row, shape, grad_a_strides), head, VEC, RAGGED)
    grad_b_first = grad_b_ptr + first_aligned(row_offset(row, shape, grad_b_strides), head, VEC, RAGGED)
    firsts = (a_first, b_first, grad_a_first, grad_b_first)
    strides = (a_stride_col, b_stride_col, grad_a_stride_col, grad_b_stride_col)
    begin = tl.multiple_of(split * split_cols, VEC)
    end = tl.multiple_of(tl.maximum(tl.minimum(body, begin + split_cols), begin), VEC)
    full = begin + (end - begin) // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    for start in range(begin, full, BLOCK):
        cols = start + lane
        _give(
            firsts, cols, strides, lane, values, grad, inverse_temperature, weights, KIND, GRAD_A, GRAD_B, VEC, False, DTYPE
        )  # fmt: skip
    _give(
        firsts, full + lane, strides, lane < tl.multiple_of(end - full, VEC), values, grad, inverse_temperature, weights,
        KIND, GRAD_A, GRAD_B, VEC, True, DTYPE,
    )  # fmt: skip
    if RAGGED:
        cols = edge_columns(tl.arange(0, 2 * VEC), head, body)
        _give(
            firsts, cols, strides, (cols < n_cols - head) & (split == 0), values, grad, inverse_temperature, weights,
            KIND, GRAD_A, GRAD_B, VEC, True, DTYPE,
        )  # fmt: skip


@triton.jit
def _tile_rows(n_inner, inner_tiles, tile, BLOCK_ROWS: tl.constexpr):
    """Rows of a tile: the outer index, the inner indices, and which of these exist."""
    outer = (tile // inner_tiles).to(tl.int64)
    inner = (tile % inner_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return outer, inner.to(tl.int64), inner < n_inner


@triton.jit
def _wide(values):
    """Numbers of rows, to broadcast over the columns."""
    maximum_a, log_a, maximum_b, log_b, first, second = values
    return (
        maximum_a[:, None], log_a[:, None], maximum_b[:, None], log_b[:, None], first[:, None], second[:, None],
    )  # fmt: skip


@triton.jit
def _chosen(value, total, KIND: tl.constexpr):
    """The sum of the terms: for KL where the value found without them is small, for JS always."""
    if KIND == KL:
        total = tl.where(value < _CLOSE, total, value)
    return total


@triton.jit
def _over_classes(values):
    """Numbers of rows, to broadcast over a tile (rows, chunks, columns)."""
    maximum_a, log_a, maximum_b, log_b, first, second = values
    return (
        maximum_a[:, None, None], log_a[:, None, None], maximum_b[:, None, None], log_b[:, None, None],
        first[:, None, None], second[:, None, None],
    )  # fmt: skip


@triton.jit
def _class_sum(x):
    """Sum of each row of a tile (rows, chunks, columns); a thread holds all chunks of its rows, and adds them up first."""
    return tl.sum(tl.sum(x, axis=1), axis=1)


@triton.jit
def _class_max(x):
    return tl.max(tl.max(x, axis=1), axis=1)


@triton.jit
def _whole_state(a, b, KIND: tl.constexpr):
    """Collapsed state of the rows of a tile that holds all their classes, and what they add to the totals.

    The maxima first, so that each logit takes one exponential.
    """
    top_a = tl.maximum(_class_max(a), lowest(a.dtype))
    change_a = a - top_a[:, None, None]
    e_a = exp_flushed(change_a)
    total_a = _class_sum(e_a)
    below = tl.maximum(change_a, -_FAR)
    top_b = top_a
    e_b = e_a
    total_b = total_a
    hole = top_a
    moment = total_a
    if KIND != ENTROPY:
        top_b = tl.maximum(_class_max(b), lowest(b.dtype))
        change_b = b - top_b[:, None, None]
        e_b = exp_flushed(change_b)
        total_b = _class_sum(e_b)
    if KIND == KL:
        below -= tl.maximum(change_b, -_FAR)
        hole = _class_max(_hole(a, change_b))
    if KIND != JS:
        moment = _class_sum(e_a * below)
    return (top_a, total_a, top_b, total_b, moment, hole), e_a, e_b


@triton.jit
def _whole_rows(a, b, weights, KIND: tl.constexpr, BACKWARD: tl.constexpr):
    """Numbers of the rows of a tile that holds all their classes, and unless BACKWARD their divergences."""
    state, e_a, e_b = _whole_state(a, b, KIND)
    values, value = _row(state, KIND)
    if KIND == KL and not BACKWARD:
        top_a, total_a, top_b, total_b, _, _ = state
        terms = _kl_term(
            e_a * (1.0 / total_a)[:, None, None], e_b * (1.0 / total_b)[:, None, None],
            ((b - top_b[:, None, None]) - (a - top_a[:, None, None])) - (values[3] - values[1])[:, None, None],
        )  # fmt: skip
        value = _chosen(value, _class_sum(terms), KIND)
    if KIND == JS:
        if BACKWARD:
            p, q, over_p, over_q = _js_logarithms(a, b, _over_classes(values), weights)
            values = _with_means(values, _class_sum(p * over_p), _class_sum(q * over_q))
        else:
            terms, _, _ = _js_terms(a, b, _over_classes(values), weights)
            value = _class_sum(terms)
    return values, value


@triton.jit
def _whole_tile(
    a_ptr, b_ptr, a_offsets, b_offsets, a_stride_col, b_stride_col, row_live, n_cols, inverse_temperature,
    KIND: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Logits of whole rows as tiles (rows, chunks, columns); their columns, and which of the elements there are."""
    CHUNK: tl.constexpr = BLOCK_COLS // CHUNKS
    cols = tl.arange(0, CHUNKS)[None, :, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :]
    # Whole vectors, as the rows' offsets are: a mask of whole vectors lets the compiler keep wide loads.
    live = row_live[:, None, None] & (cols < n_cols // VEC * VEC)
    a, b = _pair(
        a_ptr + first_aligned(a_offsets, 0, VEC, False)[:, None, None],
        b_ptr + first_aligned(b_offsets, 0, VEC, False)[:, None, None],
        cols, a_stride_col, b_stride_col, live, inverse_temperature, KIND, VEC, True, DTYPE,
    )  # fmt: skip
    return a, b, cols, live


@triton.jit
def _divergence_forward_tiles_kernel(
    a_ptr, b_ptr, loss_ptr, partial_ptr, saved_ptr, shape, a_strides, b_strides, a_stride_inner, b_stride_inner,
    a_stride_col, b_stride_col, n_inner, inner_tiles, n_rows, n_cols,
    inverse_temperature: tl.float64, weight_a: tl.float64, weight_b: tl.float64, factor: tl.float64,
    KIND: tl.constexpr, WHOLE: tl.constexpr, REDUCE: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program walks the classes of neighbouring rows, so that neighbouring lanes read neighbouring addresses."""
    inverse_temperature = scalar(inverse_temperature, DTYPE)
    weights = (scalar(weight_a, DTYPE), scalar(weight_b, DTYPE))
    outer, inner, row_live = _tile_rows(n_inner, inner_tiles, tl.program_id(0), BLOCK_ROWS)
    row = outer * n_inner + inner
    a_offsets = row_offset(outer, shape, a_strides) + inner * a_stride_inner
    b_offsets = row_offset(outer, shape, b_strides) + inner * b_stride_inner
    if WHOLE:
        a, b, _, _ = _whole_tile(
            a_ptr, b_ptr, a_offsets, b_offsets, a_stride_col, b_stride_col, row_live, n_cols, inverse_temperature,
            KIND, VEC, CHUNKS, DTYPE, BLOCK_COLS,
        )  # fmt: skip
        values, value = _whole_rows(a, b, weights, KIND, False)
    else:
        a_rows = a_ptr + a_offsets[:, None]
        b_rows = b_ptr + b_offsets[:, None]
        lane = tl.arange(0, BLOCK_COLS)
        state = _initial_state((BLOCK_ROWS, BLOCK_COLS), DTYPE)
        for start in range(0, n_cols, BLOCK_COLS):
            cols = (start + lane)[None, :]
            a, b = _pair(
                a_rows, b_rows, cols, a_stride_col, b_stride_col, row_live[:, None] & (cols < n_cols), inverse_temperature,
                KIND, 1, True, DTYPE,
            )  # fmt: skip
            state = _update(state, a, b, KIND)
        values, value = _row(_collapse(state, 1, KIND), KIND)
        if KIND == JS:
            again = True
        elif KIND == KL:
            again = tl.min(tl.where(row_live, value, 1.0), axis=0) < _CLOSE
        else:
            again = False
        if again:
            total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), DTYPE)
            of_a = total
            of_b = total
            for start in range(0, n_cols, BLOCK_COLS):
                cols = (start + lane)[None, :]
                a, b = _pair(
                    a_rows, b_rows, cols, a_stride_col, b_stride_col, row_live[:, None] & (cols < n_cols),
                    inverse_temperature, KIND, 1, True, DTYPE,
                )  # fmt: skip
                term, term_of_a, term_of_b = _terms(a, b, _wide(values), weights, KIND)
                total += term
                of_a += term_of_a
                of_b += term_of_b
            value = _chosen(value, tl.sum(total, axis=1), KIND)
            if KIND == JS:
                values = _with_means(values, tl.sum(of_a, axis=1), tl.sum(of_b, axis=1))
    factor = scalar(factor, DTYPE)
    _finish(
        values, value, factor, row, row_live, tl.program_id(0), loss_ptr, partial_ptr, saved_ptr, n_rows, KIND, REDUCE
    )  # fmt: skip


@triton.jit
def _divergence_backward_tiles_kernel(
    a_ptr, b_ptr, grad_a_ptr, grad_b_ptr, saved_ptr, grad_loss_ptr, grad_loss_stride,
    shape, a_strides, b_strides, grad_a_strides, grad_b_strides,
    a_stride_inner, b_stride_inner, grad_a_stride_inner, grad_b_stride_inner,
    a_stride_col, b_stride_col, grad_a_stride_col, grad_b_stride_col,
    n_inner, inner_tiles, n_rows, n_cols, n_splits, split_cols,
    inverse_temperature: tl.float64, weight_a: tl.float64, weight_b: tl.float64, factor: tl.float64,
    KIND: tl.constexpr, GRAD_A: tl.constexpr, GRAD_B: tl.constexpr, WHOLE: tl.constexpr,
    VEC: tl.constexpr, CHUNKS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One program writes the gradients of neighbouring rows; it finds the numbers of WHOLE rows anew."""
    inverse_temperature = scalar(inverse_temperature, DTYPE)
    weights = (scalar(weight_a, DTYPE), scalar(weight_b, DTYPE))
    outer, inner, row_live = _tile_rows(n_inner, inner_tiles, tl.program_id(0) // n_splits, BLOCK_ROWS)
    row = outer * n_inner + inner
    grad = tl.load(grad_loss_ptr + row * grad_loss_stride, mask=row_live, other=0.0).to(DTYPE) * scalar(factor, DTYPE)
    a_offsets = row_offset(outer, shape, a_strides) + inner * a_stride_inner
    b_offsets = row_offset(outer, shape, b_strides) + inner * b_stride_inner
    grad_a_offsets = row_offset(outer, shape, grad_a_strides) + inner * grad_a_stride_inner
    grad_b_offsets = row_offset(outer, shape, grad_b_strides) + inner * grad_b_stride_inner
    if WHOLE:
        a, b, cols, live = _whole_tile(
            a_ptr, b_ptr, a_offsets, b_offsets, a_stride_col, b_stride_col, row_live, n_cols, inverse_temperature,
            KIND, VEC, CHUNKS, DTYPE, BLOCK_COLS,
        )  # fmt: skip
        values, _ = _whole_rows(a, b, weights, KIND, True)
        _store_gradients(
            a, b,
            grad_a_ptr + first_aligned(grad_a_offsets, 0, VEC, False)[:, None, None] + _places(cols, grad_a_stride_col, VEC),
            grad_b_ptr + first_aligned(grad_b_offsets, 0, VEC, False)[:, None, None] + _places(cols, grad_b_stride_col, VEC),
            live, _over_classes(values), grad[:, None, None], weights, KIND, GRAD_A, GRAD_B, True,
        )  # fmt: skip
    else:
        grad = grad[:, None]
        lane = tl.arange(0, BLOCK_COLS)
        firsts = (
            a_ptr + a_offsets[:, None], b_ptr + b_offsets[:, None],
            grad_a_ptr + grad_a_offsets[:, None], grad_b_ptr + grad_b_offsets[:, None],
        )  # fmt: skip
        strides = (a_stride_col, b_stride_col, grad_a_stride_col, grad_b_stride_col)
        values = _wide(_saved(saved_ptr, row, row_live, n_rows, KIND))
        begin = (tl.program_id(0) % n_splits) * split_cols
        end = tl.minimum(n_cols, begin + split_cols)
        for start in range(begin, end, BLOCK_COLS):
            cols = (start + lane)[None, :]
            _give(
                firsts, cols, strides, row_live[:, None] & (cols < end), values, grad, inverse_temperature, weights,
                KIND, GRAD_A, GRAD_B, 1, True, DTYPE,
            )  # fmt: skip
