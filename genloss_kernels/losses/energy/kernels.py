"""Formulas of contrastive divergence: operands are energies, of one side or of both."""

import triton
import triton.language as tl

# Values of FLAGS, shared with reference.py.
NEGATIVE = tl.constexpr(1)
BOTH = tl.constexpr(2)
SQUARES = tl.constexpr(4)


@triton.jit
def energy_value(a, b, c, d, l2, s1, s2, FLAGS: tl.constexpr):
    value = -a if NEGATIVE & FLAGS else a
    if BOTH & FLAGS:
        value = a - b
    if SQUARES & FLAGS:
        value += (l2 * a) * a
        if BOTH & FLAGS:
            value += (l2 * b) * b
    return value


@triton.jit
def energy_gradient(a, b, c, d, l2, s1, s2, FLAGS: tl.constexpr):
    da = tl.full(a.shape, -1.0 if NEGATIVE & FLAGS else 1.0, a.dtype)
    db = tl.full(b.shape, -1.0, b.dtype)
    if SQUARES & FLAGS:
        da += 2.0 * l2 * a
        db += 2.0 * l2 * b
    return da, db, da, db
