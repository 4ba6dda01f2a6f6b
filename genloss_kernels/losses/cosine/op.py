"""The cosine embedding loss's operators: allocate, launch, register; and the autograd.Function that calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import autograd
from ...core.elementwise import arithmetic
from ...core.launch import ELEMENTWISE_TILES, launch
from ...core.library import register
from ...core.reduction import Reduction, kernel_dtype, launch_reduction
from ...core.row_plan import incoming
from . import eager, reference


def _shape(input1: Tensor, input2: Tensor, target: Tensor) -> torch.Size:
    """Shape of the pairs: () for one of vectors."""
    shape = input1.shape[:-1]
    if input2.shape[:-1] == shape == target.shape:
        return shape
    return torch.broadcast_shapes(shape, input2.shape[:-1], target.shape)


def _pairs(input1: Tensor, input2: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operands (N, D), (N, D) and (N), with columns that lie side by side."""
    n_rows = _shape(input1, input2, target).numel()
    first, second = (x if x.stride(-1) == 1 or x.size(-1) <= 1 else x.contiguous() for x in (input1, input2))
    if input1.shape == input2.shape and target.dim() == 1 and target.size(0) == input1.size(0):
        return first, second, target
    n_rows, n_cols = _shape(input1, input2, target).numel(), input1.size(-1)
    return first.expand(n_rows, n_cols), second.expand(n_rows, n_cols), target.expand(n_rows)


