"""Formulas of binary cross entropy with logits: operands are logits, target, weight and pos_weight."""

import triton
import triton.language as tl

from ...core.triton_math import softplus_sigmoid


@triton.jit
def _coefficients(t, weight, pos_weight, smoothing):
    """Coefficients of softplus(x) and softplus(-x)."""
    t = t * (1.0 - smoothing) + 0.5 * smoothing
    return weight * (1.0 - t), weight * pos_weight * t


@triton.jit
def binary_cross_entropy_value(x, t, weight, pos_weight, smoothing, s1, s2, FLAGS: tl.constexpr):
    a, b = _coefficients(t, weight, pos_weight, smoothing)
    above, below, _, _ = softplus_sigmoid(x)
    # A term with coefficient 0 is 0 at an infinite logit, where the product would be NaN.
    return tl.where(a == 0.0, 0.0, a * above) + tl.where(b == 0.0, 0.0, b * below)


@triton.jit
def binary_cross_entropy_gradient(x, t, weight, pos_weight, smoothing, s1, s2, FLAGS: tl.constexpr):
    a, b = _coefficients(t, weight, pos_weight, smoothing)
    above, below, probability, complement = softplus_sigmoid(x)
    dx = a * probability - b * complement
    dt = weight * (1.0 - smoothing) * (pos_weight * below - above)
    return dx, dt, dx, dt
