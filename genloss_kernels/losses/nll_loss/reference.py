"""The negative log-likelihood in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.reduction import Reduction, accumulator

# What torch.nn.functional.nll_loss calls.
torch_nll_loss = torch._C._nn.nll_loss_nd  # pyright: ignore[reportAttributeAccessIssue]


def nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, *, checked: bool
) -> Tensor:
    """Loss of log-probabilities (N, C, d1, ...) in the dtype of arithmetic.

    Labels that are not ``checked`` to be in range give their row a loss and a gradient of NaN if they are not.
    """
    dtype = accumulator(input.dtype)
    valid = target != ignore_index
    index = torch.where(valid, target, 0).long()
    if not checked:
        outside = (index < 0) | (index >= input.size(1))
        input = input * torch.where(outside, float("nan"), 1.0).to(input.dtype).unsqueeze(1)
        index = torch.where(outside, 0, index)
    # The built-in only gathers here, which is exact in half precision too.
    input = input.contiguous() if input.dim() > 2 else input
    rows = torch_nll_loss(input, index, None, int(Reduction.NONE), -100).to(dtype)
    weights = torch.ones_like(rows) if weight is None else weight.to(dtype)[index]
    loss = torch.where(valid, weights * rows, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / torch.where(valid, weights, 0.0).sum() if reduction == "mean" else loss.sum()
