"""Launching the shared elementwise kernels over operands of any layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tuned
from .launch import ELEMENTWISE_TILES, REDUCTION_TILE, Tile, launch
from .layout import collapse, contiguous_strides, empty_in_order, full_size, memory_order
from .reduction import Reduction, kernel_dtype, launch_reduction

# Tiles in one program where the tensor is large: fewer partial sums, and loads of the next tile under way early.
TILES_PER_PROGRAM = 4

_ABSENT, _DENSE, _SINGLE, _STRIDED = range(4)
_MAX_DIMENSIONS = 3


class Operands(NamedTuple):
    """Up to four operands of a formula and a mask, each of which broadcasts to ``shape``."""

    tensors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    mask: Tensor | None
    shape: torch.Size


class Walk(NamedTuple):
    """Flat order over a broadcast shape: its dimensions ``order``, merged to ``sizes``, and each operand's way there."""

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    tensors: list[Tensor | None]
    strides: list[tuple[int, ...]]
    kinds: int
    small: int
    magics: tuple[int, ...]


def walk(tensors: Sequence[Tensor | None], shape: torch.Size, block: int, *, by_sample: bool) -> Walk:
    """Order the elements as the first full-size operand has them, and find every operand's strides in that order."""
    full = full_size(tensors, shape)
    order = tuple(range(len(shape))) if full is None else memory_order(full)
    if by_sample and order[0] != 0:
        order = tuple(range(len(shape)))
    dims = [shape[d] for d in order]
    views = [None if t is None else t.expand(shape).permute(order) for t in tensors]
    sizes, strides = _merge(dims, views)
    if len(sizes) > _MAX_DIMENSIONS:
        dense = contiguous_strides(dims)
        views = [v if v is None or v.stride() == dense or not any(v.stride()) else v.contiguous() for v in views]
        sizes, strides = _merge(dims, views)
    kinds = 0
    for position, (view, stride) in enumerate(zip(views, strides, strict=True)):
        kinds |= _kind(view, sizes, stride) << (2 * position)
    if not any((kinds >> (2 * position)) & 3 == _STRIDED for position in range(len(views))):
        # Nothing is found by its index: one specialisation serves all sizes.
        return Walk(order, (1,), views, [(0,)] * len(views), kinds, 0, (1,))
    small = sum(1 << dim for dim, size in enumerate(sizes) if 0 < size < block)
    magics = tuple(-(-(2**32) // size) if 0 < size < block else 1 for size in sizes)
    return Walk(order, sizes, views, strides, kinds, small, magics)


def _merge(dims: list[int], views: Sequence[Tensor | None]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    nowhere = (0,) * len(dims)
    strides = [nowhere if v is None else v.stride() for v in views]
    sizes, merged = collapse(dims, [*strides, contiguous_strides(dims)])
    return sizes, merged[:-1]


def _kind(view: Tensor | None, sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    if view is None:
        return _ABSENT
    if not any(strides):
        return _SINGLE
    return _DENSE if strides == contiguous_strides(sizes) else _STRIDED


class Grid(NamedTuple):
    programs: int
    block: int
    num_warps: int
    chunk: int
    sample_size: int
    segments: int


def grid_for(shape: torch.Size, itemsize: int, *, by_sample: bool, device: torch.device | None = None) -> Grid:
    """Programs over ``shape``, none of which covers two samples where results are ``by_sample``; as tuned for ``device``."""
    tile = Tile(*tuned.entry(device, "elementwise", itemsize, ELEMENTWISE_TILES[itemsize]))
    tiles = tuned.entry(device, "tiles a program", itemsize, TILES_PER_PROGRAM)
    n_elements = shape.numel()
    sample_size = n_elements // shape[0] if by_sample and shape[0] else n_elements
    chunk = tile.block * max(1, min(tiles, sample_size // tile.block))
    segments = -(-sample_size // chunk)
    programs = segments * shape[0] if by_sample else segments
    return Grid(programs, tile.block, tile.num_warps, chunk, sample_size, segments)


def arithmetic(tensors: Sequence[Tensor | None]) -> torch.dtype:
    """The dtype of arithmetic: fp64 if any operand has it, else fp32."""
    dtypes = [t.dtype for t in tensors if t is not None and t.is_floating_point()]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def widest(tensors: Sequence[Tensor | None]) -> int:
    """Bytes of the largest floating point element."""
    return max(t.element_size() for t in tensors if t is not None and t.is_floating_point())


def divisor_of(reduction: Reduction, shape: torch.Size) -> float:
    """What a reduction divides the sum by, where that follows from the shape."""
    if reduction == Reduction.MEAN:
        return float(shape.numel())
    return float(shape[0]) if reduction == Reduction.BATCHMEAN else 1.0


def forward(
    value: Any,
    operands: Operands,
    scalars: tuple[float, float, float],
    flags: int,
    reduction: Reduction,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launch the formula ``value`` and reduce; returns the loss and, for a masked mean, the number of elements kept."""
    from .elementwise_kernel import _elementwise_forward_kernel, _sample_sum_kernel

    shape, device = operands.shape, next(t.device for t in operands.tensors if t is not None)
    acc = arithmetic(operands.tensors)
    by_sample, store = reduction == Reduction.SAMPLE, reduction == Reduction.NONE
    grid = grid_for(shape, widest(operands.tensors), by_sample=by_sample, device=device)
    path = walk([*operands.tensors, operands.mask], shape, grid.block, by_sample=by_sample)
    count = operands.mask is not None and reduction == Reduction.MEAN
    loss = dense(path, shape, dtype, device) if store else None
    partials = (
        None if store else torch.empty(grid.programs, dtype=acc, device=device),
        torch.empty(grid.programs, dtype=torch.int32, device=device) if count else None,
    )
    launch(
        _elementwise_forward_kernel, grid.programs, device,
        tuple(path.tensors), path.sizes, path.magics, tuple(path.strides), loss, partials,
        shape.numel(), grid.sample_size, grid.segments, grid.chunk, *scalars,
        VALUE=value, FLAGS=flags, KINDS=path.kinds, SMALL=path.small, STORE=store, SAMPLE=by_sample, COUNT=count,
        DTYPE=kernel_dtype(acc), BLOCK=grid.block, num_warps=grid.num_warps,
    )  # fmt: skip
    nothing = torch.empty(0, dtype=acc, device=device)
    if loss is not None:
        return loss, nothing
    if by_sample:
        sums = torch.empty(shape[0], dtype=dtype, device=device)
        launch(
            _sample_sum_kernel, shape[0], device, partials[0], sums, grid.segments,
            DTYPE=kernel_dtype(acc), BLOCK=REDUCTION_TILE.block, num_warps=REDUCTION_TILE.num_warps,
        )  # fmt: skip
        return sums, nothing
    total = torch.empty((), dtype=dtype, device=device)
    kept = torch.empty((), dtype=acc, device=device) if count else nothing
    launch_reduction(
        (*partials, None, None),
        (total, kept if count else None, None, None),
        grid.programs,
        acc,
        divisor=divisor_of(reduction, shape),
        by_normalizer=count,
    )
    return total, kept


def backward(
    gradient: Any,
    operands: Operands,
    grad: Tensor,
    kept: Tensor,
    scalars: tuple[float, float, float],
    flags: int,
    reduction: Reduction,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Launch the formula ``gradient``; returns the gradient of each operand that needs one, in its shape and dtype."""
    from .elementwise_kernel import _elementwise_backward_kernel

    shape, device = operands.shape, grad.device
    by_sample = reduction == Reduction.SAMPLE
    acc = arithmetic(operands.tensors)
    grid = grid_for(shape, widest(operands.tensors), by_sample=by_sample, device=device)
    upstream = None if by_sample else grad
    path = walk([*operands.tensors, operands.mask, upstream], shape, grid.block, by_sample=by_sample)
    tensors = [*path.tensors[:5], grad if by_sample else path.tensors[5]]
    wide = [
        dense(path, shape, t.dtype if t.shape == shape else acc, device) if need and t is not None else None
        for t, need in zip(operands.tensors, needed, strict=True)
    ]
    launch(
        _elementwise_backward_kernel, grid.programs, device,
        tuple(tensors), tuple(wide), path.sizes, path.magics, tuple(path.strides), kept if kept.dim() == 0 else None,
        shape.numel(), grid.sample_size, grid.segments, grid.chunk, grad.stride(0) if by_sample else 0,
        divisor_of(reduction, shape), *scalars,
        GRADIENT=gradient, FLAGS=flags, KINDS=path.kinds, SMALL=path.small, SAMPLE=by_sample,
        DTYPE=kernel_dtype(acc), BLOCK=grid.block, num_warps=grid.num_warps,
    )  # fmt: skip
    return [
        None if w is None or t is None else w.sum_to_size(t.shape).to(t.dtype)
        for w, t in zip(wide, operands.tensors, strict=True)
    ]


def dense(path: Walk, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised tensor of ``shape`` whose memory lies in the walk's order."""
    return empty_in_order(shape, path.order, dtype, device)
