"""What a family of elementwise losses supplies under its name, and how the eager path walks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import broadcast_shape, full_size, memory_order, row_blocks
from .reduction import Reduction

# Elements of a block for each thread: a second-level cache in fp64, and long enough to hide the cost of calling
# operators.
BLOCK_ELEMENTS = 2**17

Scalars = tuple[float, float, float]


class Formulas(NamedTuple):
    """What a family supplies; each function takes four operands (None where absent), then the scalars and the flags.

    ``kernels`` imports and returns the device functions of value and gradient. ``reference`` is differentiable to any
    order. ``value``, ``total`` (the sum of the values, as a tensor or number) and ``gradient`` are the eager path's, on
    blocks, and take buffers to work in. ``gradient`` also takes the upstream gradient, a number or a tensor, and for each
    operand a tensor in the dtype of arithmetic to write to, or None.

    ``both`` returns the total and writes the gradient; left out, the two follow each other, with what the one saves.

    ``saves`` says by the flags how many fp32 tensors of the operands' size ``total`` can fill that ``gradient`` would
    otherwise compute again. Both take them last, as a sequence that is empty where nothing is saved.
    """

    kernels: Callable[[], tuple[Any, Any]]
    reference: Callable[..., Tensor]
    value: Callable[..., Tensor]
    total: Callable[..., Tensor | float]
    gradient: Callable[..., None]
    saves: Callable[[int], int] = lambda flags: 0
    both: Callable[..., Tensor | float] | None = None


_formulas: dict[str, Formulas] = {}


def formulas_of(name: str) -> Formulas:
    return _formulas[name]


def register_formulas(name: str, formulas: Formulas) -> None:
    _formulas[name] = formulas


def by_slopes(
    kernels: Callable[[], tuple[Any, Any]], reference: Callable[..., Tensor], slopes: Callable[..., Sequence[Tensor | None]]
) -> Formulas:
    """Formulas of a loss whose eager path is its reference, and ``slopes``, its derivatives in each operand, in blocks."""

    def value(*arguments: Any) -> Tensor:
        return reference(*arguments[:-1])

    def total(*arguments: Any) -> Tensor:
        return value(*arguments[:-1]).sum()

    def gradient(*arguments: Any) -> None:
        *formula, _, grad, outputs, _ = arguments
        for output, slope in zip(outputs, slopes(*formula), strict=True):
            if output is not None and slope is not None:
                torch.mul(slope, grad, out=output)

    return Formulas(kernels, reference, value, total, gradient)


def blocks(tensors: Sequence[Tensor | None], shape: torch.Size, *, by_sample: bool) -> Iterator[Sequence[Tensor | None]]:
    """Blocks of the tensors expanded to ``shape``, in the order in which the first full-size one lies in memory."""
    elements = BLOCK_ELEMENTS * torch.get_num_threads()
    if shape.numel() <= elements and not by_sample:
        yield [t if t is None or t.shape == shape else t.expand(shape) for t in tensors]
        return
    full = full_size(tensors, shape)
    order = tuple(range(len(shape))) if full is None or by_sample else memory_order(full)
    views = [None if t is None else t.expand(shape).permute(order) for t in tensors]
    dims: Sequence[int] = [shape[d] for d in order]
    if not by_sample and all(v is None or v.is_contiguous() or not any(v.stride()) for v in views):
        count = shape.numel()
        views = [None if v is None else v.as_strided((count,), (1 if any(v.stride()) else 0,)) for v in views]
        dims = [count]
    for index in row_blocks(dims, elements):
        yield [None if v is None else v[index] for v in views]


def reduced(
    loss: str, tensors: Sequence[Tensor | None], mask: Tensor | None, scalars: Scalars, flags: int, reduction: Reduction
) -> Tensor:
    """The reference, masked and reduced: differentiable to any order."""
    shape = broadcast_shape(tensors)
    if mask is not None:
        # Zeros in place of masked elements, whose NaN would otherwise reach the gradient.
        tensors = [None if t is None else torch.where(mask, t, torch.zeros_like(t)) for t in tensors]
    value = formulas_of(loss).reference(*tensors, scalars, flags)
    if value.shape != shape:
        value = value.expand(shape)
    if mask is not None:
        value = torch.where(mask, value, 0.0)
    if reduction == Reduction.NONE:
        return value
    if reduction == Reduction.SAMPLE:
        return value.flatten(1).sum(1) if value.dim() > 1 else value
    if reduction == Reduction.MEAN and mask is not None:
        return value.sum() / mask.expand(shape).sum()
    if reduction == Reduction.MEAN:
        return value.mean()
    total = value.sum()
    # No float, to which an exported program's symbolic size would be bound.
    return total if reduction == Reduction.SUM else total / shape[0]
