"""Addressing rows of any layout, and walking a row in aligned tiles."""

import triton
import triton.language as tl


@triton.jit
def row_offset(row, shape, strides):
    """Offset in elements of a row whose index counts over the dimensions of ``shape``; int64."""
    offset = tl.full((), 0, tl.int64)
    rest = row
    for dim in tl.static_range(len(shape) - 1, 0, -1):
        offset += (rest % shape[dim]) * strides[dim]
        rest = rest // shape[dim]
    return offset + rest * strides[0]


@triton.jit
def first_aligned(offset, head, VEC: tl.constexpr, RAGGED: tl.constexpr):
    """Offset of a row's first aligned element, known to the compiler as a multiple of VEC."""
    if RAGGED:
        first = tl.multiple_of(offset + head, VEC)
    else:
        # Itself. A hint would be lost here, on a function's argument; arithmetic is not.
        first = offset // VEC * VEC
    return first


@triton.jit
def aligned_row(offset, n_cols, VEC: tl.constexpr, RAGGED: tl.constexpr):
    """Elements before the row's first aligned one, that one's offset, and how many follow in whole vectors.

    A row whose length is no multiple of the vector starts anywhere; from its first aligned element on, loads are 16 bytes.
    """
    if RAGGED:
        head = tl.minimum((VEC - offset % VEC) % VEC, n_cols).to(tl.int32)
    else:
        head = tl.full((), 0, tl.int32)
    return head, first_aligned(offset, head, VEC, RAGGED), (n_cols - head) // VEC * VEC


@triton.jit
def edge_columns(lane, head, body):
    """Columns, counted from the first aligned one, of the elements before it and after the last whole vector."""
    return tl.where(lane < head, lane - head, body + lane - head)
