"""Contrastive divergence in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.elementwise import arithmetic
from ...core.formulas import Scalars, by_slopes, register_formulas

NAME = "contrastive_divergence"

# Values of the flags; kernels.py reads the same.
NEGATIVE, BOTH, SQUARES = 1, 2, 4


def reference(a: Tensor, b: Tensor | None, c: None, d: None, scalars: Scalars, flags: int) -> Tensor:
    dtype, l2 = arithmetic((a, b)), scalars[0]
    a = a.to(dtype)
    value, squares = -a if flags & NEGATIVE else a, [a]
    if b is not None:
        b = b.to(dtype)
        value, squares = value - b, [a, b]
    if flags & SQUARES:
        for energy in squares:
            value = value + (l2 * energy) * energy
    return value


def _slopes(a: Tensor, b: Tensor | None, c: None, d: None, scalars: Scalars, flags: int) -> tuple[Tensor | None, ...]:
    dtype, l2 = arithmetic((a, b)), scalars[0]

    def slope(energy: Tensor, sign: float) -> Tensor:
        if flags & SQUARES:
            return 2.0 * l2 * energy.to(dtype) + sign
        return torch.full_like(energy, sign, dtype=dtype)

    return slope(a, -1.0 if flags & NEGATIVE else 1.0), None if b is None else slope(b, -1.0), None, None


def _kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.energy_value, kernels.energy_gradient


register_formulas(NAME, by_slopes(_kernels, reference, _slopes))
