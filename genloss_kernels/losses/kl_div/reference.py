"""The Kullback-Leibler divergence in plain PyTorch: reference, and the eager path's formulas on blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.elementwise import arithmetic
from ...core.formulas import Formulas, Scalars, register_formulas
from ...core.scratch import Scratch

NAME = "kl_div"

# Bit of the flags; kernels.py reads the same.
LOG_TARGET = 1


def reference(x: Tensor, t: Tensor, _: Tensor | None, __: Tensor | None, scalars: Scalars, flags: int) -> Tensor:
    dtype = arithmetic((x, t))
    x, t = x.to(dtype), t.to(dtype)
    return torch.exp(t) * (t - x) if flags & LOG_TARGET else torch.xlogy(t, t) - t * x


def value(
    x: Tensor,
    t: Tensor,
    _: Tensor | None,
    __: Tensor | None,
    scalars: Scalars,
    flags: int,
    scratch: Scratch,
    saved: Sequence[Tensor] = (),
) -> Tensor:
    dtype = arithmetic((x, t))
    x, t = scratch.cast("x", x, dtype), scratch.cast("t", t, dtype)
    if flags & LOG_TARGET:
        # Over the copies of operands in half precision, which are not needed any more.
        difference = torch.sub(t, x, out=scratch.take("x", x.shape, dtype, x.device))
        return difference.mul_(torch.exp(t, out=saved[0] if saved else scratch.take("t", t.shape, dtype, t.device)))
    result = scratch.take("result", x.shape, dtype, x.device)
    # A third of the time of xlogy. No logarithm but that of 0 is so low, and 0 times a number is 0.
    return torch.log(t, out=result).clamp_(min=-1e3).sub_(x).mul_(t)


def total(
    x: Tensor,
    t: Tensor,
    _: Tensor | None,
    __: Tensor | None,
    scalars: Scalars,
    flags: int,
    scratch: Scratch,
    saved: Sequence[Tensor] = (),
) -> Tensor:
    return value(x, t, None, None, scalars, flags, scratch, saved).sum()


def gradient(
    x: Tensor,
    t: Tensor,
    _: Tensor | None,
    __: Tensor | None,
    scalars: Scalars,
    flags: int,
    scratch: Scratch,
    grad: Tensor | float,
    outputs: Sequence[Tensor | None],
    saved: Sequence[Tensor] = (),
) -> None:
    dtype = arithmetic((x, t))
    dx, dt, _, _ = outputs
    if saved:
        p = saved[0]
    else:
        t = scratch.cast("t", t, dtype)
        p = torch.exp(t, out=scratch.take("p", t.shape, dtype, t.device)) if flags & LOG_TARGET else t
    if dt is not None:
        x, t = scratch.cast("x", x, dtype), scratch.cast("t", t, dtype)
        if flags & LOG_TARGET:
            torch.sub(t, x, out=dt).mul_(p).add_(p).mul_(grad)
        else:
            # t / t is 1, and NaN at 0 as torch's.
            torch.div(t, t, out=dt).sub_(x).add_(torch.log(t)).mul_(grad)
    if dx is not None:
        torch.mul(p, -grad, out=dx)


def _kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.kl_div_value, kernels.kl_div_gradient


def _saves(flags: int) -> int:
    """The exponentials of logarithms."""
    return 1 if flags & LOG_TARGET else 0


register_formulas(NAME, Formulas(_kernels, reference, value, total, gradient, _saves))
