"""The short way to an autograd.Function, against the long one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genloss_kernels.core.autograd import apply


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _twice(x: Tensor) -> Tensor:
    return apply(_Double, x, 2.0).sum()


def test_value_and_gradient() -> None:
    x = torch.ones(3, requires_grad=True)
    _twice(x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_under_a_functorch_transform() -> None:
    """There only the long way sees the transform."""
    assert torch.func.grad(_twice)(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]


# Dynamo makes an instance of every Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled() -> None:
    """There only the long way can be traced."""
    x = torch.ones(3, requires_grad=True)
    torch.compile(_twice, fullgraph=True, backend="aot_eager")(x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]
