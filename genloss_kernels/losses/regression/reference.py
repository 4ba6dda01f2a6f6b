"""The regression losses in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.elementwise import arithmetic
from ...core.elementwise_op import Scalars, by_slopes, register_formulas

MSE, L1 = "mse_loss", "l1_loss"


def mse(x: Tensor, t: Tensor, weight: Tensor | None, _: None, scalars: Scalars, flags: int) -> Tensor:
    dtype = arithmetic((x, t, weight))
    square = (x.to(dtype) - t.to(dtype)).square()
    return square if weight is None else square * weight.to(dtype)


def _mse_slopes(
    x: Tensor, t: Tensor, weight: Tensor | None, _: None, scalars: Scalars, flags: int
) -> tuple[Tensor | None, ...]:
    dtype = arithmetic((x, t, weight))
    difference = x.to(dtype) - t.to(dtype)
    dx = 2.0 * difference if weight is None else 2.0 * weight.to(dtype) * difference
    return dx, -dx, difference.square(), None


def l1(x: Tensor, t: Tensor, weight: Tensor | None, _: None, scalars: Scalars, flags: int) -> Tensor:
    dtype = arithmetic((x, t, weight))
    distance = (x.to(dtype) - t.to(dtype)).abs()
    return distance if weight is None else distance * weight.to(dtype)


def _l1_slopes(
    x: Tensor, t: Tensor, weight: Tensor | None, _: None, scalars: Scalars, flags: int
) -> tuple[Tensor | None, ...]:
    dtype = arithmetic((x, t, weight))
    difference = x.to(dtype) - t.to(dtype)
    dx = difference.sign() if weight is None else weight.to(dtype) * difference.sign()
    return dx, -dx, difference.abs(), None


def _mse_kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.mse_value, kernels.mse_gradient


def _l1_kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.l1_value, kernels.l1_gradient


torch_mse_loss = torch.nn.functional.mse_loss

register_formulas(MSE, by_slopes(_mse_kernels, mse, _mse_slopes))
register_formulas(L1, by_slopes(_l1_kernels, l1, _l1_slopes))
