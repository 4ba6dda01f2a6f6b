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


@triton.jit
def _huber(difference, threshold, slope, curvature):
    distance = tl.abs(difference)
    linear = slope * (distance - 0.5 * threshold)
    return tl.where(distance < threshold, 0.5 * curvature * distance * distance, linear)


@triton.jit
def huber_value(x, t, weight, _, threshold, slope, curvature, FLAGS: tl.constexpr):
    return weight * _huber(x - t, threshold, slope, curvature)


@triton.jit
def huber_gradient(x, t, weight, _, threshold, slope, curvature, FLAGS: tl.constexpr):
    difference = x - t
    below = tl.where(difference <= -threshold, -slope, curvature * difference)
    dx = weight * tl.where(difference >= threshold, slope, below)
    return dx, -dx, _huber(difference, threshold, slope, curvature), dx
