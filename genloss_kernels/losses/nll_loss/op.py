"""The negative log-likelihood's operators: allocate, launch, register; and the autograd.Function that calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import autograd
from ...core.launch import ELEMENTWISE_TILES, launch
from ...core.layout import collapse
from ...core.library import register
from ...core.reduction import Reduction, accumulator, kernel_dtype, launch_reduction
from ...core.row_plan import gradient_like, incoming, row_strides
from . import reference

_NAMES = {Reduction.NONE: "none", Reduction.MEAN: "mean", Reduction.SUM: "sum"}


def _rows_shape(input: Tensor) -> tuple[int, ...]:
    return (input.size(0), *input.shape[2:])


def _forward(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from .kernels import _nll_forward_kernel

    acc = accumulator(input.dtype)
    rows_shape = _rows_shape(input)
    shape, (input_strides, target_strides) = collapse(rows_shape, [row_strides(input), target.stride()])
    n_rows = target.numel()
    tile = ELEMENTWISE_TILES[4]
    programs = -(-n_rows // tile.block)
    reduce = reduction != Reduction.NONE
    mean = reduction == Reduction.MEAN
    loss = torch.empty(() if reduce else rows_shape, dtype=dtype, device=input.device)
    normalizer = torch.empty(() if mean else (0,), dtype=acc, device=input.device)
    partials = tuple(torch.empty(programs, dtype=acc, device=input.device) if use else None for use in (reduce, mean))
    launch(
        _nll_forward_kernel, programs, input.device,
        input, target, weight, None if reduce else loss, partials, shape, input_strides, target_strides,
        input.stride(1), n_rows, input.size(1), ignore_index,
        REDUCE=reduce, DTYPE=kernel_dtype(acc), BLOCK=tile.block, num_warps=tile.num_warps,
    )  # fmt: skip
    if reduce:
        launch_reduction(
            (*partials, None, None), (loss, normalizer if mean else None, None, None), programs, acc, by_normalizer=mean
        )
    return loss, normalizer


def _forward_fake(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    loss = input.new_empty(_rows_shape(input) if reduction == Reduction.NONE else (), dtype=dtype)
    return loss, input.new_empty(() if reduction == Reduction.MEAN else (0,), dtype=accumulator(input.dtype))


def _backward(
    input: Tensor, target: Tensor, weight: Tensor | None, normalizer: Tensor, grad_loss: Tensor, ignore_index: int
) -> Tensor:
    from .kernels import _nll_backward_kernel

    grad = gradient_like(input).zero_()
    shape, (target_strides, grad_strides) = collapse(_rows_shape(input), [target.stride(), row_strides(grad)])
    upstream, upstream_stride = incoming(grad_loss)
    tile = ELEMENTWISE_TILES[4]
    launch(
        _nll_backward_kernel, -(-target.numel() // tile.block), input.device,
        target, weight, normalizer if normalizer.dim() == 0 else None, upstream, grad, upstream_stride,
        shape, target_strides, grad_strides, grad.stride(1), target.numel(), input.size(1), ignore_index,
        DTYPE=kernel_dtype(accumulator(input.dtype)), BLOCK=tile.block, num_warps=tile.num_warps,
    )  # fmt: skip
    return grad


def _backward_fake(
    input: Tensor, target: Tensor, weight: Tensor | None, normalizer: Tensor, grad_loss: Tensor, ignore_index: int
) -> Tensor:
    return gradient_like(input)


nll_loss_forward = register(
    "nll_loss_forward(Tensor input, Tensor target, Tensor? weight, int ignore_index, int reduction, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
nll_loss_backward = register(
    "nll_loss_backward(Tensor input, Tensor target, Tensor? weight, Tensor normalizer, Tensor grad_loss,"
    " int ignore_index) -> Tensor",
    _backward,
    _backward_fake,
)


class NLLLoss(torch.autograd.Function):
    """Negative log-likelihood of log-probabilities (N, C, d1, ...) by the kernels."""

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return nll_loss_forward(input, target, weight, ignore_index, reduction, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, target, weight, ctx.ignore_index, ctx.reduction, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, output[1])

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss = grads[0]
        input, target, weight, normalizer = ctx.saved_tensors
        if grad_loss is None:
            return (None,) * 6
        if torch.is_grad_enabled():
            loss = reference.nll_loss(input, target, weight, ctx.ignore_index, _NAMES[ctx.reduction], checked=False)
            (grad,) = torch.autograd.grad(loss, input, grad_loss.to(loss.dtype), create_graph=True)
        else:
            grad = nll_loss_backward(input, target, weight, normalizer, grad_loss, ctx.ignore_index)
        return grad, *(None,) * 5
