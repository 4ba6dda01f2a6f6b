"""The gradients of rows as a function that may be differentiated again, a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import autograd
from ...core.reduction import Reduction, accumulator
from ..cross_entropy import reference
from ..cross_entropy.reference import Options
from .chunks import Head, equal_chunks, mean_divisor
from .op import linear_cross_entropy_rows, linear_cross_entropy_rows_backward, needed_of
from .options import rows_of_chunk

# About how many buffers of logits the reference keeps for a second derivative, where a gradient takes one.
_BUFFERS = 8


def by_reference(head: Head, options: Options) -> tuple[Tensor, reference.Rows]:
    """The loss and its rows from logits that exist, differentiable to any order."""
    ignored = head.ignored(options)
    input = head.input if ignored is None else head.input.masked_fill(ignored.unsqueeze(1), 0.0)
    logits = F.linear(input, head.linear_weight, head.linear_bias)
    return reference.cross_entropy(logits, head.target, head.weight, head.row_weight, head.divisor, options)


def upstream_of_rows(grad: Tensor, head: Head, options: Options) -> Tensor:
    """What the gradient of a mean or a sum is for the loss of each row."""
    grad = grad.to(accumulator(head.input.dtype))
    if options.reduction == Reduction.MEAN:
        divisor = options.divisor if head.divisor is None else head.divisor
        grad = grad / (mean_divisor(head, head.ignored(options)) if divisor is None else divisor)
    return grad.expand(head.input.size(0))


def _derivatives(
    tensors: Sequence[Any], options: Options, needed: Sequence[bool], directions: Sequence[Tensor | None],
    wanted: Sequence[bool], *, create_graph: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Derivatives in those ``tensors`` that are ``wanted``, of the gradients that are ``needed``, along ``directions``."""
    loss, rows = by_reference(Head._make((*tensors[:6], None)), options)
    results = zip((loss, *rows[2:5]), tensors[6:], strict=True)
    pairs = [(o, g.to(o.dtype)) for o, g in results if g is not None and o.requires_grad]
    places = [k for k, need in enumerate(needed) if need and directions[k] is not None]
    gradients = torch.autograd.grad(
        [o for o, _ in pairs], [tensors[k] for k in places], [g for _, g in pairs], create_graph=True, allow_unused=True
    )  # fmt: skip
    along = [(g, directions[k]) for k, g in zip(places, gradients, strict=True) if g is not None and g.requires_grad]
    given = [t for t, want in zip(tensors, wanted, strict=True) if want]
    found = iter(
        torch.autograd.grad(
            [g for g, _ in along], given, [d for _, d in along], create_graph=create_graph, allow_unused=True
        )
        if along
        else [None] * len(given)
    )
    return [next(found) if want else None for want in wanted]


def _in_chunks(
    tensors: Sequence[Tensor | None], options: Options, most: int, needed: Sequence[bool],
    directions: Sequence[Tensor | None], wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """As ``_derivatives``, from the logits of some rows at a time."""
    layer = (1, 2)  # linear weight and bias; class weights take no gradient here
    first = tensors[0]
    assert first is not None
    sums: list[Any] = [None] * len(tensors)
    whole = (*layer, 4)
    for rows in equal_chunks(first.size(0), max(1, rows_of_chunk(most, first) // _BUFFERS)):
        part = [
            t if t is None else (t if k in whole else t[rows]).detach().requires_grad_(wanted[k])
            for k, t in enumerate(tensors)
        ]
        along = [d if d is None or k in layer else d[rows] for k, d in enumerate(directions)]
        with torch.enable_grad():
            found = _derivatives(part, options, needed, along, wanted, create_graph=False)
        for k, (tensor, derivative) in enumerate(zip(tensors, found, strict=True)):
            if tensor is None or derivative is None:
                continue
            if sums[k] is None:
                # Made from a derivative, which is a batch where the directions are one.
                sums[k] = derivative.new_zeros(tensor.shape, dtype=accumulator(tensor.dtype) if k in layer else tensor.dtype)
            (sums[k] if k in layer else sums[k][rows]).add_(derivative)
    return [
        None if t is None or not want else torch.zeros_like(t) if total is None else total.to(t.dtype)
        for t, want, total in zip(tensors, wanted, sums, strict=True)
    ]


class LinearCrossEntropyGradients(torch.autograd.Function):
    """Gradients of input, linear weight, linear bias and target, from those of the rows' losses and statistics.

    Its own derivatives recompute the logits of some rows at a time; theirs, in turn, need them all.
    """

    @staticmethod
    def forward(
        input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
        row_weight: Tensor | None,
        grad_loss: Tensor | None, grad_lse: Tensor | None, grad_log_prob: Tensor | None, grad_entropy: Tensor | None,
        ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
        stats: bool, most: int, sum_dtype: torch.dtype, needed: int, triton: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        head = (input, linear_weight, linear_bias, target, weight, row_weight)
        formula = (ignore_index, label_smoothing, softcap, logit_scale, z_loss, stats)
        _, _, _, entropy, _, _, saved = linear_cross_entropy_rows(*head, *formula, most, triton)
        grads = (grad_loss, grad_lse, grad_log_prob, grad_entropy)
        return linear_cross_entropy_rows_backward(*head, saved, entropy, *grads, *formula, most, sum_dtype, needed, triton)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:10])
        ctx.scalars = inputs[10:]
        ctx.mark_non_differentiable(*(g for g, need in zip(output, needed_of(ctx.scalars[-2]), strict=True) if not need))

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * len(ctx.scalars)
        if all(d is None for d in directions):
            return (None,) * 10 + nothing
        *formula, stats, most, _, needed, _ = ctx.scalars
        options = Options(*formula, reduction=Reduction.NONE, stats=stats)
        arguments = (needed_of(needed), directions, ctx.needs_input_grad[:10])
        if torch.is_grad_enabled():
            found = _derivatives(autograd.apart(ctx.saved_tensors), options, *arguments, create_graph=True)
        else:
            found = _in_chunks(ctx.saved_tensors, options, most, *arguments)
        return (*found, *nothing)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """One after the other, so that only one's logits exist."""
        if not info.batch_size:
            given = zip(args[:4], needed_of(args[-2]), strict=True)
            shapes = [t.shape if need and t is not None else (0,) for t, need in given]
            return tuple(args[0].new_empty((0, *shape)) for shape in shapes), (0, 0, 0, 0)
        each = [
            LinearCrossEntropyGradients.apply(
                *(a if d is None else a.select(d, k) for a, d in zip(args, in_dims, strict=True))
            )
            for k in range(info.batch_size)
        ]
        return tuple(map(torch.stack, zip(*each, strict=True))), (0, 0, 0, 0)
