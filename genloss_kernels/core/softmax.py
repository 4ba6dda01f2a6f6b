"""Row statistics in one pass: the online log-sum-exp and what hangs on it.

The state of a lane is a tuple of tensors of one shape:

maximum     largest value so far
total       sum of exp(y - maximum)
mass        sum of the coefficients q
moment      sum of q * (y - maximum)
spread      sum of exp(y - maximum) * (y - maximum), for the entropy
argument    index of the maximum, the lowest where values tie
target_mass, target_moment
            as mass and moment, of a second set of coefficients
target_maximum, target_argument
            largest of these coefficients, and its index

Whatever is not asked for stays constant and is removed by the compiler. Sums are taken relative to the running maximum,
never to 0, so that no digits cancel where the largest probability is close to 1.
"""

import triton
import triton.language as tl

from .triton_math import exp_flushed, lowest, tanh


@triton.jit
def transform(x, logit_scale, softcap, inverse_softcap, SOFTCAP: tl.constexpr):
    """Logits after scale and softcap."""
    y = x * logit_scale
    if SOFTCAP:
        y = softcap * tanh(y * inverse_softcap)
    return y


@triton.jit
def initial_state(SHAPE: tl.constexpr, DTYPE: tl.constexpr):
    zero = tl.zeros(SHAPE, DTYPE)
    low = tl.full(SHAPE, lowest(DTYPE), DTYPE)
    index = tl.zeros(SHAPE, tl.int32)
    return low, zero, zero, zero, zero, index, zero, zero, low, index


@triton.jit
def update(
    state, y, q, t, index, live, MASKED: tl.constexpr, MOMENT: tl.constexpr, TARGET: tl.constexpr, STATS: tl.constexpr
):
    """Take one more value into each lane: one exponential each, and no exchange between lanes.

    ``q`` and ``t`` are the two coefficients of ``y``; lanes that are not ``live`` hold y = -inf and q = t = 0.
    """
    maximum, total, mass, moment, spread, argument, target_mass, target_moment, target_maximum, target_argument = state
    difference = y - maximum
    decay = exp_flushed(-tl.abs(difference))
    rises = difference > 0.0
    # Finite above, also from the lowest number to a large one, and then times the 0 that has been summed.
    difference = tl.minimum(difference, -lowest(maximum.dtype))
    if MOMENT:
        change = difference * tl.where(rises, -mass, q)
        if MASKED:
            change = tl.where(live, change, 0.0)
        moment += change
        mass += q
    if TARGET:
        change = difference * tl.where(rises, -target_mass, t)
        if MASKED:
            change = tl.where(live, change, 0.0)
        target_moment += change
        target_mass += t
        better = t > target_maximum
        if MASKED:
            better = better & live
        target_argument = tl.where(better, index, target_argument)
        target_maximum = tl.where(better, t, target_maximum)
    if STATS:
        # exp(-inf) is 0, and 0 * -inf would be NaN.
        finite = tl.maximum(difference, lowest(maximum.dtype))
        spread = tl.where(rises, decay * (spread - total * finite), spread + decay * finite)
        argument = tl.where(rises, index, argument)
    total = tl.where(rises, total * decay + 1.0, total + decay)
    maximum = tl.maximum(maximum, y)
    return maximum, total, mass, moment, spread, argument, target_mass, target_moment, target_maximum, target_argument


@triton.jit
def update_by_vectors(
    state, y, q, t, index, live, MASKED: tl.constexpr, MOMENT: tl.constexpr, TARGET: tl.constexpr, STATS: tl.constexpr
):
    """:func:`update` for lanes that take a vector each, (vector, lanes), which a thread holds.

    The vector's maximum first, so that the sums decay once a vector and nothing is chosen for each value. Vectors lie along
    the first dimension, as Triton 3.6 rewrites sums of loaded values over the last one in a loop, and aborts if the loop's
    result is used twice.
    """
    maximum, total, mass, moment, spread, argument, target_mass, target_moment, target_maximum, target_argument = state
    if STATS:
        top, first = _first(y, index, 0)
        argument = _earliest(maximum, argument, top, first)
        top = tl.maximum(maximum, top)
    else:
        top = tl.maximum(maximum, tl.max(y, axis=0))
    difference = y - top[None, :]
    exponential = exp_flushed(difference)
    decay = exp_flushed(maximum - top)
    # Finite above, also from the lowest number to a large one, and then times the 0 that has been summed.
    rise = tl.minimum(top - maximum, -lowest(maximum.dtype))
    if MOMENT:
        change = difference * q
        if MASKED:
            change = tl.where(live, change, 0.0)
        moment += tl.sum(change, axis=0) - mass * rise
        mass += tl.sum(q, axis=0)
    if TARGET:
        change = difference * t
        known = t
        if MASKED:
            change = tl.where(live, change, 0.0)
            known = tl.where(live, t, lowest(maximum.dtype))
        target_moment += tl.sum(change, axis=0) - target_mass * rise
        target_mass += tl.sum(t, axis=0)
        target_top, first = _first(known, index, 0)
        target_argument = _earliest(target_maximum, target_argument, target_top, first)
        target_maximum = tl.maximum(target_maximum, target_top)
    if STATS:
        # By the decay first: a rise from the lowest number, to which logits are masked, times a total is infinite.
        spread = decay * spread - total * (decay * rise)
        # exp(-inf) is 0, and 0 * -inf would be NaN.
        spread += tl.sum(exponential * tl.maximum(difference, lowest(maximum.dtype)), axis=0)
    total = total * decay + tl.sum(exponential, axis=0)
    return top, total, mass, moment, spread, argument, target_mass, target_moment, target_maximum, target_argument


