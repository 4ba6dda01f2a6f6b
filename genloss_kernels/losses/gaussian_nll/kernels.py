"""Formulas of the Gaussian negative log-likelihood: operands input, target and variance; scalars eps and the constant."""

import triton
import triton.language as tl


@triton.jit
def gaussian_nll_value(x, t, var, _, eps, constant, s2, FLAGS: tl.constexpr):
    v = tl.where(var < eps, eps, var)
    difference = x - t
    return 0.5 * (tl.log(v) + difference * difference / v) + constant


@triton.jit
def gaussian_nll_gradient(x, t, var, _, eps, constant, s2, FLAGS: tl.constexpr):
    precision = 1.0 / tl.where(var < eps, eps, var)
    difference = x - t
    dx = difference * precision
    # Also below eps, as if the clamped variance were the given one.
    dvar = 0.5 * (1.0 - difference * dx) * precision
    return dx, -dx, dvar, dvar
