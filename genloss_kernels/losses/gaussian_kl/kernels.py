"""Formulas of the Gaussian KL divergence: operands mu_q, logvar_q, mu_p and logvar_p; scalars free bits and clamp."""

import triton
import triton.language as tl

from ...core.triton_math import expm1_excess

# Bits of FLAGS, shared with the launcher in op.py.
GENERAL = tl.constexpr(1)
CLAMPED = tl.constexpr(2)
FREE_BITS = tl.constexpr(4)


@triton.jit
def _clamped(logvar, low, high, FLAGS: tl.constexpr):
    if CLAMPED & FLAGS:
        logvar = tl.where(logvar < low, low, tl.where(logvar > high, high, logvar))
    return logvar


@triton.jit
def _parts(mu_q, logvar_q, mu_p, logvar_p, low, high, FLAGS: tl.constexpr):
    """Distance of the means in p's deviations, 1 / that, expm1 and its excess at the difference of the log-variances.

    The second, exp(-logvar_p / 2), stays finite, so that equal means are at distance 0 from a p however narrow.
    """
    v = _clamped(logvar_q, low, high, FLAGS)
    if GENERAL & FLAGS:
        prior = _clamped(logvar_p, low, high, FLAGS)
        LIMIT: tl.constexpr = 709.0 if v.dtype == tl.float64 else 88.0
        inverse = tl.exp(tl.minimum(-0.5 * prior, LIMIT))
        distance = (mu_q - mu_p) * inverse
        v = v - prior
    else:
        distance = mu_q
        inverse = tl.full(v.shape, 1.0, v.dtype)
    growth, excess = expm1_excess(v)
    return distance, inverse, growth, excess


@triton.jit
def gaussian_kl_value(mu_q, logvar_q, mu_p, logvar_p, free_bits, low, high, FLAGS: tl.constexpr):
    distance, _, _, excess = _parts(mu_q, logvar_q, mu_p, logvar_p, low, high, FLAGS)
    value = 0.5 * (excess + distance * distance)
    if FREE_BITS & FLAGS:
        value = tl.where(value < free_bits, free_bits, value)
    return value


@triton.jit
def gaussian_kl_gradient(mu_q, logvar_q, mu_p, logvar_p, free_bits, low, high, FLAGS: tl.constexpr):
    distance, inverse, growth, excess = _parts(mu_q, logvar_q, mu_p, logvar_p, low, high, FLAGS)
    dmu = distance * inverse
    dlogvar_q = 0.5 * growth
    dlogvar_p = -0.5 * (growth + distance * distance)
    if CLAMPED & FLAGS:
        dlogvar_q = tl.where((logvar_q >= low) & (logvar_q <= high), dlogvar_q, 0.0)
        dlogvar_p = tl.where((logvar_p >= low) & (logvar_p <= high), dlogvar_p, 0.0)
    if FREE_BITS & FLAGS:
        # Not so NaN, which shows in the loss too.
        free = 0.5 * (excess + distance * distance) <= free_bits
        dmu = tl.where(free, 0.0, dmu)
        dlogvar_q = tl.where(free, 0.0, dlogvar_q)
        dlogvar_p = tl.where(free, 0.0, dlogvar_p)
    return dmu, dlogvar_q, -dmu, dlogvar_p
