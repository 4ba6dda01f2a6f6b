"""The autograd.Functions of linear cross entropy: gradients in forward, or recomputed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import autograd
from ...core.handover import hand_over, keep
from ...core.reduction import Reduction
from ..cross_entropy.reference import Options
from .chunks import Head
from .derivatives import LinearCrossEntropyGradients, upstream_of_rows
from .op import (
    Needed,
    linear_cross_entropy_reduced,
    linear_cross_entropy_rows,
    linear_cross_entropy_rows_backward,
    needed_of,
)


def _kept(gradients: tuple[Tensor, ...], needed: Needed) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needed, strict=True)]


class ReducedLinearCrossEntropy(torch.autograd.Function):
    """Mean or sum, with the gradients made in the forward; also returns these.

    The first backward scales them in place and hands them over; a second one makes them again.
    """

    @staticmethod
    def forward(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
        row_weight: Tensor | None, divisor: Tensor | None,
        ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
        fixed_divisor: float | None, reduction: int, most: int, sum_dtype: torch.dtype, needed: int, dtype: torch.dtype,
        triton: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return linear_cross_entropy_reduced(
            input, linear_weight, linear_bias, target, weight, row_weight, divisor, ignore_index, label_smoothing, softcap,
            logit_scale, z_loss, fixed_divisor, reduction, most, sum_dtype, needed, dtype, triton,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.scalars = inputs[7:]
        keep(ctx, inputs[:7], output[1:])

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, nothing = grads[0], (None,) * (3 + len(ctx.scalars))
        if grad is None:
            return (None,) * 4 + nothing
        saved = ctx.saved_tensors
        tensors, stored = saved[:7], saved[7:]
        needed = needed_of(ctx.scalars[9])
        if torch.is_grad_enabled():
            *formula, divisor, reduction, most, sum_dtype, mask, _, triton = ctx.scalars
            options = Options(*formula)._replace(divisor=divisor, reduction=Reduction(reduction))
            rows = upstream_of_rows(grad, Head(*tensors), options)
            made = LinearCrossEntropyGradients.apply(
                *tensors[:6], rows, None, None, None, *formula, False, most, sum_dtype, mask, triton
            )
            return (*_kept(made, needed), *nothing)
        made = hand_over(
            ctx, stored, grad, lambda: linear_cross_entropy_reduced(*tensors, *ctx.scalars)[1:], triton=ctx.scalars[-1]
        )
        return (*_kept(made, needed), *nothing)


class LinearCrossEntropyRows(torch.autograd.Function):
    """Loss and statistics of each row, their logits computed again in backward; then what only the backward needs."""

    @staticmethod
    def forward(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
        row_weight: Tensor | None,
        ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
        stats: bool, most: int, sum_dtype: torch.dtype, needed: int, triton: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return linear_cross_entropy_rows(
            input, linear_weight, linear_bias, target, weight, row_weight, ignore_index, label_smoothing, softcap,
            logit_scale, z_loss, stats, most, triton,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[4:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], output[6], output[3])
        ctx.scalars = inputs[6:]

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, saved, entropy = ctx.saved_tensors
        *formula, stats, most, sum_dtype, mask, triton = ctx.scalars
        nothing = (None,) * (3 + len(ctx.scalars))
        upstream = grads[:4] if stats else (grads[0], None, None, None)
        if all(g is None for g in upstream):
            return (None,) * 4 + nothing
        scalars = (*formula, stats, most, sum_dtype, mask, triton)
        if torch.is_grad_enabled():
            made = LinearCrossEntropyGradients.apply(*tensors, *upstream, *scalars)
        else:
            made = linear_cross_entropy_rows_backward(*tensors, saved, entropy, *upstream, *scalars)
        return (*_kept(made, needed_of(mask)), *nothing)
