"""The chunked algorithm: logits of some rows at a time, turned into losses and gradients by cross entropy's operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.reduction import Reduction, accumulator
from ...core.scratch import Scratch
from ..cross_entropy import op as cross_entropy
from ..cross_entropy import reference
from ..cross_entropy.reference import Options
from . import options as chunking


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
    """Chunks of at most ``most`` rows, as equal as can be: a short last one would multiply as slowly as a full one.

    Never the whole of a batch that is longer than 256 rows.
    """
    if n_rows > chunking.WHOLE_BATCH:
        most = min(most, -(-n_rows // 2))
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
    zero = None if ignored is None else head.input.new_zeros(())
    for rows in equal_chunks(head.input.size(0), chunking.rows_of_chunk(most, head.input)):
        size = rows.stop - rows.start
        hidden = head.input[rows]
        if ignored is not None and zero is not None:
            # An ignored row may hold anything, and 0 * NaN would poison the whole gradient of the weight.
            kept = scratch.take("hidden", (size, head.input.size(1)), dtype, device)
            hidden = torch.where(ignored[rows].unsqueeze(1), zero, hidden, out=kept)
        logits = scratch.take("logits", (size, weight.size(0)), dtype, device)
        if head.linear_bias is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            torch.addmm(head.linear_bias, hidden, weight.t(), out=logits)
        yield _Chunk(rows, hidden, logits)


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def mean_divisor(head: Head, ignored: Tensor | None) -> Tensor:
    """What the mean divides by, from the targets and weights alone."""
    n_classes, dtype = head.linear_weight.size(0), accumulator(head.input.dtype)
    valid = None if ignored is None else ~ignored
    return reference.mean_divisor(head.target, head.weight, head.row_weight, n_classes, valid, dtype)


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
        # Tensors of their own: an operator's results may not share one.
        loss, lse, log_prob, entropy, saved = (head.input.new_empty(0, dtype=acc) for _ in range(5))
        n_valid, n_correct = (torch.zeros((), dtype=torch.int64, device=head.input.device) for _ in range(2))
        return Rows(loss, lse, log_prob, entropy, n_valid, n_correct, saved)
    loss, lse, log_prob, entropy, n_valid, n_correct, saved, _ = zip(*results, strict=True)
    counts = [torch.stack(n).sum() if options.stats else n[0] for n in (n_valid, n_correct)]
    rows_of = [torch.cat(part) for part in (loss, lse, log_prob, entropy)]
    return Rows._make((*rows_of, *counts, torch.cat(saved, -1)))


class _Sums:
    """Gradients under construction: those of the linear layer are summed over chunks in ``acc``."""

    def __init__(self, head: Head, needed: tuple[bool, bool, bool, bool], acc: torch.dtype) -> None:
        need_input, need_weight, need_bias, need_target = needed
        # Without rows there is no first product to write these.
        make = torch.empty_like if head.input.size(0) else torch.zeros_like
        bias = head.linear_bias if need_bias else None
        self.head = head
        self.input = torch.empty_like(head.input) if need_input else None
        self.weight = make(head.linear_weight, dtype=acc) if need_weight else None
        self.bias = None if bias is None else make(bias, dtype=acc)
        self.target = torch.empty_like(head.target) if need_target else None
        self.needs_logits = need_input or need_weight or bias is not None

    def add(self, chunk: _Chunk, grad_logits: Tensor) -> None:
        first = chunk.rows.start == 0
        if self.input is not None:
            torch.mm(grad_logits, self.head.linear_weight, out=self.input[chunk.rows])
        if self.weight is not None:
            _add_product(self.weight, grad_logits.t(), chunk.hidden, first=first)
        if self.bias is not None:
            if first:
                torch.sum(grad_logits, 0, dtype=self.bias.dtype, out=self.bias)
            else:
                self.bias.add_(grad_logits.sum(0, dtype=self.bias.dtype))

    def result(self) -> Gradients:
        head = self.head
        weight = None if self.weight is None else self.weight.to(head.linear_weight.dtype)
        bias = None if self.bias is None or head.linear_bias is None else self.bias.to(head.linear_bias.dtype)
        return Gradients(self.input, weight, bias, self.target)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, or = where it is the ``first``, with the products of half precision summed in fp32."""
    options: dict[str, Any] = {}
    if total.dtype != a.dtype:
        if total.device.type == "cpu":
            a, b = a.to(total.dtype), b.to(total.dtype)
        else:
            options = {"out_dtype": total.dtype}
    if first:
        torch.mm(a, b, out=total, **options)
    else:
        torch.addmm(total, a, b, out=total, **options)


def _grad_logits(chunk: _Chunk, sums: _Sums, scratch: Scratch, *, triton: bool) -> Tensor | None:
    """Where a chunk's gradient goes: the kernels read and write each element once, so that it takes the logits' place."""
    if not sums.needs_logits:
        return None
    return chunk.logits if triton else scratch.take("gradient", chunk.logits.shape, chunk.logits.dtype, chunk.logits.device)


def forward_with_gradients(
    head: Head, options: Options, most: int, needed: tuple[bool, bool, bool, bool], sum_dtype: torch.dtype, *, triton: bool
) -> tuple[Tensor, Tensor | None, Gradients]:
    """Losses of the rows, what their mean divides by unless that is a number, and the gradients of their mean or sum.

    Each chunk's logits are computed once.
    """
    acc = accumulator(head.input.dtype)
    ignored, divisor = head.ignored(options), head.divisor
    if options.by_normalizer(divisor):
        divisor = mean_divisor(head, ignored)
    of_chunk = options._replace(reduction=Reduction.SUM)
    one = torch.ones((), dtype=acc, device=head.input.device)
    losses, sums, scratch = [], _Sums(head, needed, sum_dtype), Scratch()
    for chunk in _chunks(head, ignored, most, scratch):
        grad_logits = _grad_logits(chunk, sums, scratch, triton=triton)
        loss = cross_entropy.loss_and_gradient(
            chunk.logits, head.target[chunk.rows], head.weight, _part(head.row_weight, chunk.rows), divisor, one, of_chunk,
            grad_logits, _part(sums.target, chunk.rows), triton,
        )  # fmt: skip
        losses.append(loss)
        if grad_logits is not None:
            sums.add(chunk, grad_logits)
    loss = losses[0] if len(losses) == 1 else torch.cat(losses) if losses else head.input.new_empty(0, dtype=acc)
    return loss, divisor, sums.result()


def backward(
    head: Head, options: Options, most: int, needed: tuple[bool, bool, bool, bool], sum_dtype: torch.dtype,
    saved: Tensor, entropy: Tensor, grads: tuple[Tensor | None, ...], *, triton: bool,
) -> Gradients:  # fmt: skip
    """Gradients from those of the rows' losses and statistics; the logits are computed again."""
    sums, scratch = _Sums(head, needed, sum_dtype), Scratch()
    for chunk in _chunks(head, head.ignored(options), most, scratch):
        grad_logits = _grad_logits(chunk, sums, scratch, triton=triton)
        cross_entropy.write_gradients(
            chunk.logits, head.target[chunk.rows], head.weight, _part(head.row_weight, chunk.rows), None,
            saved[..., chunk.rows].contiguous() if triton else saved, entropy[chunk.rows] if options.stats else entropy,
            tuple(_part(g, chunk.rows) for g in grads), options, grad_logits, _part(sums.target, chunk.rows), triton,
        )  # fmt: skip
        if grad_logits is not None:
            sums.add(chunk, grad_logits)
    return sums.result()
