"""Formulas of the regression losses: operands are input, target and weight."""

import triton
import triton.language as tl


@triton.jit
def mse_value(x, t, weight, _, s0, s1, s2, FLAGS: tl.constexpr):
    return weight * (x - t) * (x - t)


@triton.jit
def mse_gradient(x, t, weight, _, s0, s1, s2, FLAGS: tl.constexpr):
    difference = x - t
    dx = 2.0 * weight * difference
    return dx, -dx, difference * difference, dx


@triton.jit
def l1_value(x, t, weight, _, s0, s1, s2, FLAGS: tl.constexpr):
    return weight * tl.abs(x - t)


@triton.jit
def l1_gradient(x, t, weight, _, s0, s1, s2, FLAGS: tl.constexpr):
    difference = x - t
    # 0 at 0, and as torch's at NaN.
    dx = tl.where(difference > 0.0, weight, tl.where(difference < 0.0, -weight, 0.0))
    return dx, -dx, tl.abs(difference), dx
