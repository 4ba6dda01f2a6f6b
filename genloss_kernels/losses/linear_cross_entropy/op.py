"""Linear cross entropy's operators and the autograd.Functions that call them: gradients in forward, or recomputed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.library import register
from ...core.reduction import Reduction, accumulator
from ...core.scaling import scale_
from ..cross_entropy import reference
from ..cross_entropy.reference import Options
from . import chunks
from .chunks import Gradients, Head
from .flops import register_formulas

Needed = tuple[bool, bool, bool, bool]


def mask_of(needed: Needed) -> int:
    """Which of input, linear weight, linear bias and target need a gradient, as bits."""
    return sum(need << place for place, need in enumerate(needed))


def _needed(mask: int) -> Needed:
    first, second, third, fourth = (bool(mask >> place & 1) for place in range(4))
    return first, second, third, fourth


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _tensors(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth = (_nothing(like) if g is None else g for g in gradients)
    return first, second, third, fourth


def _options(arguments: tuple[Any, ...], reduction: int, stats: bool = False) -> Options:
    return Options(*arguments, reduction=Reduction(reduction), stats=stats)


def _reduced_forward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    row_weight: Tensor | None, divisor: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    fixed_divisor: float | None, reduction: int, most: int, needed: int, dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    head = Head(input, linear_weight, linear_bias, target, weight, row_weight, divisor)
    arguments = (ignore_index, label_smoothing, softcap, logit_scale, z_loss, fixed_divisor)
    options = _options(arguments, reduction)
    loss, by, gradients = chunks.forward_with_gradients(head, options, most, _needed(needed), triton=triton)
    return reference.reduce(loss, loss, by, options).to(dtype), *_tensors(gradients, input)


def _gradients_fake(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, needed: int
) -> tuple[Tensor, ...]:
    given = (input, linear_weight, linear_bias, target)
    return tuple(
        torch.empty_like(t) if need and t is not None else _nothing(input)
        for t, need in zip(given, _needed(needed), strict=True)
    )


def _reduced_forward_fake(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    needed, dtype, _ = rest[-3:]
    return input.new_empty((), dtype=dtype), *_gradients_fake(input, linear_weight, linear_bias, target, needed)


def _rows_forward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    stats: bool, most: int, triton: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    head = Head(input, linear_weight, linear_bias, target, weight, row_weight, None)
    options = _options((ignore_index, label_smoothing, softcap, logit_scale, z_loss), Reduction.NONE, stats)
    return tuple(chunks.forward(head, options, most, triton=triton))


def _rows_forward_fake(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    stats: bool, most: int, triton: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from ..cross_entropy.op import saved_rows

    n_rows, acc = input.size(0), accumulator(input.dtype)
    rows = [input.new_empty(n_rows, dtype=acc)]
    rows += [input.new_empty(n_rows if stats else 0, dtype=acc) for _ in range(3)]
    counts = [input.new_empty(() if stats else (0,), dtype=torch.int64) for _ in range(2)]
    planes = saved_rows(linear_weight.size(0), target, weight, Options(label_smoothing=label_smoothing, stats=stats))
    saved = input.new_empty((planes, n_rows) if triton else (0,), dtype=acc)
    return (*rows, *counts, saved)


def _rows_backward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    row_weight: Tensor | None, saved: Tensor, entropy: Tensor,
    grad_loss: Tensor | None, grad_lse: Tensor | None, grad_log_prob: Tensor | None, grad_entropy: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    stats: bool, most: int, needed: int, triton: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    head = Head(input, linear_weight, linear_bias, target, weight, row_weight, None)
    options = _options((ignore_index, label_smoothing, softcap, logit_scale, z_loss), Reduction.NONE, stats)
    grads = (grad_loss, grad_lse, grad_log_prob, grad_entropy)
    return _tensors(chunks.backward(head, options, most, _needed(needed), saved, entropy, grads, triton=triton), input)


def _rows_backward_fake(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _gradients_fake(input, linear_weight, linear_bias, target, rest[-2])


_HEAD = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? row_weight"
_FORMULA = "int ignore_index, float label_smoothing, float? softcap, float logit_scale, float z_loss"
_FOUR = "Tensor, Tensor, Tensor, Tensor"

linear_cross_entropy_reduced = register(
    f"linear_cross_entropy_reduced({_HEAD}, Tensor? divisor, {_FORMULA}, float? fixed_divisor, int reduction, int most,"
    f" int needed, ScalarType dtype, bool triton) -> (Tensor, {_FOUR})",
    _reduced_forward,
    _reduced_forward_fake,
)
linear_cross_entropy_rows = register(
    f"linear_cross_entropy_rows({_HEAD}, {_FORMULA}, bool stats, int most, bool triton)"
    f" -> ({_FOUR}, Tensor, Tensor, Tensor)",
    _rows_forward,
    _rows_forward_fake,
)
linear_cross_entropy_rows_backward = register(
    f"linear_cross_entropy_rows_backward({_HEAD}, Tensor saved, Tensor entropy, Tensor? grad_loss, Tensor? grad_lse,"
    f" Tensor? grad_log_prob, Tensor? grad_entropy, {_FORMULA}, bool stats, int most, int needed, bool triton)"
    f" -> ({_FOUR})",
    _rows_backward,
    _rows_backward_fake,
)
register_formulas()


def by_reference(head: Head, options: Options) -> tuple[Tensor, reference.Rows]:
    """The loss and its rows from logits that exist, differentiable to any order."""
    ignored = head.ignored(options)
    input = head.input if ignored is None else head.input.masked_fill(ignored.unsqueeze(1), 0.0)
    logits = F.linear(input, head.linear_weight, head.linear_bias)
    return reference.cross_entropy(logits, head.target, head.weight, head.row_weight, head.divisor, options)


def _differentiable_gradients(
    head: Head, options: Options, grads: tuple[Tensor | None, ...], needed: Needed
) -> list[Tensor | None]:
    loss, rows = by_reference(head, options)
    pairs = [(o, g.to(o.dtype)) for o, g in zip((loss, *rows[2:5]), grads, strict=False) if g is not None]
    given = (head.input, head.linear_weight, head.linear_bias, head.target)
    wanted = [t for t, need in zip(given, needed, strict=True) if need and t is not None]
    found = iter(
        torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return [next(found) if need and t is not None else None for t, need in zip(given, needed, strict=True)]


def _kept(gradients: tuple[Tensor, ...], needed: Needed) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needed, strict=True)]


class ReducedLinearCrossEntropy(torch.autograd.Function):
    """Mean or sum, with the gradients made in the forward; also returns these.

    The first backward scales them in place and hands them over; a second one makes them again.
    """

    @staticmethod
    def forward(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
        row_weight: Tensor | None, divisor: Tensor | None,
        ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
        fixed_divisor: float | None, reduction: int, most: int, needed: int, dtype: torch.dtype, triton: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return linear_cross_entropy_reduced(
            input, linear_weight, linear_bias, target, weight, row_weight, divisor, ignore_index, label_smoothing, softcap,
            logit_scale, z_loss, fixed_divisor, reduction, most, needed, dtype, triton,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.scalars, ctx.needed = inputs[7:], inputs[-3]
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*inputs[:7], *output[1:])
            ctx.made = None
        else:
            ctx.save_for_backward(*inputs[:7])
            ctx.made = output[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, nothing = grads[0], (None,) * (3 + len(ctx.scalars))
        if grad is None:
            return (None,) * 4 + nothing
        saved = ctx.saved_tensors
        tensors, stored = saved[:7], saved[7:]
        needed = _needed(ctx.needed)
        if torch.is_grad_enabled():
            options = _options(ctx.scalars[:6], ctx.scalars[6])
            return (*_differentiable_gradients(Head(*tensors), options, (grad,), needed), *nothing)
        if stored:
            return (*_kept(tuple(g * grad for g in stored), needed), *nothing)
        made, ctx.made = ctx.made, None
        if made is None:
            _, *made = _reduced_forward(*tensors, *ctx.scalars)
        scale_(made, grad, triton=ctx.scalars[-1])
        return (*_kept(tuple(made), needed), *nothing)


class LinearCrossEntropyRows(torch.autograd.Function):
    """Loss and statistics of each row, their logits computed again in backward; then what only the backward needs."""

    @staticmethod
    def forward(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
        row_weight: Tensor | None,
        ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
        stats: bool, most: int, triton: bool, needed: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return linear_cross_entropy_rows(
            input, linear_weight, linear_bias, target, weight, row_weight, ignore_index, label_smoothing, softcap,
            logit_scale, z_loss, stats, most, triton,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[4:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], output[6], output[3])
        ctx.scalars, ctx.needed = inputs[6:-1], inputs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, saved, entropy = ctx.saved_tensors
        *formula, stats, most, triton = ctx.scalars
        nothing = (None,) * (3 + len(ctx.scalars))
        upstream = grads[:4] if stats else (grads[0], None, None, None)
        if all(g is None for g in upstream):
            return (None,) * 4 + nothing
        if torch.is_grad_enabled():
            options = _options(tuple(formula), Reduction.NONE, stats)
            return (
                *_differentiable_gradients(Head._make((*tensors, None)), options, upstream, _needed(ctx.needed)),
                *nothing,
            )
        gradients = linear_cross_entropy_rows_backward(
            *tensors, saved, entropy, *upstream, *formula, stats, most, ctx.needed, triton
        )
        return (*_kept(gradients, _needed(ctx.needed)), *nothing)