@triton.jit
def _earliest(maximum, argument, top, first):
    """Index of the larger of two maxima, the lower one where they tie."""
    return tl.where((top > maximum) | ((top == maximum) & (first < argument)), first, argument)


@triton.jit
def first_state(y, q, t, index, live, MASKED: tl.constexpr, MOMENT: tl.constexpr, TARGET: tl.constexpr, STATS: tl.constexpr):
    """:func:`update` of the initial state, for lanes that take one value each: no exponential."""
    maximum, total, mass, moment, spread, argument, target_mass, target_moment, target_maximum, target_argument = (
        initial_state(y.shape, y.dtype)
    )
    rises = y >= maximum
    total = tl.where(rises, 1.0, tl.where(y == y, total, y))
    if MOMENT:
        # -inf times its coefficient: NaN if that is 0, as in torch.
        change = tl.where(rises, 0.0, y * q)
        moment = tl.where(live, change, 0.0) if MASKED else change
        mass = q
    if TARGET:
        change = tl.where(rises, 0.0, y * t)
        target_moment = tl.where(live, change, 0.0) if MASKED else change
        target_mass = t
        better = (t > target_maximum) & live if MASKED else t > target_maximum
        target_argument = tl.where(better, index, target_argument)
        target_maximum = tl.where(better, t, target_maximum)
    if STATS:
        argument = tl.where(rises, index, argument)
    maximum = tl.maximum(maximum, y)
    return maximum, total, mass, moment, spread, argument, target_mass, target_moment, target_maximum, target_argument


@triton.jit
def _first(value, index, AXIS: tl.constexpr):
    """Largest value along the axis, and the lowest index that has it."""
    top = tl.max(value, axis=AXIS)
    at_top = value == tl.expand_dims(top, AXIS)
    return top, tl.min(tl.where(at_top, index, 2147483647), axis=AXIS)


@triton.jit
def collapse(state, AXIS: tl.constexpr, MOMENT: tl.constexpr, TARGET: tl.constexpr, STATS: tl.constexpr):
    """Merge the lanes along an axis, in an order that does not depend on timing."""
    maximum, total, mass, moment, spread, argument, target_mass, target_moment, target_maximum, target_argument = state
    top, first = _first(maximum, argument, AXIS)
    difference = maximum - tl.expand_dims(top, AXIS)
    decay = tl.exp(difference)
    # A lane that saw nothing may be further below the top than the largest finite number.
    difference = tl.maximum(difference, lowest(maximum.dtype))
    if MOMENT:
        moment = tl.sum(moment + mass * difference, axis=AXIS)
        mass = tl.sum(mass, axis=AXIS)
    else:
        moment = tl.zeros_like(top)
        mass = moment
    if TARGET:
        target_moment = tl.sum(target_moment + target_mass * difference, axis=AXIS)
        target_mass = tl.sum(target_mass, axis=AXIS)
        target_maximum, target_argument = _first(target_maximum, target_argument, AXIS)
    else:
        target_moment = tl.zeros_like(top)
        target_mass = target_moment
        target_maximum = target_moment
        target_argument = first
    if STATS:
        spread = tl.sum(decay * spread + total * (decay * difference), axis=AXIS)
    else:
        spread = tl.zeros_like(top)
    total = tl.sum(decay * total, axis=AXIS)
    return top, total, mass, moment, spread, first, target_mass, target_moment, target_maximum, target_argument
