"""Keeping a compiled second derivative from being that of constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .library import register


def _witness(grad: Tensor, a: Tensor | None, b: Tensor | None, c: Tensor | None, d: Tensor | None) -> Tensor:
    return grad.clone()


def _witness_fake(grad: Tensor, *operands: Tensor | None) -> Tensor:
    return torch.empty_like(grad)


_operator = register("witness(Tensor grad, Tensor? a, Tensor? b, Tensor? c, Tensor? d) -> Tensor", _witness, _witness_fake)


class _Witness(torch.autograd.Function):
    """The result, whose upstream gradient passes an operator that takes the operands."""

    @staticmethod
    def forward(result: Tensor, a: Tensor | None, b: Tensor | None, c: Tensor | None, d: Tensor | None) -> Tensor:
        return result.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _operator(grads[0], *ctx.saved_tensors), None, None, None, None


def witnessed(result: Tensor, *operands: Tensor | None) -> Tensor:
    """``result``, and while compiling with a backward that saves the operands as the caller gave them.

    A compiled backward raises at a second derivative if it was given a tensor that requires a gradient. What it saves may
    otherwise be a view or a copy made on the way, or a gradient made in the forward, which are constants to it.
    """
    if not torch.compiler.is_compiling() or not result.requires_grad:
        return result
    padded = (*operands, *[None] * (4 - len(operands)))
    return _Witness.apply(result, *padded)  # pyright: ignore[reportReturnType]
