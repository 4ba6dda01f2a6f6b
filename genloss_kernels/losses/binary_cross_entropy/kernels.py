"""Formulas of binary cross entropy: operands are logits (or probabilities), target, weight and pos_weight."""

import triton
import triton.language as tl

from ...core.triton_math import log1p_lower, log1p_share, log_lower, softplus_sigmoid

# Bit of the FLAGS on probabilities, shared with reference.py.
UNCHECKED = tl.constexpr(1)

# 1e-12 in fp32, which torch takes in fp64 too.
LEAST_VARIANCE = tl.constexpr(9.999999960041972e-13)


@triton.jit
def _coefficients(t, weight, pos_weight, smoothing):
    """Coefficients of softplus(x) and softplus(-x)."""
    t = t * (1.0 - smoothing) + 0.5 * smoothing
    return weight * (1.0 - t), weight * pos_weight * t


@triton.jit
def binary_cross_entropy_value(x, t, weight, pos_weight, smoothing, s1, s2, FLAGS: tl.constexpr):
    a, b = _coefficients(t, weight, pos_weight, smoothing)
    size = tl.abs(x)
    # softplus(x) and softplus(-x) have the logarithm in common, and one of them the logit's size.
    slope = tl.where(x < 0.0, b, a)
    # At an infinite logit a term with coefficient 0 is 0, where the product would be NaN.
    linear = tl.where(slope == 0.0, 0.0, slope * size)
    return linear + (a + b) * log1p_share(tl.exp(-size))


@triton.jit
def binary_cross_entropy_gradient(x, t, weight, pos_weight, smoothing, s1, s2, FLAGS: tl.constexpr):
    a, b = _coefficients(t, weight, pos_weight, smoothing)
    above, below, probability, complement = softplus_sigmoid(x)
    dx = a * probability - b * complement
    # pos_weight * below - above less the logarithm that both have in common, the smaller one: its rounding would stay.
    linear = tl.where(x < 0.0, -pos_weight * x, -x)
    dt = weight * (1.0 - smoothing) * (linear + (pos_weight - 1.0) * tl.minimum(above, below))
    return dx, dt, dx, dt


@triton.jit
def _logarithms(p, CLAMPED: tl.constexpr):
    """log(p) and log(1 - p), each to the last digits at both ends, and CLAMPED at least -100, as torch has them."""
    low = p < 0.5
    # Exact: for p above a half by Sterbenz' lemma.
    rare = tl.where(low, p, 1.0 - p)
    # Of these only the first can be small, and the second is NaN where p is.
    rarely = log_lower(rare)
    if CLAMPED:
        rarely = tl.where(rarely < -100.0, -100.0, rarely)
    else:
        rarely = tl.where(rare == 0.0, -float("inf"), rarely)
    common = log1p_lower(-rare)
    return tl.where(low, rarely, common), tl.where(low, common, rarely)


@triton.jit
def _marked(result, p, t, FLAGS: tl.constexpr):
    """NaN where a probability is none and nothing else would tell."""
    if UNCHECKED & FLAGS:
        result = tl.where((p >= 0.0) & (p <= 1.0) & (t >= 0.0) & (t <= 1.0), result, float("nan"))
    return result


@triton.jit
def probability_value(p, t, weight, _, s0, s1, s2, FLAGS: tl.constexpr):
    log_p, log_q = _logarithms(p, True)
    return _marked(-weight * (t * log_p + (1.0 - t) * log_q), p, t, FLAGS)


@triton.jit
def probability_gradient(p, t, weight, _, s0, s1, s2, FLAGS: tl.constexpr):
    log_p, log_q = _logarithms(p, False)
    variance = (1.0 - p) * p
    dp = _marked(weight * (p - t) / tl.where(variance < LEAST_VARIANCE, LEAST_VARIANCE, variance), p, t, FLAGS)
    return dp, _marked(weight * (log_q - log_p), p, t, FLAGS), dp, dp
