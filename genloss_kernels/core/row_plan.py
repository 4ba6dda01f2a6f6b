"""Planning a pass over rows of classes: which kernel walks them, in which tiles, and how wide its loads are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import launch
from .backend import multiprocessors
from .layout import collapse


class Plan(NamedTuple):
    """How the kernels walk the rows: logical row r counts over ``shape``; one tuple of strides for each operand."""

    shape: tuple[int, ...]
    strides: list[tuple[int, ...]]
    n_rows: int
    n_cols: int
    by_rows: bool
    block: int
    block_rows: int
    num_warps: int
    programs: int
    n_splits: int
    split_cols: int
    chunks: int
    vec: int
    ragged: bool


def plan(
    streams: list[Tensor],
    target: Tensor | None,
    *,
    heavy: bool = False,
    twice: bool = False,
    whole: bool = False,
) -> Plan:
    """Plan a pass over ``streams``, operands (N, C, d1, ...) read or written in full, the logits first.

    ``target`` holds class indices, one a row, and is addressed by its own strides. ``heavy`` passes carry more in each lane
    than the softmax needs; one kernel may go over long rows ``twice``, and holds ``whole`` short ones in chunks.
    """
    logits = streams[0]
    operands = [row_strides(s) for s in streams]
    operands += [target.stride()] if target is not None else [(0,) * len(operands[0])]
    row_sizes = (logits.size(0), *logits.shape[2:])
    shape, strides = collapse(row_sizes, operands)
    n_cols, n_rows = logits.size(1), logits.numel() // logits.size(1) if logits.size(1) else 0
    col_strides = [s.stride(1) for s in streams]
    contiguous_cols = all(stride == 1 for stride in col_strides)
    neighbours = shape[-1] > 1 and strides[0][-1] < col_strides[0]
    itemsize = max(s.element_size() for s in streams)
    by_rows = n_cols > launch.SHORT_ROW and (contiguous_cols or not neighbours)
    processors = multiprocessors(logits.device)
    if by_rows:
        vec, ragged = _alignment(streams, strides, n_cols) if contiguous_cols else (1, False)
        tile = None
        if twice and not heavy and vec > 1:
            tile = launch.long_row_tile(n_cols, itemsize, ragged=ragged, device=logits.device)
        tile = tile or launch.row_tile(n_cols, itemsize, heavy=heavy, twice=twice, device=logits.device)
        n_splits = launch.splits(n_rows, -(-n_cols // tile.block), processors)
        split_cols = _share(n_cols, n_splits, tile.block)
        n_splits = -(-n_cols // split_cols)
        return Plan(
            shape,
            strides,
            n_rows,
            n_cols,
            True,
            tile.block,
            1,
            tile.num_warps,
            n_rows,
            n_splits,
            split_cols,
            1,
            vec,
            ragged,
        )
    vec, chunks = 1, 1
    if whole and contiguous_cols and not neighbours and n_cols <= launch.WHOLE_ROW:
        vec = _vector(streams, strides, n_cols)
        tile, chunks = launch.whole_rows_tile(n_cols, itemsize, vec)
    else:
        tile = launch.rows_tile(n_cols, shape[-1], not neighbours, itemsize, heavy=heavy)
    programs = n_rows // shape[-1] * -(-shape[-1] // tile.rows) if n_rows else 0
    n_splits = launch.splits(programs, -(-n_cols // tile.cols) // 8, processors)
    split_cols = _share(n_cols, n_splits, tile.cols)
    n_splits = -(-n_cols // split_cols)
    return Plan(
        shape,
        strides,
        n_rows,
        n_cols,
        False,
        tile.cols,
        tile.rows,
        tile.num_warps,
        programs,
        n_splits,
        split_cols,
        chunks,
        vec,
        False,
    )


def row_strides(tensor: Tensor) -> tuple[int, ...]:
    return (tensor.stride(0), *tensor.stride()[2:])


def _share(n_cols: int, n_splits: int, block: int) -> int:
    return max(1, -(-n_cols // (n_splits * block))) * block


def _alignment(streams: list[Tensor], strides: list[tuple[int, ...]], n_cols: int) -> tuple[int, bool]:
    """Elements in 16 bytes of the narrowest stream, or 1 where rows are not aligned alike; and whether rows are ragged."""
    vec = 16 // min(s.element_size() for s in streams)
    if any(s.data_ptr() % 16 for s in streams):
        return 1, False
    row_strides = strides[: len(streams)]
    if n_cols % vec == 0 and all(stride % vec == 0 for s in row_strides for stride in s):
        return vec, False
    alike = all((a - b) % vec == 0 for s in row_strides[1:] for a, b in zip(s, row_strides[0], strict=True))
    return (vec, True) if alike else (1, False)


def _vector(streams: list[Tensor], strides: list[tuple[int, ...]], n_cols: int) -> int:
    """Most elements, in up to 16 bytes of the widest stream, of which all rows are whole multiples and begin at one."""
    vec = 16 // max(s.element_size() for s in streams)
    if any(s.data_ptr() % 16 for s in streams):
        return 1
    while any(size % vec for size in (n_cols, *(stride for s in strides[: len(streams)] for stride in s))):
        vec //= 2
    return vec


def gradient_like(tensor: Tensor) -> Tensor:
    """Uninitialised gradient of ``tensor``; a view with small gaps keeps them, so that its rows are aligned like its own."""
    reach = extent(tensor)
    if reach is not None and tensor.numel() < reach <= 1.5 * tensor.numel():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return torch.empty_like(tensor)


def extent(tensor: Tensor) -> int | None:
    """Elements of memory from the first to the last, gaps included; None where elements share memory."""
    reach = 1
    for stride, size in sorted(
        (stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1
    ):
        if stride < reach:
            return None
        reach += (size - 1) * stride
    return reach


def incoming(grad: Tensor | None) -> tuple[Tensor | None, int]:
    """An upstream gradient and its stride by row: 0 where one value serves all rows, as after ``.sum()``."""
    if grad is None:
        return None, 0
    if all(stride == 0 for size, stride in zip(grad.shape, grad.stride(), strict=True) if size > 1):
        return grad, 0
    return grad.contiguous(), 1
