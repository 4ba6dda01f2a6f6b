"""The chunked algorithm: logits of some rows at a time, turned into losses and gradients by cross entropy's operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.reduction import Reduction, accumulator
from ...core.scratch import Scratch
from ..cross_entropy import op as cross_entropy
from ..cross_entropy import reference
from ..cross_entropy.reference import Options


class Head(NamedTuple):
    """What the loss is a function of: rows (N, D), a linear layer (V, D) and (V), targets (N) or (N, V)."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    row_weight: Tensor | None
    divisor: Tensor | None

    def ignored(self, options: Options) -> Tensor | None:
        return None if self.target.is_floating_point() else self.target == options.ignore_index


class Gradients(NamedTuple):
    """Of input, linear weight, linear bias and target; None where none is needed."""

    input: Tensor | None
    linear_weight: Tensor | None
    linear_bias: Tensor | None
    target: Tensor | None


class Rows(NamedTuple):
    """Results of the forward for each row, in the dtype of arithmetic; ``saved`` is what cross entropy's backward needs."""

    loss: Tensor
    lse: Tensor
    log_prob: Tensor
    entropy: Tensor
    n_valid: Tensor
    n_correct: Tensor
    saved: Tensor


def equal_chunks(n_rows: int, most: int) -> Iterator[slice]:
    """Chunks of at most ``most`` rows, as equal as can be: a short last one would multiply as slowly as a full one."""
    count = max(1, -(-n_rows // most))
    size = -(-n_rows // count) if n_rows else 0
    for start in range(0, n_rows, max(1, size)):
        yield slice(start, min(start + size, n_rows))


class _Chunk(NamedTuple):
    rows: slice
    hidden: Tensor
    logits: Tensor


def _chunks(head: Head, ignored: Tensor | None, most: int, scratch: Scratch) -> Iterator[_Chunk]:
    """Each chunk's rows of the input, those ignored zeroed, and its logits in a buffer that the next chunk uses again."""
    weight, dtype, device = head.linear_weight, head.input.dtype, head.input.device
    for rows in equal_chunks(head.input.size(0), most):
        size = rows.stop - rows.start
        hidden = scratch.take("hidden", (size, head.input.size(1)), dtype, device).copy_(head.input[rows])
        if ignored is not None:
            # An ignored row may hold anything, and 0 * NaN would poison the whole gradient of the weight.
            hidden.masked_fill_(ignored[rows].unsqueeze(1), 0.0)
        logits = scratch.take("logits", (size, weight.size(0)), dtype, device)
        if head.linear_bias is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            torch.addmm(head.linear_bias, hidden, weight.t(), out=logits)
        yield _Chunk(rows, hidden, logits)


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def mean_divisor(head: Head, options: Options) -> Tensor:
    """What the mean divides by, from the targets and weights alone."""
    dtype = accumulator(head.input.dtype)
    ones = torch.ones(head.input.size(0), dtype=dtype, device=head.input.device)
    weight = None if head.weight is None else head.weight.to(dtype)
    _, normalizer, _ = reference.weighted(ones, head.target, weight, head.row_weight, options, head.linear_weight.size(0))
    return normalizer.sum()


def forward(head: Head, options: Options, most: int, *, triton: bool) -> Rows:
    """Loss and statistics of each row, without gradients."""
    rows, acc = options._replace(reduction=Reduction.NONE, divisor=None), accumulator(head.input.dtype)
    results = [
        cross_entropy.rows_forward(
            chunk.logits, head.target[chunk.rows], head.weight, _part(head.row_weight, chunk.rows), rows, acc, triton
        )
        for chunk in _chunks(head, head.ignored(options), most, Scratch())
    ]
    if not results:
        empty = head.input.new_empty(0, dtype=acc)
        zero = torch.zeros((), dtype=torch.int64, device=head.input.device)
        return Rows(empty, empty, empty, empty, zero, zero, empty)
    loss, lse, log_prob, entropy, n_valid, n_correct, saved, _ = zip(*results, strict=True)
    counts = [torch.stack(n).sum() if options.stats else n[0] for n in (n_valid, n_correct)]
    rows_of = [torch.cat(part) for part in (loss, lse, log_prob, entropy)]
    return Rows._make((*rows_of, *counts, torch.cat(saved, -1)))


class _Sums:
    """Gradients under construction: those of the linear layer are summed over chunks in the dtype of arithmetic."""

    def __init__(self, head: Head, needed: tuple[bool, bool, bool, bool]) -> None:
        need_input, need_weight, need_bias, need_target = needed
        acc = accumulator(head.input.dtype)
        self.head = head
        self.input = torch.empty_like(head.input) if need_input else None
        self.weight = torch.zeros_like(head.linear_weight, dtype=acc) if need_weight else None
        has_bias = need_bias and head.linear_bias is not None
        self.bias = torch.zeros(head.linear_weight.size(0), dtype=acc, device=head.input.device) if has_bias else None
        self.target = torch.empty_like(head.target) if need_target else None
        self.needs_logits = need_input or need_weight or has_bias

    def add(self, chunk: _Chunk, grad_logits: Tensor) -> None:
        if self.input is not None:
            torch.mm(grad_logits, self.head.linear_weight, out=self.input[chunk.rows])
        if self.weight is not None:
            _add_product(self.weight, grad_logits.t(), chunk.hidden)
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(0, dtype=self.bias.dtype))

    def result(self) -> Gradients:
        head = self.head
        weight = None if self.weight is None else self.weight.to(head.linear_weight.dtype)
        bias = None if self.bias is None or head.linear_bias is None else self.bias.to(head.linear_bias.dtype)
        return Gradients(self.input, weight, bias, self.target)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with the products of half precision summed in fp32."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _gradients_of_chunk(
    head: Head, chunk: _Chunk, divisor: Tensor | None, saved: Tensor, entropy: Tensor,
    grads: tuple[Tensor | None, ...], options: Options, sums: _Sums, scratch: Scratch, *, triton: bool,
) -> None:  # fmt: skip
    # The kernels read and write each element once, so that the gradient takes the logits' place.
    grad_logits = chunk.logits if triton else scratch.take("gradient", chunk.logits.shape, chunk.logits.dtype, saved.device)
    cross_entropy.write_gradients(
        chunk.logits, head.target[chunk.rows], head.weight, _part(head.row_weight, chunk.rows), divisor,
        saved, entropy, grads, options, grad_logits if sums.needs_logits else None, _part(sums.target, chunk.rows), triton,
    )  # fmt: skip
    if sums.needs_logits:
        sums.add(chunk, grad_logits)


def forward_with_gradients(
    head: Head, options: Options, most: int, needed: tuple[bool, bool, bool, bool], *, triton: bool
) -> tuple[Tensor, Gradients]:
    """Losses of the rows, and the gradients of their mean or sum: each chunk's logits are computed once."""
    rows, acc = options._replace(reduction=Reduction.NONE, divisor=None), accumulator(head.input.dtype)
    divisor = head.divisor
    if options.reduction == Reduction.MEAN and divisor is None and options.divisor is None:
        divisor = mean_divisor(head, options)
    of_chunk = options._replace(reduction=Reduction.SUM)
    one = torch.ones((), dtype=acc, device=head.input.device)
    losses, sums, scratch = [], _Sums(head, needed), Scratch()
    for chunk in _chunks(head, head.ignored(options), most, scratch):
        loss, *_, saved, _ = cross_entropy.rows_forward(
            chunk.logits, head.target[chunk.rows], head.weight, _part(head.row_weight, chunk.rows), rows, acc, triton
        )
        losses.append(loss)
        nothing = loss.new_empty(0)
        upstream = (one.expand(loss.shape), None, None, None)
        _gradients_of_chunk(head, chunk, divisor, saved, nothing, upstream, of_chunk, sums, scratch, triton=triton)
    return torch.cat(losses) if losses else head.input.new_empty(0, dtype=acc), sums.result()


def backward(
    head: Head, options: Options, most: int, needed: tuple[bool, bool, bool, bool],
    saved: Tensor, entropy: Tensor, grads: tuple[Tensor | None, ...], *, triton: bool,
) -> Gradients:  # fmt: skip
    """Gradients from those of the rows' losses and statistics; the logits are computed again."""
    sums, scratch = _Sums(head, needed), Scratch()
    for chunk in _chunks(head, head.ignored(options), most, scratch):
        part = tuple(_part(g, chunk.rows) for g in grads)
        own_saved = saved[..., chunk.rows].contiguous() if triton else saved
        own_entropy = entropy[chunk.rows] if options.stats else entropy
        _gradients_of_chunk(head, chunk, None, own_saved, own_entropy, part, options, sums, scratch, triton=triton)
    return sums.result()
