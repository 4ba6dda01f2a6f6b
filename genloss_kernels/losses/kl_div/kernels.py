"""Formulas of the Kullback-Leibler divergence: operands are input and target."""

import triton
import triton.language as tl

# Bit of FLAGS, shared with reference.py.
LOG_TARGET = tl.constexpr(1)


@triton.jit
def kl_div_value(x, t, _, __, s0, s1, s2, FLAGS: tl.constexpr):
    if LOG_TARGET & FLAGS:
        value = tl.exp(t) * (t - x)
    else:
        value = tl.where(t == 0.0, 0.0, t * tl.log(t)) - t * x
    return value


@triton.jit
def kl_div_gradient(x, t, _, __, s0, s1, s2, FLAGS: tl.constexpr):
    if LOG_TARGET & FLAGS:
        p = tl.exp(t)
        dt = p * (t - x) + p
    else:
        p = t
        # t / t is 1, and NaN at 0 as torch's.
        dt = tl.log(t) + t / t - x
    return -p, dt, dt, dt
