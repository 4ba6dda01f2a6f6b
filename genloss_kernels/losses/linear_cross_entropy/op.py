"""Linear cross entropy's operators: gradients in forward, or recomputed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.library import register
from ...core.reduction import Reduction, accumulator
from ..cross_entropy import reference
from ..cross_entropy.reference import Options
from . import chunks
from .chunks import Gradients, Head
from .flops import register_formulas

Needed = tuple[bool, bool, bool, bool]


def mask_of(needed: Needed) -> int:
    """Which of input, linear weight, linear bias and target need a gradient, as bits."""
    return sum(need << place for place, need in enumerate(needed))


def needed_of(mask: int) -> Needed:
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
    fixed_divisor: float | None, reduction: int, most: int, sum_dtype: torch.dtype, needed: int, dtype: torch.dtype,
    triton: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    head = Head(input, linear_weight, linear_bias, target, weight, row_weight, divisor)
    arguments = (ignore_index, label_smoothing, softcap, logit_scale, z_loss, fixed_divisor)
    options = _options(arguments, reduction)
    loss, by, gradients = chunks.forward_with_gradients(head, options, most, needed_of(needed), sum_dtype, triton=triton)
    return reference.reduce(loss, loss, by, options).to(dtype), *_tensors(gradients, input)


def _gradients_fake(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, needed: int
) -> tuple[Tensor, ...]:
    given = (input, linear_weight, linear_bias, target)
    return tuple(
        torch.empty_like(t) if need and t is not None else _nothing(input)
        for t, need in zip(given, needed_of(needed), strict=True)
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
    stats: bool, most: int, sum_dtype: torch.dtype, needed: int, triton: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    head = Head(input, linear_weight, linear_bias, target, weight, row_weight, None)
    options = _options((ignore_index, label_smoothing, softcap, logit_scale, z_loss), Reduction.NONE, stats)
    grads = (grad_loss, grad_lse, grad_log_prob, grad_entropy)
    gradients = chunks.backward(head, options, most, needed_of(needed), sum_dtype, saved, entropy, grads, triton=triton)
    return _tensors(gradients, input)


def _rows_backward_fake(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _gradients_fake(input, linear_weight, linear_bias, target, rest[-2])


_HEAD = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? row_weight"
_FORMULA = "int ignore_index, float label_smoothing, float? softcap, float logit_scale, float z_loss"
_FOUR = "Tensor, Tensor, Tensor, Tensor"

linear_cross_entropy_reduced = register(
    f"linear_cross_entropy_reduced({_HEAD}, Tensor? divisor, {_FORMULA}, float? fixed_divisor, int reduction, int most,"
    f" ScalarType sum_dtype, int needed, ScalarType dtype, bool triton) -> (Tensor, {_FOUR})",
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
    f" Tensor? grad_log_prob, Tensor? grad_entropy, {_FORMULA}, bool stats, int most,"
    f" ScalarType sum_dtype, int needed, bool triton) -> ({_FOUR})",
    _rows_backward,
    _rows_backward_fake,
)
register_formulas()
