"""Contrastive divergence in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ...core.elementwise import arithmetic
from ...core.formulas import Scalars, by_slopes, register_formulas

NAME = "contrastive_divergence"

# Values of the flags; kernels.py reads the same.
NEGATIVE, BOTH = 1, 2


def reference(a: Tensor, b: Tensor | None, c: None, d: None, scalars: Scalars, flags: int) -> Tensor:
    dtype, l2 = arithmetic((a, b)), scalars[0]
    a = a.to(dtype)
    if b is None:
        return (-a if flags & NEGATIVE else a) + l2 * a.square()
    b = b.to(dtype)
    return a - b + l2 * (a.square() + b.square())


def _slopes(a: Tensor, b: Tensor | None, c: None, d: None, scalars: Scalars, flags: int) -> tuple[Tensor | None, ...]:
    dtype, l2 = arithmetic((a, b)), scalars[0]
    da = 2.0 * l2 * a.to(dtype) + (-1.0 if flags & NEGATIVE else 1.0)
    return da, None if b is None else 2.0 * l2 * b.to(dtype) - 1.0, None, None


def _kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.energy_value, kernels.energy_gradient


register_formulas(NAME, by_slopes(_kernels, reference, _slopes))
