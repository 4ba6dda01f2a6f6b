"""The regression losses in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.elementwise import arithmetic
from ...core.elementwise_op import Scalars, by_reference, register_formulas

MSE = "mse_loss"


def mse(x: Tensor, t: Tensor, weight: Tensor | None, _: None, scalars: Scalars, flags: int) -> Tensor:
    dtype = arithmetic((x, t, weight))
    square = (x.to(dtype) - t.to(dtype)).square()
    return square if weight is None else square * weight.to(dtype)


def _mse_kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.mse_value, kernels.mse_gradient


torch_mse_loss = torch.nn.functional.mse_loss

register_formulas(MSE, by_reference(_mse_kernels, mse))
