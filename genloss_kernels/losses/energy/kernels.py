"""Formulas of contrastive divergence: operands are energies, of one side or of both."""

import triton
import triton.language as tl

# Values of FLAGS, shared with reference.py.
NEGATIVE = tl.constexpr(1)
BOTH = tl.constexpr(2)


@triton.jit
def energy_value(a, b, c, d, l2, s1, s2, FLAGS: tl.constexpr):
    if BOTH & FLAGS:
        value = a - b + l2 * (a * a + b * b)
    else:
        value = (-a if NEGATIVE & FLAGS else a) + l2 * (a * a)
    return value


@triton.jit
def energy_gradient(a, b, c, d, l2, s1, s2, FLAGS: tl.constexpr):
    slope = 2.0 * l2 * a
    da = slope - 1.0 if NEGATIVE & FLAGS else slope + 1.0
    db = 2.0 * l2 * b - 1.0
    return da, db, da, db
