"""The Gaussian negative log-likelihood in plain PyTorch: reference, and the eager path's formulas on blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.elementwise import arithmetic
from ...core.formulas import Formulas, Scalars, register_formulas
from ...core.scratch import Scratch

NAME = "gaussian_nll_loss"


def reference(x: Tensor, t: Tensor, var: Tensor, _: Tensor | None, scalars: Scalars, flags: int) -> Tensor:
    eps, constant = scalars[:2]
    dtype = arithmetic((x, t, var))
    v = var.to(dtype)
    # The clamp's gradient is 1 everywhere.
    v = torch.where(v < eps, eps + (v - v.detach()), v)
    return 0.5 * (torch.log(v) + (x.to(dtype) - t.to(dtype)).square() / v) + constant


def _difference_and_variance(x: Tensor, t: Tensor, var: Tensor, scalars: Scalars, scratch: Scratch) -> tuple[Tensor, Tensor]:
    dtype = arithmetic((x, t, var))
    x, t, var = (scratch.cast(name, tensor, dtype) for name, tensor in (("x", x), ("t", t), ("var", var)))
    difference, v = (scratch.take(name, x.shape, dtype, x.device) for name in ("difference", "v"))
    return torch.sub(x, t, out=difference), torch.clamp(var, min=scalars[0], out=v)


def _twice(x: Tensor, t: Tensor, var: Tensor, scalars: Scalars, scratch: Scratch) -> Tensor:
    """Twice the loss without its constant, in a buffer."""
    difference, v = _difference_and_variance(x, t, var, scalars, scratch)
    log = torch.log(v, out=scratch.take("log", v.shape, v.dtype, v.device))
    return log.addcdiv_(difference.square_(), v)


def value(x: Tensor, t: Tensor, var: Tensor, _: Tensor | None, scalars: Scalars, flags: int, scratch: Scratch) -> Tensor:
    return _twice(x, t, var, scalars, scratch).mul_(0.5).add_(scalars[1])


def total(
    x: Tensor,
    t: Tensor,
    var: Tensor,
    _: Tensor | None,
    scalars: Scalars,
    flags: int,
    scratch: Scratch,
    saved: Sequence[Tensor] = (),
) -> Tensor | float:
    twice = _twice(x, t, var, scalars, scratch).sum()
    return 0.5 * (twice.item() if x.device.type == "cpu" else twice) + scalars[1] * x.numel()


def gradient(
    x: Tensor,
    t: Tensor,
    var: Tensor,
    _: Tensor | None,
    scalars: Scalars,
    flags: int,
    scratch: Scratch,
    grad: Tensor | float,
    outputs: Sequence[Tensor | None],
    saved: Sequence[Tensor] = (),
) -> None:
    dx, dt, dvar, _ = outputs
    difference, v = _difference_and_variance(x, t, var, scalars, scratch)
    slope = torch.div(difference, v, out=scratch.take("slope", v.shape, v.dtype, v.device))
    if dvar is not None:
        torch.mul(difference, slope, out=dvar).sub_(1.0).div_(v).mul_(grad * -0.5)
    if dx is not None:
        torch.mul(slope, grad, out=dx)
    if dt is not None:
        torch.mul(slope, -grad, out=dt)


def _kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.gaussian_nll_value, kernels.gaussian_nll_gradient


register_formulas(NAME, Formulas(_kernels, reference, value, total, gradient))
