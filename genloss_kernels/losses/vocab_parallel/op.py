"""Vocabulary-parallel cross entropy of logits: its operators, and the autograd.Function that calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core import autograd
from ...core.library import register
from ...core.reduction import Reduction, accumulator
from ...core.row_plan import gradient_like
from ..cross_entropy.reference import Options, Rows
from . import collectives, local, merge
from .merge import Head
from .shard import Layout


def head_of(target: Tensor, weight: Tensor | None, formula: tuple[Any, ...], stats: bool, layout: tuple[Any, ...]) -> Head:
    """From an operator's arguments: ``formula`` is what Options begins with, ``layout`` a Layout's fields."""
    starts, sizes, rank, group = layout
    options = Options(*formula, reduction=Reduction.NONE, stats=stats)
    return Head(target, weight, options, Layout(tuple(starts), tuple(sizes), rank, group))


def results(rows: Rows, *, stats: bool) -> tuple[Tensor, ...]:
    """Loss, log-sum-exp, log-probability, entropy and which rows are predicted right; empty where not asked for."""
    if stats:
        return rows.loss, rows.lse, rows.log_prob, rows.entropy, rows.correct
    nothing = [rows.loss.new_empty(0) for _ in range(3)]
    return rows.loss, *nothing, rows.loss.new_empty(0, dtype=torch.bool)


def fake_results(like: Tensor, rows: tuple[Any, ...], *, stats: bool) -> tuple[Tensor, ...]:
    acc = accumulator(like.dtype)
    of_stats = rows if stats else (0,)
    named = [like.new_empty(of_stats, dtype=dtype) for dtype in (acc, acc, acc, torch.bool)]
    return like.new_empty(rows, dtype=acc), *named


def visible(operator: Callable[..., Any], implementation: Callable[..., Any], *tensors: Tensor | None) -> Callable[..., Any]:
    """The operator for a compiler or a subclass of tensors; else its body, in which a dispatch mode sees the collectives."""
    plain = all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    return implementation if plain and not torch.compiler.is_compiling() else operator


def _forward(
    logits: Tensor, target: Tensor, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    stats: bool, triton: bool, starts: list[int], sizes: list[int], rank: int, group: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    formula = (ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    head = head_of(target, weight, formula, stats, (starts, sizes, rank, group))
    gathered = collectives.all_gather(local.statistics(logits, head, triton=triton), head.layout.ranks, group)
    return *results(merge.merge(gathered, head), stats=stats), gathered


def _forward_fake(
    logits: Tensor, target: Tensor, weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    stats: bool, triton: bool, starts: list[int], sizes: list[int], rank: int, group: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows, acc = (logits.size(0), *logits.shape[2:]), accumulator(logits.dtype)
    planes = merge.planes(target, weight, Options(label_smoothing=label_smoothing, stats=stats))
    gathered = logits.new_empty((len(starts), len(planes), *rows), dtype=acc)
    return *fake_results(logits, rows, stats=stats), gathered


def _backward(
    logits: Tensor, target: Tensor, weight: Tensor | None, gathered: Tensor,
    grad_loss: Tensor | None, grad_lse: Tensor | None, grad_log_prob: Tensor | None, grad_entropy: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    stats: bool, triton: bool, starts: list[int], sizes: list[int], rank: int, group: str,
) -> Tensor:  # fmt: skip
    formula = (ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    head = head_of(target, weight, formula, stats, (starts, sizes, rank, group))
    grads = (grad_loss, grad_lse, grad_log_prob, grad_entropy)
    grad_logits = gradient_like(logits)
    local.write_gradient(logits, head, gathered, grads, grad_logits, triton=triton)
    return grad_logits


def _backward_fake(logits: Tensor, *rest: Any) -> Tensor:
    return gradient_like(logits)


FORMULA = "int ignore_index, float label_smoothing, float? softcap, float logit_scale, float z_loss"
LAYOUT = "int[] starts, int[] sizes, int rank, str group"
GRADIENTS = "Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_log_prob, Tensor? grad_entropy"
RESULTS = "Tensor, Tensor, Tensor, Tensor, Tensor"

vocab_parallel_forward = register(
    f"vocab_parallel_forward(Tensor logits, Tensor target, Tensor? weight, {FORMULA}, bool stats, bool triton, {LAYOUT})"
    f" -> ({RESULTS}, Tensor)",
    _forward,
    _forward_fake,
)
vocab_parallel_backward = register(
    f"vocab_parallel_backward(Tensor logits, Tensor target, Tensor? weight, Tensor gathered, {GRADIENTS},"
    f" {FORMULA}, bool stats, bool triton, {LAYOUT}) -> Tensor",
    _backward,
    _backward_fake,
)

NO_SECOND = (
    "vocab_shard: a vocabulary-parallel loss cannot be differentiated twice: leave create_graph=True out, or gather the "
    "logits and call the loss without vocab_shard"
)


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Loss and statistics of each row of logits whose classes are spread over ranks; then what only the backward needs."""

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, weight: Tensor | None,
        ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
        stats: bool, triton: bool, starts: list[int], sizes: list[int], rank: int, group: str,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return visible(vocab_parallel_forward, _forward, logits, target, weight)(
            logits, target, weight, ignore_index, label_smoothing, softcap, logit_scale, z_loss,
            stats, triton, starts, sizes, rank, group,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[4:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], *output[5:])
        ctx.scalars = inputs[3:]

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, weight, gathered = ctx.saved_tensors
        nothing = (None,) * (2 + len(ctx.scalars))
        stats = ctx.scalars[5]
        # A compiled graph hands over gradients of statistics that were not asked for, and are empty.
        upstream = grads[:4] if stats else (grads[0], None, None, None)
        if all(g is None for g in upstream):
            return None, *nothing
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND)
        tensors = (logits, target, weight, gathered, *upstream)
        return visible(vocab_parallel_backward, _backward, *tensors)(*tensors, *ctx.scalars), *nothing
