"""The operators and the autograd.Function of every elementwise loss; a family registers its formulas under a name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, elementwise, made
from .elementwise import Operands
from .formulas import Formulas, Scalars, blocks, formulas_of, reduced
from .layout import broadcast_shape, empty_like_first
from .library import register, unwatched
from .reduction import Reduction
from .scratch import Scratch


def eager_forward(
    formulas: Formulas, operands: Operands, scalars: Scalars, flags: int, reduction: Reduction, dtype: torch.dtype,
    saved: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape, device = operands.shape, operands.tensors[0].device  # pyright: ignore[reportOptionalMemberAccess]
    acc = elementwise.arithmetic(operands.tensors)
    count = operands.mask is not None and reduction == Reduction.MEAN
    nothing = torch.empty(0, dtype=acc, device=device)
    kept = torch.zeros((), dtype=acc, device=device) if count else nothing
    scratch = Scratch()
    if reduction == Reduction.NONE:
        out = empty_like_first([*operands.tensors, operands.mask], shape, dtype, device)
        for *tensors, mask, target in blocks([*operands.tensors, operands.mask, out], shape, by_sample=False):
            assert target is not None
            target.copy_(_masked(formulas.value(*tensors, scalars, flags, scratch), mask))
        return out, nothing
    if reduction == Reduction.SAMPLE:
        sums = torch.zeros(shape[0], dtype=acc, device=device)
        # The sums are expanded like the elements, so that a block of them shows where its sum belongs.
        place = sums.view(-1, *[1] * (len(shape) - 1))
        if not shape.numel():
            return sums.to(dtype), nothing
        for *tensors, mask, target in blocks([*operands.tensors, operands.mask, place], shape, by_sample=True):
            assert target is not None
            _add_sums(target, _masked(formulas.value(*tensors, scalars, flags, scratch), mask))
        return sums.to(dtype), nothing
    total = 0.0
    for a, b, c, d, mask, *keep in blocks([*operands.tensors, operands.mask, *saved], shape, by_sample=False):
        tensors = (a, b, c, d)
        if mask is None:
            total = total + formulas.total(*tensors, scalars, flags, scratch, keep)
        else:
            total = total + _masked(formulas.value(*tensors, scalars, flags, scratch), mask).sum()
    if operands.mask is not None and count:
        kept.copy_(operands.mask.expand(shape).sum())
    if isinstance(total, float) and not count:
        divisor = elementwise.divisor_of(reduction, shape)
        return torch.tensor(total / divisor if divisor else math.nan, dtype=dtype, device=device), nothing
    total = torch.as_tensor(total, dtype=torch.float64, device=device)
    return (total / (kept if count else elementwise.divisor_of(reduction, shape))).to(dtype), kept


def _masked(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else torch.where(mask, value, 0.0)


def _add_sums(sums: Tensor, value: Tensor) -> None:
    """Add ``value`` into ``sums``, a view that is expanded over all but the sample dimension, if that is left."""
    if sums.dim() == 0 or not sums.stride(0):
        sums[(0,) * sums.dim()].add_(value.sum())
    else:
        sums[(slice(None), *[0] * (sums.dim() - 1))].add_(value.flatten(1).sum(1) if value.dim() > 1 else value)


def eager_backward(
    formulas: Formulas, operands: Operands, grad: Tensor, kept: Tensor, scalars: Scalars, flags: int,
    reduction: Reduction, needed: Sequence[bool], saved: Sequence[Tensor] = (),
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
    scratch = Scratch()
    # The operands come first, so that the blocks follow their memory order.
    every = [*operands.tensors, operands.mask, grad if upstream is None else None, *wide, *saved]
    for a, b, c, d, mask, part, *rest in blocks(every, shape, by_sample=False):
        outputs, kept_back = rest[:4], rest[4:]
        targets = [
            None if o is None else o if o.dtype == acc else scratch.take(f"gradient {k}", o.shape, acc, o.device)
            for k, o in enumerate(outputs)
        ]
        upstream_part = part if upstream is None else upstream
        formulas.gradient(a, b, c, d, scalars, flags, scratch, upstream_part, targets, kept_back)
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
    formulas = formulas_of(loss)
    operands = Operands((a, b, c, d), mask, broadcast_shape((a, b, c, d)))
    if triton:
        value, _ = formulas.kernels()
        return elementwise.forward(value, operands, (s0, s1, s2), flags, Reduction(reduction), dtype)
    return eager_forward(formulas, operands, (s0, s1, s2), flags, Reduction(reduction), dtype)


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
        return empty_like_first([*tensors, mask], shape, dtype, a.device), kept
    return a.new_empty(shape[:1] if reduction == Reduction.SAMPLE else (), dtype=dtype), kept


def _backward(
    loss: str, a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, mask: Tensor | None,
    grad: Tensor, kept: Tensor, s0: float, s1: float, s2: float, flags: int, reduction: int, needed: list[bool],
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    formulas = formulas_of(loss)
    operands = Operands((a, b, c, d), mask, broadcast_shape((a, b, c, d)))
    scalars = (s0, s1, s2)
    if triton:
        _, gradient = formulas.kernels()
        grads = elementwise.backward(gradient, operands, grad, kept, scalars, flags, Reduction(reduction), needed)
    else:
        grads = eager_backward(formulas, operands, grad, kept, scalars, flags, Reduction(reduction), needed)
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
        s0: float, s1: float, s2: float, flags: int, reduction: int, dtype: torch.dtype, triton: bool, saves: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if not saves:
            return elementwise_forward(loss, a, b, c, d, mask, s0, s1, s2, flags, reduction, dtype, triton)
        operands = Operands((a, b, c, d), None, broadcast_shape((a, b, c, d)))
        saved = [torch.empty_like(a, dtype=torch.float32) for _ in range(saves)]
        scalars = s0, s1, s2
        return *eager_forward(formulas_of(loss), operands, scalars, flags, Reduction(reduction), dtype, saved), *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        loss, a, b, c, d, mask, s0, s1, s2, flags, reduction, _, triton, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, c, d, mask, *output[1:])
        ctx.loss, ctx.scalars, ctx.flags, ctx.reduction, ctx.triton = loss, (s0, s1, s2), flags, reduction, triton

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        a, b, c, d, mask, kept, *saved = ctx.saved_tensors
        tensors = (a, b, c, d)
        if grad is None:
            return (None,) * 14
        needed = [ctx.needs_input_grad[i] for i in range(1, 5)]
        if torch.is_grad_enabled():
            tensors = autograd.apart(tensors)
            value = reduced(ctx.loss, tensors, mask, ctx.scalars, ctx.flags, Reduction(ctx.reduction))
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            found = iter(torch.autograd.grad(value, wanted, grad.to(value.dtype), create_graph=True))
            result = [next(found) if need else None for need in needed]
        elif saved:
            operands = Operands(tensors, None, a.shape)
            result = eager_backward(
                formulas_of(ctx.loss), operands, grad, kept, ctx.scalars, ctx.flags, Reduction(ctx.reduction), needed, saved
            )
        else:
            every = elementwise_backward(
                ctx.loss, *tensors, mask, grad, kept, *ctx.scalars, ctx.flags, ctx.reduction, needed, ctx.triton
            )
            result = [g if need else None for g, need in zip(every, needed, strict=True)]
        return None, *result, *(None,) * 9


def savable(loss: str, tensors: Sequence[Tensor | None], flags: int, reduction: Reduction) -> int:
    """How many tensors the eager forward keeps for the backward: none where the operands broadcast, or nothing is summed."""
    first = tensors[0]
    if first is None or reduction not in (Reduction.MEAN, Reduction.SUM, Reduction.BATCHMEAN):
        return 0
    count = formulas_of(loss).saves(flags)
    if not count or not torch.is_grad_enabled() or not unwatched(tensors):
        return 0
    given = [t for t in tensors if t is not None]
    fits = first.device.type == "cpu" and elementwise.arithmetic(given) == torch.float32
    alike = all(t.shape == first.shape for t in given) and any(t.requires_grad for t in given)
    return count if fits and alike else 0


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
    if not triton and mask is None and made.fits(tensors, reduction):
        return made.apply((made.Part(loss, scalars, flags, reduction),), dtype, tensors)[0]
    saves = 0 if triton or mask is not None else savable(loss, tensors, flags, reduction)
    result, *_ = autograd.apply(Elementwise, loss, *tensors, mask, *scalars, flags, int(reduction), dtype, triton, saves)
    return result
