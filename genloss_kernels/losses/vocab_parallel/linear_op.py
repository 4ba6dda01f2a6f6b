"""Vocabulary-parallel linear cross entropy's operators, and the autograd.Functions that call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import autograd
from ...core.handover import hand_over, keep
from ...core.library import register
from ...core.reduction import Reduction, accumulator
from ..cross_entropy.reference import Options
from ..linear_cross_entropy.chunks import Gradients
from ..linear_cross_entropy.chunks import Head as LinearHead
from . import collectives, linear, merge
from .op import FORMULA, GRADIENTS, LAYOUT, NO_SECOND, RESULTS, fake_results, results, visible
from .shard import Layout


def mask_of(needed: tuple[bool, ...]) -> int:
    """Which of input, linear weight and linear bias need a gradient, as bits."""
    return sum(need << place for place, need in enumerate(needed))


def _needed(mask: int) -> linear.Needed:
    # A target's gradient would need the other ranks' logits.
    return bool(mask & 1), bool(mask & 2), bool(mask & 4), False


def _layout(starts: list[int], sizes: list[int], rank: int, group: str) -> Layout:
    return Layout(tuple(starts), tuple(sizes), rank, group)


def _three(gradients: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if g is None else g for g in gradients[:3])


def _three_fake(given: tuple[Tensor | None, ...], needed: int) -> tuple[Tensor, ...]:
    first = given[0]
    assert first is not None
    wanted = zip(given, _needed(needed), strict=False)
    return tuple(torch.empty_like(t) if need and t is not None else first.new_empty(0) for t, need in wanted)


def _reduced_forward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    row_weight: Tensor | None, divisor: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    fixed_divisor: float | None, reduction: int, most: int, sum_dtype: torch.dtype, needed: int, dtype: torch.dtype,
    triton: bool, starts: list[int], sizes: list[int], rank: int, group: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    head = LinearHead(input, linear_weight, linear_bias, target, weight, row_weight, divisor)
    options = Options(
        ignore_index, label_smoothing, softcap, logit_scale, z_loss, fixed_divisor, Reduction(reduction), False
    )
    layout = _layout(starts, sizes, rank, group)
    loss, gradients = linear.forward_with_gradients(head, options, layout, most, _needed(needed), sum_dtype, triton=triton)
    return loss.to(dtype), *_three(gradients, input)


def _reduced_forward_fake(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    needed, dtype = rest[-7:-5]
    return input.new_empty((), dtype=dtype), *_three_fake((input, linear_weight, linear_bias), needed)


def _rows_forward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    stats: bool, most: int, triton: bool, starts: list[int], sizes: list[int], rank: int, group: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    head = LinearHead(input, linear_weight, linear_bias, target, weight, None, None)
    options = Options(ignore_index, label_smoothing, softcap, logit_scale, z_loss, reduction=Reduction.NONE, stats=stats)
    layout = _layout(starts, sizes, rank, group)
    gathered = linear.forward(head, options, layout, most, triton=triton)
    rows = merge.merge(gathered, linear.whole_head(head, options, layout))
    return *results(rows, stats=stats), gathered


def _rows_forward_fake(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    stats: bool, most: int, triton: bool, starts: list[int], sizes: list[int], rank: int, group: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    n_rows, acc = input.size(0), accumulator(input.dtype)
    options = Options(label_smoothing=label_smoothing, stats=stats)
    gathered = input.new_empty((len(starts), len(merge.planes(target, weight, options)), n_rows), dtype=acc)
    return *fake_results(input, (n_rows,), stats=stats), gathered


def _rows_backward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    gathered: Tensor,
    grad_loss: Tensor | None, grad_lse: Tensor | None, grad_log_prob: Tensor | None, grad_entropy: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    stats: bool, most: int, sum_dtype: torch.dtype, triton: bool, starts: list[int], sizes: list[int], rank: int, group: str,
    needed: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    head = LinearHead(input, linear_weight, linear_bias, target, weight, None, None)
    options = Options(ignore_index, label_smoothing, softcap, logit_scale, z_loss, reduction=Reduction.NONE, stats=stats)
    grads = (grad_loss, grad_lse, grad_log_prob, grad_entropy)
    layout = _layout(starts, sizes, rank, group)
    gradients = linear.backward(head, options, layout, most, _needed(needed), sum_dtype, gathered, grads, triton=triton)
    return _three(gradients, input)


def _rows_backward_fake(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _three_fake((input, linear_weight, linear_bias), rest[-1])


def _sum(tensor: Tensor, group: str) -> Tensor:
    return collectives.all_reduce(tensor.clone(memory_format=torch.contiguous_format), group)


def _sum_fake(tensor: Tensor, group: str) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


_HEAD = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight"

vocab_parallel_linear_reduced = register(
    f"vocab_parallel_linear_reduced({_HEAD}, Tensor? row_weight, Tensor? divisor, {FORMULA}, float? fixed_divisor,"
    f" int reduction, int most, ScalarType sum_dtype, int needed, ScalarType dtype, bool triton, {LAYOUT})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _reduced_forward,
    _reduced_forward_fake,
)
vocab_parallel_linear_rows = register(
    f"vocab_parallel_linear_rows({_HEAD}, {FORMULA}, bool stats, int most, bool triton, {LAYOUT}) -> ({RESULTS}, Tensor)",
    _rows_forward,
    _rows_forward_fake,
)
vocab_parallel_linear_rows_backward = register(
    f"vocab_parallel_linear_rows_backward({_HEAD}, Tensor gathered, {GRADIENTS}, {FORMULA}, bool stats,"
    f" int most, ScalarType sum_dtype, bool triton, {LAYOUT}, int needed) -> (Tensor, Tensor, Tensor)",
    _rows_backward,
    _rows_backward_fake,
)
vocab_parallel_sum = register("vocab_parallel_sum(Tensor tensor, str group) -> Tensor", _sum, _sum_fake)


def _finished(gradients: tuple[Tensor, ...], needed: int, group: str, reduce_input_grad: bool) -> tuple[Tensor | None, ...]:
    """Gradients of input, linear weight and linear bias: the first is the ranks' sum, the others are this rank's own."""
    first, *own = (g if need else None for g, need in zip(gradients, _needed(needed), strict=False))
    if first is not None and reduce_input_grad:
        first = visible(vocab_parallel_sum, collectives.all_reduce, first)(first, group)
    return first, *own


class ReducedVocabParallelLinear(torch.autograd.Function):
    """Mean or sum, with the gradients made in the forward; also returns these.

    The first backward scales them in place and hands them over; a second one makes them again, on every rank.
    """

    @staticmethod
    def forward(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
        row_weight: Tensor | None, divisor: Tensor | None,
        ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
        fixed_divisor: float | None, reduction: int, most: int, sum_dtype: torch.dtype, needed: int, dtype: torch.dtype,
        triton: bool, starts: list[int], sizes: list[int], rank: int, group: str, reduce_input_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tensors = (input, linear_weight, linear_bias, target, weight, row_weight, divisor)
        return visible(vocab_parallel_linear_reduced, _reduced_forward, *tensors)(
            *tensors, ignore_index, label_smoothing, softcap, logit_scale, z_loss, fixed_divisor, reduction, most, sum_dtype,
            needed, dtype, triton, starts, sizes, rank, group,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.scalars, ctx.reduce_input_grad = inputs[7:-1], inputs[-1]
        keep(ctx, inputs[:7], output[1:])

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, nothing = grads[0], (None,) * (5 + len(ctx.scalars))
        if grad is None:
            return None, None, None, *nothing
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND)
        needed, triton, group = ctx.scalars[9], ctx.scalars[11], ctx.scalars[-1]
        saved = ctx.saved_tensors
        tensors, stored = saved[:7], saved[7:]
        made = hand_over(ctx, stored, grad, lambda: _reduced_forward(*tensors, *ctx.scalars)[1:], triton=triton)
        return *_finished(made, needed, group, ctx.reduce_input_grad), *nothing


class VocabParallelLinearRows(torch.autograd.Function):
    """Loss and statistics of each row, their logits computed again in backward; then what only the backward needs."""

    @staticmethod
    def forward(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
        ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
        stats: bool, most: int, sum_dtype: torch.dtype, triton: bool,
        starts: list[int], sizes: list[int], rank: int, group: str, needed: int, reduce_input_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tensors = (input, linear_weight, linear_bias, target, weight)
        return visible(vocab_parallel_linear_rows, _rows_forward, *tensors)(
            *tensors, ignore_index, label_smoothing, softcap, logit_scale, z_loss, stats, most, triton,
            starts, sizes, rank, group,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[4:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], *output[5:])
        ctx.scalars, ctx.reduce_input_grad = inputs[5:-1], inputs[-1]

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (3 + len(ctx.scalars))
        stats, group, needed = ctx.scalars[5], ctx.scalars[-2], ctx.scalars[-1]
        upstream = grads[:4] if stats else (grads[0], None, None, None)
        if all(g is None for g in upstream):
            return None, None, None, *nothing
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND)
        tensors = (*ctx.saved_tensors, *upstream)
        made = visible(vocab_parallel_linear_rows_backward, _rows_backward, *tensors)(*tensors, *ctx.scalars)
        return *_finished(made, needed, group, ctx.reduce_input_grad), *nothing