def _tile(first: Tensor, second: Tensor) -> tuple[int, int, int, int]:
    """Programs, rows and columns of one, and its warps."""
    tile = ELEMENTWISE_TILES[max(first.element_size(), second.element_size())]
    cols = min(tile.block, max(16, 1 << max(0, first.size(1) - 1).bit_length()))
    rows = tile.block // cols
    return -(-first.size(0) // rows), rows, cols, tile.num_warps


def _divisor(n_rows: int, reduction: int) -> float:
    return float(n_rows) if reduction == Reduction.MEAN else 1.0


def _forward(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float, reduction: int, dtype: torch.dtype, triton: bool
) -> tuple[Tensor, Tensor]:
    first, second, labels = _pairs(input1, input2, target)
    n_rows, acc, device = first.size(0), arithmetic((first, second)), first.device
    shape = _shape(input1, input2, target)
    if not triton:
        stats = eager.statistics(first, second, acc)
        # In shape from the start: a Function's result that is a view cannot be changed in place.
        loss = reference.of_cosine(stats[2].view(shape), target, margin)
        return reference.reduced(loss, Reduction(reduction)).to(dtype), stats
    from .kernels import _cosine_forward_kernel

    programs, rows, cols, warps = _tile(first, second)
    store = reduction == Reduction.NONE
    stats = torch.empty(3, n_rows, dtype=acc, device=device)
    loss = torch.empty(shape if store else (), dtype=dtype, device=device)
    partials = None if store else torch.empty(programs, dtype=acc, device=device)
    launch(
        _cosine_forward_kernel, programs, device, first, second, labels, loss if store else None, partials, stats,
        first.stride(0), second.stride(0), labels.stride(0), n_rows, first.size(1), margin,
        DTYPE=kernel_dtype(acc), ROWS=rows, COLS=cols, num_warps=warps,
    )  # fmt: skip
    if not store:
        total = (partials, None, None, None), (loss, None, None, None)
        launch_reduction(*total, programs, acc, divisor=_divisor(n_rows, reduction))
    return loss, stats


def _forward_fake(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float, reduction: int, dtype: torch.dtype, triton: bool
) -> tuple[Tensor, Tensor]:
    shape = _shape(input1, input2, target)
    stats = input1.new_empty(3, shape.numel(), dtype=arithmetic((input1, input2)))
    return input1.new_empty(shape if reduction == Reduction.NONE else (), dtype=dtype), stats


def _backward(
    input1: Tensor, input2: Tensor, target: Tensor, stats: Tensor, grad: Tensor, margin: float, reduction: int,
    needed: Sequence[bool], triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    first, second, labels = _pairs(input1, input2, target)
    n_rows, acc, device = first.size(0), stats.dtype, first.device
    wide = [
        # A row that serves several pairs has a sum for its gradient.
        torch.empty(first.shape, dtype=x.dtype if x.numel() == first.numel() else acc, device=device) if need else None
        for x, need in zip((input1, input2), needed, strict=True)
    ]
    divisor = _divisor(max(1, n_rows), reduction)
    if triton:
        from .kernels import _cosine_backward_kernel

        upstream, upstream_stride = incoming(grad)
        programs, rows, cols, warps = _tile(first, second)
        launch(
            _cosine_backward_kernel, programs, device, first, second, labels, stats, upstream, *wide,
            first.stride(0), second.stride(0), labels.stride(0), upstream_stride, n_rows, first.size(1), margin, divisor,
            DTYPE=kernel_dtype(acc), ROWS=rows, COLS=cols, num_warps=warps,
        )  # fmt: skip
    else:
        upstream = grad.item() if grad.dim() == 0 and device.type == "cpu" else grad.reshape(-1).to(acc)
        eager.gradients(first, second, stats, eager.slopes(stats[2], labels, margin).mul_(upstream / divisor), wide)
    found = [
        x.new_empty(0) if w is None else w if w.shape == x.shape else _added(w, x)
        for w, x in zip(wide, (input1, input2), strict=True)
    ]
    return found[0], found[1]


def _added(wide: Tensor, x: Tensor) -> Tensor:
    """The gradient of a row for each pair that it serves, or of one vector."""
    rows = wide if wide.numel() == x.numel() else wide.sum(0)
    return rows.view(x.shape).to(x.dtype)


def _backward_fake(
    input1: Tensor, input2: Tensor, target: Tensor, stats: Tensor, grad: Tensor, margin: float, reduction: int,
    needed: Sequence[bool], triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    first, second = (
        x.new_empty(x.shape) if need else x.new_empty(0) for x, need in zip((input1, input2), needed, strict=True)
    )
    return first, second


_OPERANDS = "Tensor input1, Tensor input2, Tensor target"

cosine_forward = register(
    f"cosine_forward({_OPERANDS}, float margin, int reduction, ScalarType dtype, bool triton) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
cosine_backward = register(
    f"cosine_backward({_OPERANDS}, Tensor stats, Tensor grad, float margin, int reduction, bool[] needed, bool triton)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class CosineEmbedding(torch.autograd.Function):
    """The loss of pairs of rows (N, D), or of one of vectors, and what the backward needs to know of each."""

    @staticmethod
    def forward(
        input1: Tensor, input2: Tensor, target: Tensor, margin: float, reduction: int, dtype: torch.dtype, triton: bool
    ) -> tuple[Tensor, Tensor]:
        return cosine_forward(input1, input2, target, margin, reduction, dtype, triton)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input1, input2, target, ctx.margin, ctx.reduction, _, ctx.triton = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input1, input2, target, output[1])

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        input1, input2, target, stats = ctx.saved_tensors
        if grad is None:
            return (None,) * 7
        needed = list(ctx.needs_input_grad[:2])
        if torch.is_grad_enabled():
            input1, input2 = autograd.apart((input1, input2))
            loss = reference.composed(input1, input2, target, ctx.margin, Reduction(ctx.reduction))
            wanted = [x for x, need in zip((input1, input2), needed, strict=True) if need]
            found = iter(torch.autograd.grad(loss, wanted, grad.to(loss.dtype), create_graph=True))
            result = [next(found) if need else None for need in needed]
        else:
            every = cosine_backward(input1, input2, target, stats, grad, ctx.margin, ctx.reduction, needed, ctx.triton)
            result = [g if need else None for g, need in zip(every, needed, strict=True)]
        return *result, *(None,) * 5
