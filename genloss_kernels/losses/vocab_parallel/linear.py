"""Linear cross entropy chunk by chunk, each rank with its own rows of the linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.reduction import Reduction, accumulator
from ...core.scratch import Scratch
from ..cross_entropy import reference
from ..cross_entropy.reference import Options
from ..linear_cross_entropy import chunks
from ..linear_cross_entropy.chunks import Gradients
from . import collectives, local, merge
from .merge import Head
from .shard import Layout

Needed = tuple[bool, bool, bool, bool]


def whole_head(head: chunks.Head, options: Options, layout: Layout) -> Head:
    return Head(head.target, head.weight, options, layout)


def _rows_of(head: Head, rows: slice) -> Head:
    return head._replace(target=head.target[rows])


def weighted(loss: Tensor, head: chunks.Head, options: Options, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Losses times the row weights, what their mean divides by, row by row, and which rows count."""
    weight = None if head.weight is None else head.weight.to(loss.dtype)
    return reference.weighted(loss, head.target, weight, head.row_weight, options, layout.vocab_size)


def forward(head: chunks.Head, options: Options, layout: Layout, most: int, *, triton: bool) -> Tensor:
    """All ranks' planes for all rows, exchanged at once."""
    whole = whole_head(head, options, layout)
    planes = len(merge.planes(head.target, head.weight, options))
    here = [head.input.new_empty((planes, 0), dtype=accumulator(head.input.dtype))]
    here += [
        local.statistics(chunk.logits, _rows_of(whole, chunk.rows), triton=triton)
        for chunk in chunks._chunks(head, head.ignored(options), most, Scratch())
    ]
    return collectives.all_gather(torch.cat(here, 1), layout.ranks, layout.group)


def backward(
    head: chunks.Head, options: Options, layout: Layout, most: int, needed: Needed, sum_dtype: torch.dtype, gathered: Tensor,
    grads: tuple[Tensor | None, ...], *, triton: bool,
) -> Gradients:  # fmt: skip
    """This rank's gradients, from those of the rows' losses and statistics; the logits are computed again."""
    whole = whole_head(head, options, layout)
    sums, scratch = chunks._Sums(head, needed, sum_dtype), Scratch()
    for chunk in chunks._chunks(head, head.ignored(options), most, scratch):
        part = tuple(None if g is None else g[chunk.rows] for g in grads)
        _add(sums, chunk, _rows_of(whole, chunk.rows), gathered[..., chunk.rows], part, scratch, triton=triton)
    return sums.result()


def forward_with_gradients(
    head: chunks.Head, options: Options, layout: Layout, most: int, needed: Needed, sum_dtype: torch.dtype, *, triton: bool
) -> tuple[Tensor, Gradients]:
    """The mean or the sum, and this rank's gradients of it: each chunk's logits are computed, and exchanged for, once."""
    whole = whole_head(head, options._replace(reduction=Reduction.NONE, divisor=None), layout)
    acc = accumulator(head.input.dtype)
    # The gradient of a row's loss is its factor in the result.
    factor, normalizer, _ = weighted(torch.ones_like(head.input[:, 0], dtype=acc), head, options, layout)
    total = reference.reduce(torch.ones((), dtype=acc, device=head.input.device), normalizer, head.divisor, options)
    factor = factor * total
    losses, sums, scratch = [factor.new_empty(0)], chunks._Sums(head, needed, sum_dtype), Scratch()
    for chunk in chunks._chunks(head, head.ignored(options), most, scratch):
        part = _rows_of(whole, chunk.rows)
        here = local.statistics(chunk.logits, part, triton=triton)
        gathered = collectives.all_gather(here, layout.ranks, layout.group)
        losses.append(merge.merge(gathered, part).loss)
        _add(sums, chunk, part, gathered, (factor[chunk.rows], None, None, None), scratch, triton=triton)
    loss, normalizer, _ = weighted(torch.cat(losses), head, options, layout)
    return reference.reduce(loss, normalizer, head.divisor, options), sums.result()


def _add(
    sums: chunks._Sums, chunk: chunks._Chunk, head: Head, gathered: Tensor,
    grads: tuple[Tensor | None, ...], scratch: Scratch, *, triton: bool,
) -> None:  # fmt: skip
    # The kernels read and write each element once, so that the gradient takes the logits' place.
    logits = chunk.logits
    grad_logits = logits if triton else scratch.take("gradient", logits.shape, logits.dtype, logits.device)
    local.write_gradient(logits, head, gathered, grads, grad_logits, triton=triton)
    sums.add(chunk, grad_logits)
