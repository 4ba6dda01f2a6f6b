"""The regression losses in plain PyTorch: references, and the eager path's formulas on blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.elementwise import arithmetic
from ...core.formulas import Formulas, Scalars, register_formulas
from ...core.reduction import Reduction
from ...core.scratch import Scratch

MSE, L1, SMOOTH_L1, HUBER = "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"

# What torch.nn.functional's call.
torch_mse_loss = torch._C._nn.mse_loss  # pyright: ignore[reportAttributeAccessIssue]
torch_l1_loss = torch._C._nn.l1_loss  # pyright: ignore[reportAttributeAccessIssue]
torch_smooth_l1_loss = torch._C._nn.smooth_l1_loss  # pyright: ignore[reportAttributeAccessIssue]
torch_huber_loss = torch._C._nn.huber_loss  # pyright: ignore[reportAttributeAccessIssue]


def _difference(x: Tensor, t: Tensor, weight: Tensor | None) -> Tensor:
    dtype = arithmetic((x, t, weight))
    return x.to(dtype) - t.to(dtype)


def _wide(x: Tensor, t: Tensor, weight: Tensor | None) -> Sequence[Tensor]:
    """Input and target in the dtype of arithmetic and in one shape, as the built-ins need them."""
    dtype = arithmetic((x, t, weight))
    return torch.broadcast_tensors(x.to(dtype), t.to(dtype))


def _weighted(value: Tensor, weight: Tensor | None) -> Tensor:
    return value if weight is None else value * weight.to(value.dtype)


def mse(x: Tensor, t: Tensor, weight: Tensor | None, _: Tensor | None, scalars: Scalars, flags: int) -> Tensor:
    return _weighted(_difference(x, t, weight).square(), weight)


def l1(x: Tensor, t: Tensor, weight: Tensor | None, _: Tensor | None, scalars: Scalars, flags: int) -> Tensor:
    return _weighted(_difference(x, t, weight).abs(), weight)


def smooth_l1(x: Tensor, t: Tensor, weight: Tensor | None, _: Tensor | None, scalars: Scalars, flags: int) -> Tensor:
    x, t = _wide(x, t, weight)
    return _weighted(torch_smooth_l1_loss(x, t, int(Reduction.NONE), scalars[0]), weight)


def huber(x: Tensor, t: Tensor, weight: Tensor | None, _: Tensor | None, scalars: Scalars, flags: int) -> Tensor:
    x, t = _wide(x, t, weight)
    return _weighted(torch_huber_loss(x, t, int(Reduction.NONE), scalars[0]), weight)


def _mse_kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.mse_value, kernels.mse_gradient


def _l1_kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.l1_value, kernels.l1_gradient


def _huber_kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.huber_value, kernels.huber_gradient


def _mse_slope(difference: Tensor, scalars: Scalars, grad: Tensor | float, out: Tensor) -> Tensor:
    return torch.mul(difference, 2.0 * grad, out=out)


def _l1_slope(difference: Tensor, scalars: Scalars, grad: Tensor | float, out: Tensor) -> Tensor:
    return torch.sign(difference, out=out).mul_(grad)


def _huber_slope(difference: Tensor, scalars: Scalars, grad: Tensor | float, out: Tensor) -> Tensor:
    threshold, _, curvature = scalars
    return torch.clamp(difference, -threshold, threshold, out=out).mul_(curvature * grad)


def _formulas(
    kernels: Callable[[], tuple[Any, Any]],
    reference: Callable[..., Tensor],
    slope: Callable[[Tensor, Scalars, Tensor | float, Tensor], Tensor],
    of_difference: Callable[..., Tensor] | None = None,
) -> Formulas:
    """Formulas of a loss of the difference; each block is converted once each way.

    ``slope`` is its derivative times the upstream gradient, and ``of_difference`` the loss of a difference, where that is
    one operator.
    """

    def cast(x: Tensor, t: Tensor, weight: Tensor | None, scratch: Scratch) -> tuple[Tensor, Tensor]:
        dtype = arithmetic((x, t, weight))
        return scratch.cast("x", x, dtype), scratch.cast("t", t, dtype)

    def value(
        x: Tensor, t: Tensor, weight: Tensor | None, _: Tensor | None, scalars: Scalars, flags: int, scratch: Scratch
    ) -> Tensor:
        return reference(*cast(x, t, weight, scratch), weight, None, scalars, flags)

    def total(
        x: Tensor,
        t: Tensor,
        weight: Tensor | None,
        _: Tensor | None,
        scalars: Scalars,
        flags: int,
        scratch: Scratch,
        saved: Sequence[Tensor] = (),
    ) -> Tensor:
        return value(x, t, weight, None, scalars, flags, scratch).sum()

    def gradient(
        x: Tensor,
        t: Tensor,
        weight: Tensor | None,
        _: Tensor | None,
        scalars: Scalars,
        flags: int,
        scratch: Scratch,
        grad: Tensor | float,
        outputs: Sequence[Tensor | None],
        saved: Sequence[Tensor] = (),
    ) -> None:
        dx, dt, dweight, _ = outputs
        x, t = cast(x, t, weight, scratch)
        if dweight is not None:
            torch.mul(reference(x, t, None, None, scalars, flags), grad, out=dweight)
        first = dx if dx is not None else dt
        if first is None:
            return
        difference = torch.sub(x, t, out=scratch.take("difference", x.shape, x.dtype, x.device))
        slope(difference, scalars, grad, first)
        if weight is not None:
            first.mul_(weight)
        if dx is None:
            first.neg_()
        elif dt is not None:
            torch.neg(first, out=dt)

    def both(
        x: Tensor,
        t: Tensor,
        weight: Tensor | None,
        _: Tensor | None,
        scalars: Scalars,
        flags: int,
        scratch: Scratch,
        grad: Tensor | float,
        outputs: Sequence[Tensor | None],
    ) -> Tensor:
        dx, dt, *_rest = outputs
        if of_difference is None or dx is None or weight is not None:
            gradient(x, t, weight, None, scalars, flags, scratch, grad, outputs)
            return total(x, t, weight, None, scalars, flags, scratch)
        torch.sub(x, t, out=dx)
        found = of_difference(dx, out=scratch.take("value", dx.shape, dx.dtype, dx.device)).sum()
        slope(dx, scalars, grad, dx)
        if dt is not None:
            torch.neg(dx, out=dt)
        return found

    return Formulas(kernels, reference, value, total, gradient, both=both)


register_formulas(MSE, _formulas(_mse_kernels, mse, _mse_slope, torch.square))
register_formulas(L1, _formulas(_l1_kernels, l1, _l1_slope, torch.abs))
register_formulas(SMOOTH_L1, _formulas(_huber_kernels, smooth_l1, _huber_slope))
register_formulas(HUBER, _formulas(_huber_kernels, huber, _huber_slope))
