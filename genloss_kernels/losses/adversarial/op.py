"""Launching the penalties, their operators and their autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import autograd
from ...core.elementwise import Grid, Walk, dense, grid_for, walk
from ...core.launch import REDUCTION_TILE, launch
from ...core.library import register
from ...core.reduction import Reduction
from .reference import norms, penalties, roots, squared_norms

# The tile by the size of an element: arithmetic is in fp64, in which a tile of fp32 spills.
_TILES = {2: 2, 4: 8, 8: 8}


def _paths(grad: Tensor) -> tuple[Walk, Grid, tuple[int, int, int, int]]:
    grid = grid_for(grad.shape, _TILES[grad.element_size()], by_sample=True)
    path = walk([grad, None, None, None, None], grad.shape, grid.block, by_sample=True)
    return path, grid, (grad.numel(), grid.sample_size, grid.segments, grid.chunk)


def reduce(value: Tensor, reduction: Reduction) -> Tensor:
    if reduction == Reduction.NONE:
        return value
    return value.sum() / (value.size(0) if reduction == Reduction.MEAN else 1)


def _forward(
    grad: Tensor, target: float, gamma: float | None, reduction: int, dtype: torch.dtype, triton: bool
) -> tuple[Tensor, Tensor]:
    if not triton:
        squares = _fast_squared_norms(grad, target if gamma is None else None)
        loss = penalties(squares, target, gamma)
        found = norms(squares) if gamma is None else squares.new_empty(0)
        return reduce(loss, Reduction(reduction)).to(dtype), found
    from .kernels import _penalty_kernel, _penalty_squares_kernel

    path, grid, sizes = _paths(grad)
    n_samples, device, store = grad.size(0), grad.device, reduction == Reduction.NONE
    partials = torch.empty(grid.programs, dtype=torch.float64, device=device)
    launch(
        _penalty_squares_kernel, grid.programs, device, tuple(path.tensors), path.sizes, path.magics, tuple(path.strides),
        partials, *sizes, KINDS=path.kinds, SMALL=path.small, BLOCK=grid.block, num_warps=grid.num_warps,
    )  # fmt: skip
    found = torch.empty(n_samples if gamma is None else 0, dtype=torch.float64, device=device)
    loss = torch.empty(n_samples if store else (), dtype=dtype, device=device)
    launch(
        _penalty_kernel, -(-n_samples // REDUCTION_TILE.block) if store else 1, device, partials,
        found if gamma is None else None, loss, n_samples,
        grid.segments, target, gamma or 0.0, float(n_samples) if reduction == Reduction.MEAN else 1.0,
        R1=gamma is not None, STORE=store, BLOCK=REDUCTION_TILE.block, num_warps=REDUCTION_TILE.num_warps,
    )  # fmt: skip
    return loss, found


# Norms whose squares fp32 holds with their digits.
_LEAST, _MOST = 1e-15, 1e15

# Elements whose squares fp32 adds up, few in each of its lanes.
_RUN = 2**7

# A norm this close to the target, as a share of it, is found once more in fp64.
_CLOSE = 2.0**-6


def _fast_squared_norms(grad: Tensor, target: float | None) -> Tensor:
    """Squared norm of each sample in fp64, by short sums in fp32 where that loses nothing that shows in a narrower dtype."""
    if grad.device.type == "cpu" and grad.dtype != torch.float64 and grad.numel() and grad.dim() > 1:
        found = _squares_of_runs(grad.flatten(1))
        if bool(((found > _LEAST**2) & (found < _MOST**2)).all()):
            if target is not None and (close := (found.sqrt() - target).abs() < _CLOSE * target).any():
                found[close] = roots(grad if close.all() else grad[close]).square()
            return found
    return squared_norms(grad)


def _squares_of_runs(rows: Tensor) -> Tensor:
    whole = rows.size(1) // _RUN * _RUN
    norms_of_runs = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, _RUN)), dim=2, dtype=torch.float32)
    found = norms_of_runs.double().square_().sum(1)
    if whole < rows.size(1):
        found += torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=torch.float32).double().square_()
    return found


def _forward_fake(
    grad: Tensor, target: float, gamma: float | None, reduction: int, dtype: torch.dtype, triton: bool
) -> tuple[Tensor, Tensor]:
    samples = grad.shape[:1]
    loss = grad.new_empty(samples if reduction == Reduction.NONE else (), dtype=dtype)
    return loss, grad.new_empty(samples if gamma is None else (0,), dtype=torch.float64)


def _backward(
    grad: Tensor, found: Tensor, upstream: Tensor, target: float, gamma: float | None, reduction: int, triton: bool
) -> Tensor:
    divisor = float(grad.size(0)) if reduction == Reduction.MEAN else 1.0
    if not triton:
        factor = upstream.double() / divisor
        if gamma is None:
            factor = factor * 2.0 * (found - target) * torch.where(found == 0.0, 0.0, 1.0 / found)
        else:
            factor = (factor * gamma).expand(grad.shape[:1])
        factor = factor.view(-1, *[1] * (grad.dim() - 1))
        if grad.dtype != torch.float64 and grad.device.type == "cpu" and bool((factor.abs() < _MOST).all()):
            # In fp32, where the factors fit; the product with a half-precision sample is rounded once.
            return torch.mul(grad, factor.float(), out=torch.empty_like(grad))
        return torch.empty_like(grad).copy_(grad.double() * factor)
    from .kernels import _penalty_backward_kernel

    path, grid, sizes = _paths(grad)
    result = dense(path, grad.shape, grad.dtype, grad.device)
    launch(
        _penalty_backward_kernel, grid.programs, grad.device, tuple(path.tensors), (result, None, None, None),
        path.sizes, path.magics, tuple(path.strides), found, upstream, upstream.stride(0) if upstream.dim() else 0, *sizes,
        target, gamma or 0.0, divisor, R1=gamma is not None, KINDS=path.kinds, SMALL=path.small, BLOCK=grid.block,
        num_warps=grid.num_warps,
    )  # fmt: skip
    return result


def _backward_fake(grad: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(grad)


penalty_forward = register(
    "penalty_forward(Tensor grad, float target, float? gamma, int reduction, ScalarType dtype, bool triton)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
penalty_backward = register(
    "penalty_backward(Tensor grad, Tensor found, Tensor upstream, float target, float? gamma, int reduction, bool triton)"
    " -> Tensor",
    _backward,
    _backward_fake,
)


class Penalty(torch.autograd.Function):
    """A penalty on the norm of each sample, and the norms where its gradient takes them."""

    @staticmethod
    def forward(
        grad: Tensor, target: float, gamma: float | None, reduction: int, dtype: torch.dtype, triton: bool
    ) -> tuple[Tensor, Tensor]:
        return penalty_forward(grad, target, gamma, reduction, dtype, triton)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        grad, ctx.target, ctx.gamma, ctx.reduction, _, ctx.triton = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, output[1])

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, found = ctx.saved_tensors
        upstream = grads[0]
        if upstream is None:
            return (None,) * 6
        if torch.is_grad_enabled():
            value = composed(grad, ctx.target, ctx.gamma, Reduction(ctx.reduction))
            (result,) = torch.autograd.grad(value, grad, upstream.to(value.dtype), create_graph=True)
        else:
            result = penalty_backward(grad, found, upstream, ctx.target, ctx.gamma, ctx.reduction, ctx.triton)
        return result, None, None, None, None, None


def composed(grad: Tensor, target: float, gamma: float | None, reduction: Reduction) -> Tensor:
    """The penalty by its reference: differentiable to any order."""
    return reduce(penalties(squared_norms(grad), target, gamma), reduction)
