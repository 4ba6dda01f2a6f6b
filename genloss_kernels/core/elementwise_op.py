"""The operators and the autograd.Function of every elementwise loss; a family registers its formulas under a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, elementwise
from .elementwise import Operands
from .layout import broadcast_shape, memory_order, row_blocks
from .library import register
from .reduction import Reduction

# Elements of a block for each thread: PyTorch gives a thread no less, and with a few temporaries in fp64 it stays in a
# core's second-level cache.
BLOCK_ELEMENTS = 2**15

Scalars = tuple[float, float, float]


class Formulas(NamedTuple):
    """What a family supplies; each function takes four operands (None where absent), then the scalars and the flags.

    ``kernels`` imports and returns the device functions of value and gradient. ``reference`` is differentiable to any
    order. ``value``, ``total`` (the sum of the values, as a tensor or number) and ``gradient`` are the eager path's, on
    blocks. ``gradient`` also takes the upstream gradient, a number or a tensor, and for each operand a tensor in the dtype
    of arithmetic to write to, or None.
    """

    kernels: Callable[[], tuple[Any, Any]]
    reference: Callable[..., Tensor]
    value: Callable[..., Tensor]
    total: Callable[..., Tensor | float]
    gradient: Callable[..., None]


_formulas: dict[str, Formulas] = {}


def register_formulas(name: str, formulas: Formulas) -> None:
    _formulas[name] = formulas


def by_reference(kernels: Callable[[], tuple[Any, Any]], reference: Callable[..., Tensor]) -> Formulas:
    """Formulas of a loss whose eager path is its reference, differentiated by autograd block by block."""

    def total(*arguments: Any) -> Tensor:
        return reference(*arguments).sum()

    def gradient(*arguments: Any) -> None:
        *tensors, scalars, flags, grad, outputs = arguments
        # Outputs have the broadcast shape; so must the leaves, or autograd would sum what is summed again later.
        leaves = [
            t if t is None or o is None else t.detach().expand(o.shape).requires_grad_()
            for t, o in zip(tensors, outputs, strict=True)
        ]
        with torch.enable_grad():
            value = reference(*leaves, scalars, flags)
        pairs = [(leaf, o) for leaf, o in zip(leaves, outputs, strict=True) if o is not None]
        grads = torch.autograd.grad(value, [leaf for leaf, _ in pairs], torch.as_tensor(grad).to(value).expand_as(value))
        for (_, output), found in zip(pairs, grads, strict=True):
            output.copy_(found)

    return Formulas(kernels, reference, reference, total, gradient)


def _blocks(tensors: Sequence[Tensor | None], shape: torch.Size, *, by_sample: bool) -> Iterator[Sequence[Tensor | None]]:
    """Matching blocks of broadcast tensors, in the order in which the first full-size one lies in memory."""
    elements = BLOCK_ELEMENTS * torch.get_num_threads()
    if shape.numel() <= elements and not by_sample:
        yield tensors
        return
    full = next((t for t in tensors if t is not None and t.shape == shape), None)
    order = tuple(range(len(shape))) if full is None or by_sample else memory_order(full)
    views = [None if t is None else t.expand(shape).permute(order) for t in tensors]
    dims: Sequence[int] = [shape[d] for d in order]
    if not by_sample and all(v is None or v.is_contiguous() or not any(v.stride()) for v in views):
        count = shape.numel()
        views = [None if v is None else v.as_strided((count,), (1 if any(v.stride()) else 0,)) for v in views]
        dims = [count]
    for index in row_blocks(dims, elements):
        yield [None if v is None else v[index] for v in views]


def _eager_forward(
    formulas: Formulas, operands: Operands, scalars: Scalars, flags: int, reduction: Reduction, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape, device = operands.shape, operands.tensors[0].device  # pyright: ignore[reportOptionalMemberAccess]
    acc = elementwise.arithmetic(operands.tensors)
    count = operands.mask is not None and reduction == Reduction.MEAN
    kept = torch.zeros((), dtype=acc, device=device) if count else torch.empty(0, dtype=acc, device=device)
    nothing = torch.empty(0, dtype=acc, device=device)
    if reduction == Reduction.NONE:
        out = torch.empty(shape, dtype=dtype, device=device)
        for *tensors, mask, target in _blocks([*operands.tensors, operands.mask, out], shape, by_sample=False):
            target.copy_(_masked(formulas.value(*tensors, scalars, flags), mask))
        return out, nothing
    if reduction == Reduction.SAMPLE:
        sums = torch.zeros(shape[0], dtype=acc, device=device)
        # The sums are expanded like the elements, so that a block of them shows where its sum belongs.
        place = sums.view(-1, *[1] * (len(shape) - 1))
        if not shape.numel():
            return sums.to(dtype), nothing
        for *tensors, mask, target in _blocks([*operands.tensors, operands.mask, place], shape, by_sample=True):
            _add_sums(target, _masked(formulas.value(*tensors, scalars, flags), mask))
        return sums.to(dtype), nothing
    total = 0.0
    for *tensors, mask in _blocks([*operands.tensors, operands.mask], shape, by_sample=False):
        if mask is None:
            total = total + formulas.total(*tensors, scalars, flags)
        else:
            total = total + _masked(formulas.value(*tensors, scalars, flags), mask).sum()
    if count:
        kept.copy_(operands.mask.expand(shape).sum())
    result = torch.as_tensor(total, dtype=torch.float64, device=device) / (
        kept if count else elementwise.divisor_of(reduction, shape)
    )
    return result.to(dtype), kept


def _masked(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else torch.where(mask, value, 0.0)


def _add_sums(sums: Tensor, value: Tensor) -> None:
    """Add ``value`` into ``sums``, a view that is expanded over all but the sample dimension, if that is left."""
    if sums.dim() == 0 or not sums.stride(0):
        sums[(0,) * sums.dim()].add_(value.sum())
    else:
        sums[(slice(None), *[0] * (sums.dim() - 1))].add_(value.flatten(1).sum(1) if value.dim() > 1 else value)


def _eager_backward(
    formulas: Formulas, operands: Operands, grad: Tensor, kept: Tensor, scalars: Scalars, flags: int,
    reduction: Reduction, needed: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    shape = operands.shape
    acc = elementwise.arithmetic(operands.tensors)
    grad = grad.to(acc) / (kept if kept.dim() == 0 else elementwise.divisor_of(reduction, shape))
    upstream: Tensor | float | None = None
    if reduction == Reduction.SAMPLE:
        grad = grad.view(-1, *[1] * (len(shape) - 1))
    elif grad.numel() == 1:
        upstream = grad.item() if grad.device.type == "cpu" else grad
    wide = [
        None
        if t is None or not need
        else torch.empty_like(t)
        if t.shape == shape
        else torch.empty(shape, dtype=acc, device=grad.device)
        for t, need in zip(operands.tensors, needed, strict=True)
    ]
    # The operands come first, so that the blocks follow their memory order.
    every = [*operands.tensors, operands.mask, grad if upstream is None else None, *wide]
    for a, b, c, d, mask, part, *outputs in _blocks(every, shape, by_sample=False):
        targets = [None if o is None else o if o.dtype == acc else torch.empty_like(o, dtype=acc) for o in outputs]
        formulas.gradient(a, b, c, d, scalars, flags, part if upstream is None else upstream, targets)
        for output, target in zip(outputs, targets, strict=True):
            if output is None or target is None:
                continue
            if mask is not None:
                target.masked_fill_(~mask, 0.0)
            if output is not target:
                output.copy_(target)
    return [
        w if w is None or t is None or t.shape == shape else w.sum_to_size(t.shape).to(t.dtype)
        for w, t in zip(wide, operands.tensors, strict=True)
    ]


def _forward(
    loss: str, a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, mask: Tensor | None,
    s0: float, s1: float, s2: float, flags: int, reduction: int, dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    formulas = _formulas[loss]
    operands = Operands((a, b, c, d), mask, broadcast_shape((a, b, c, d)))
    if triton:
        value, _ = formulas.kernels()
        return elementwise.forward(value, operands, (s0, s1, s2), flags, Reduction(reduction), dtype)
    return _eager_forward(formulas, operands, (s0, s1, s2), flags, Reduction(reduction), dtype)


def _forward_fake(
    loss: str, a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, mask: Tensor | None,
    s0: float, s1: float, s2: float, flags: int, reduction: int, dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tensors = (a, b, c, d)
    shape = broadcast_shape(tensors)
    count = mask is not None and reduction == Reduction.MEAN
    kept = a.new_empty(() if count else (0,), dtype=elementwise.arithmetic(tensors))
    if reduction == Reduction.NONE:
        if triton:
            path = elementwise.walk([*tensors, mask], shape, 1, by_sample=False)
            return elementwise.dense(path, shape, dtype, a.device), kept
        return a.new_empty(shape, dtype=dtype), kept
    return a.new_empty(shape[:1] if reduction == Reduction.SAMPLE else (), dtype=dtype), kept


def _backward(
    loss: str, a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, mask: Tensor | None,
    grad: Tensor, kept: Tensor, s0: float, s1: float, s2: float, flags: int, reduction: int, needed: list[bool],
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    formulas = _formulas[loss]
    operands = Operands((a, b, c, d), mask, broadcast_shape((a, b, c, d)))
    scalars = (s0, s1, s2)
    if triton:
        _, gradient = formulas.kernels()
        grads = elementwise.backward(gradient, operands, grad, kept, scalars, flags, Reduction(reduction), needed)
    else:
        grads = _eager_backward(formulas, operands, grad, kept, scalars, flags, Reduction(reduction), needed)
    first, second, third, fourth = (a.new_empty(0) if g is None else g for g in grads)
    return first, second, third, fourth


def _backward_fake(
    loss: str, a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, mask: Tensor | None,
    grad: Tensor, kept: Tensor, s0: float, s1: float, s2: float, flags: int, reduction: int, needed: list[bool],
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    first, second, third, fourth = (
        a.new_empty(0) if t is None or not need else torch.empty_like(t)
        for t, need in zip((a, b, c, d), needed, strict=True)
    )
    return first, second, third, fourth


_OPERANDS = "str loss, Tensor a, Tensor? b, Tensor? c, Tensor? d, Tensor? mask"
_FORMULA = "float s0, float s1, float s2, int flags, int reduction"

elementwise_forward = register(
    f"elementwise_forward({_OPERANDS}, {_FORMULA}, ScalarType dtype, bool triton) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
elementwise_backward = register(
    f"elementwise_backward({_OPERANDS}, Tensor grad, Tensor kept, {_FORMULA}, bool[] needed, bool triton)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class Elementwise(torch.autograd.Function):
    """An elementwise loss with its hand-written backward; also returns what the mean divided by, if that was counted."""

    @staticmethod
    def forward(
        loss: str, a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, mask: Tensor | None,
        s0: float, s1: float, s2: float, flags: int, reduction: int, dtype: torch.dtype, triton: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return elementwise_forward(loss, a, b, c, d, mask, s0, s1, s2, flags, reduction, dtype, triton)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        loss, a, b, c, d, mask, s0, s1, s2, flags, reduction, _, triton = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, c, d, mask, output[1])
        ctx.loss, ctx.scalars, ctx.flags, ctx.reduction, ctx.triton = loss, (s0, s1, s2), flags, reduction, triton

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        *tensors, mask, kept = ctx.saved_tensors
        if grad is None:
            return (None,) * 13
        needed = [ctx.needs_input_grad[i] for i in range(1, 5)]
        if torch.is_grad_enabled():
            value = reduced(ctx.loss, tensors, mask, ctx.scalars, ctx.flags, Reduction(ctx.reduction))
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            found = iter(torch.autograd.grad(value, wanted, grad.to(value.dtype), create_graph=True))
            result = [next(found) if need else None for need in needed]
        else:
            every = elementwise_backward(
                ctx.loss, *tensors, mask, grad, kept, *ctx.scalars, ctx.flags, ctx.reduction, needed, ctx.triton
            )
            result = [g if need else None for g, need in zip(every, needed, strict=True)]
        return None, *result, *(None,) * 8


def reduced(
    loss: str, tensors: Sequence[Tensor | None], mask: Tensor | None, scalars: Scalars, flags: int, reduction: Reduction
) -> Tensor:
    """The reference, masked and reduced: differentiable to any order."""
    shape = broadcast_shape(tensors)
    if mask is not None:
        # Zeros in place of masked elements, whose NaN would otherwise reach the gradient.
        tensors = [None if t is None else torch.where(mask, t, torch.zeros_like(t)) for t in tensors]
    value = _formulas[loss].reference(*tensors, scalars, flags).expand(shape)
    if mask is not None:
        value = torch.where(mask, value, 0.0)
    if reduction == Reduction.NONE:
        return value
    if reduction == Reduction.SAMPLE:
        return value.flatten(1).sum(1) if value.dim() > 1 else value
    if reduction == Reduction.MEAN and mask is not None:
        return value.sum() / mask.expand(shape).sum()
    return value.sum() / elementwise.divisor_of(reduction, shape)


def apply(
    loss: str,
    tensors: Sequence[Tensor | None],
    mask: Tensor | None,
    scalars: Scalars,
    flags: int,
    reduction: Reduction,
    dtype: torch.dtype,
    *,
    triton: bool,
    by_reference: bool,
) -> Tensor:
    """The loss by its operators, or ``by_reference`` under vmap and forward-mode AD, which cannot see through those."""
    if by_reference:
        return reduced(loss, tensors, mask, scalars, flags, reduction).to(dtype)
    result, _ = autograd.apply(Elementwise, loss, *tensors, mask, *scalars, flags, int(reduction), dtype, triton)
    return result
