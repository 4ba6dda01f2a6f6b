"""Walking tensors of any strides without copying them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def collapse(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Merge neighbouring dimensions that every operand walks as one; at least one dimension remains."""
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(m[-1] == s[dim] * size for m, s in zip(merged, strides, strict=True)):
            sizes[-1] *= size
            for m, s in zip(merged, strides, strict=True):
                m[-1] = s[dim]
        else:
            sizes.append(size)
            for m, s in zip(merged, strides, strict=True):
                m.append(s[dim])
    if not sizes:
        return (1,), [(0,) for _ in strides]
    return tuple(sizes), [tuple(m) for m in merged]


def broadcast_shape(tensors: Sequence[torch.Tensor | None]) -> torch.Size:
    """The shape to which the tensors broadcast; ``torch.broadcast_shapes`` costs more than a small loss."""
    shapes = [t.shape for t in tensors if t is not None]
    return shapes[0] if all(shape == shapes[0] for shape in shapes) else torch.broadcast_shapes(*shapes)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def empty_in_order(shape: Sequence[int], order: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised tensor whose dimensions lie in memory in ``order``, the slowest first; no view, which a Function's
    result must not be if it is to be changed in place."""
    strides = [0] * len(order)
    for dim, stride in zip(order, contiguous_strides([max(1, shape[d]) for d in order]), strict=True):
        strides[dim] = stride
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def full_size(tensors: Sequence[torch.Tensor | None], shape: torch.Size) -> torch.Tensor | None:
    """The first of the tensors that nothing has to expand to ``shape``, whose memory order all then follow."""
    return next((t for t in tensors if t is not None and t.shape == shape), None)


def empty_like_first(
    tensors: Sequence[torch.Tensor | None], shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Uninitialised tensor that lies in memory as the first of the tensors that has its ``shape``."""
    full = full_size(tensors, shape)
    if full is None or full.is_contiguous():
        return torch.empty(shape, dtype=dtype, device=device)
    return empty_in_order(shape, memory_order(full), dtype, device)


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Dimensions of ``tensor`` from the slowest to the fastest in memory; broadcast dimensions keep their place."""
    order = list(range(tensor.dim()))
    if all(tensor.stride(d) for d in order if tensor.size(d) > 1):
        order.sort(key=lambda d: -tensor.stride(d) if tensor.size(d) > 1 else 0)
    return tuple(order)


def row_blocks(shape: Sequence[int], elements: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut the leading dimensions of ``shape`` into blocks of at most about ``elements`` elements."""
    inner = 1
    for size in shape[1:]:
        inner *= size
    if len(shape) <= 2 or inner <= elements:
        step = max(1, elements // max(1, inner))
        for start in range(0, shape[0], step):
            yield (slice(start, start + step),)
        return
    for index in range(shape[0]):
        for rest in row_blocks(shape[1:], elements):
            yield (index, *rest)
