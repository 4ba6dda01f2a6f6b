"""Cross entropy by PyTorch operators over blocks that stay in the cache; nothing of the logits' size but the gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.layout import row_blocks
from ...core.reduction import accumulator
from ...core.scratch import Scratch
from . import reference
from .reference import Options, Rows, Sums

# Elements of a block for each thread: 1 MiB of fp32, half of a core's second-level cache, and long enough to hide the cost
# of calling operators.
BLOCK_ELEMENTS = 2**18


def _class_dim(logits: Tensor) -> int:
    """Dimension in which to keep the classes: last if they are contiguous, else where they are."""
    return logits.dim() - 1 if logits.dim() == 2 or logits.stride(1) == 1 else 1


def _blocks(tensor: Tensor, dim: int) -> list[tuple[int | slice, ...]]:
    elements = BLOCK_ELEMENTS * torch.get_num_threads()
    shape = tensor.shape if dim == tensor.dim() - 1 else (tensor.size(0), math.prod(tensor.shape[1:]))
    return list(row_blocks(shape, elements))


def _transformed(logits: Tensor, options: Options, scratch: Scratch) -> Tensor:
    if options.logit_scale == 1.0 and options.softcap is None:
        return scratch.cast("logits", logits, accumulator(logits.dtype))
    return reference.transform(logits, options)


def sums(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Sums:
    """Sums over the classes of each row of logits (N, C, d1, ...), which must have elements."""
    dtype = accumulator(logits.dtype)
    dim, n_classes = _class_dim(logits), logits.size(1)
    moved = logits.movedim(1, dim)
    probabilities = target.is_floating_point()
    moved_target = target.movedim(1, dim) if probabilities else target
    weight = None if weight is None else weight.to(dtype)
    label = None if probabilities else reference.labels(target, n_classes, options.ignore_index)[0]
    shape = logits.select(1, 0).shape
    scratch, results = Scratch(), None
    for index in _blocks(moved, dim):
        within = dim - sum(isinstance(i, int) for i in index)
        y = _transformed(moved[index], options, scratch)
        log_p = torch.log_softmax(y, within, out=scratch.take("log_p", y.shape, dtype, y.device))
        part = reference.class_sums(
            y, log_p, moved_target[index], None if label is None else label[index], weight, options, within
        )
        if results is None:
            results = Sums(*(None if p is None else p.new_empty(shape) for p in part))
        for result, value in zip(results, part, strict=True):
            if result is not None and value is not None:
                result[index] = value
    assert results is not None
    return results


def forward(logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, options: Options) -> Rows:
    """Loss and statistics of each row of logits (N, C, d1, ...)."""
    if not logits.numel():
        return reference.rows(logits, target, weight, row_weight, options)
    results = sums(logits, target, weight, options)
    weight = None if weight is None else weight.to(accumulator(logits.dtype))
    return reference.combine(results, target, weight, row_weight, options, 1, logits.size(1))


class RowGradients(NamedTuple):
    """Coefficients of each row's gradient, in the shape of the rows; None where there is none."""

    loss: Tensor
    lse: Tensor | None
    log_prob: Tensor | None
    entropy: Tensor | None
    label: Tensor | None = None
    of_label: Tensor | None = None
    of_probability: Tensor | None = None
    ignored: Tensor | None = None
    outside: Tensor | None = None

    def block(self, index: tuple[int | slice, ...]) -> RowGradients:
        return RowGradients(*(None if t is None else t[index] for t in self))  # pyright: ignore[reportArgumentType]


def of_probabilities(rows: RowGradients, mass: Tensor, target_mass: Tensor) -> Tensor:
    """Coefficient of a row's probabilities, from the sums of its smoothed and of its plain target."""
    result = rows.loss * mass
    if rows.lse is not None:
        result = result + rows.lse
    return result if rows.log_prob is None else result - rows.log_prob * target_mass


def of_z_loss(rows: RowGradients, lse: Tensor, options: Options) -> Tensor:
    """What the z-loss adds to the coefficient of a row's probabilities."""
    return 2.0 * options.z_loss * rows.loss * lse


def row_gradients(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    divisor: Tensor | None,
    grads: tuple[Tensor | None, ...],
    options: Options,
) -> RowGradients:
    """Of logits only the shape, dtype and device matter."""
    dtype = accumulator(logits.dtype)
    shape = logits.select(1, 0).shape
    grad_loss, *grad_statistics = grads
    grad = torch.zeros((), dtype=dtype, device=logits.device) if grad_loss is None else grad_loss.to(dtype)
    if divisor is not None:
        grad = grad / divisor.to(dtype)
    elif options.divisor is not None:
        grad = grad / options.divisor
    grad = grad.expand(shape)
    if row_weight is not None:
        grad = grad * row_weight.to(dtype)
    rows = RowGradients(grad, *(None if g is None else g.expand(shape) for g in grad_statistics))
    if target.is_floating_point():
        return rows
    n_classes, smoothing = logits.size(1), options.label_smoothing
    label, valid, outside = reference.labels(target, n_classes, options.ignore_index)
    of_label = of_probability = grad if weight is None else grad * weight[label]
    if smoothing:
        of_label = of_label * (1.0 - smoothing)
        mass = 1.0 if weight is None else weight.sum() / n_classes
        of_probability = of_label + grad * (smoothing * mass)
    if rows.lse is not None:
        of_probability = of_probability + rows.lse
    if rows.log_prob is not None:
        of_probability, of_label = of_probability - rows.log_prob, of_label - rows.log_prob
    anywhere = logits.device.type != "cpu"
    return rows._replace(
        label=label,
        of_label=of_label,
        of_probability=of_probability,
        ignored=~valid if anywhere or not valid.all() else None,
        outside=outside if anywhere or outside.any() else None,
    )


def backward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    divisor: Tensor | None,
    grads: tuple[Tensor | None, ...],
    grad_logits: Tensor | None,
    grad_target: Tensor | None,
    options: Options,
) -> None:
    """Write the gradients of logits and target, block by block, from those of loss, lse, log-probability and entropy."""
    weight = None if weight is None else weight.to(accumulator(logits.dtype))
    rows = row_gradients(logits, target, weight, row_weight, divisor, grads, options)
    write(logits, target, weight, rows, grad_logits, grad_target, options)


def write(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    rows: RowGradients,
    grad_logits: Tensor | None,
    grad_target: Tensor | None,
    options: Options,
) -> None:
    """Write the gradients of logits and target, block by block, from the coefficients of each row's."""
    dim = _class_dim(logits)
    moved = logits.movedim(1, dim)
    moved_target = target.movedim(1, dim) if target.is_floating_point() else target
    moved_grad = None if grad_logits is None else grad_logits.movedim(1, dim)
    moved_grad_target = None if grad_target is None else grad_target.movedim(1, dim)
    scratch = Scratch()
    for index in _blocks(moved, dim):
        within = dim - sum(isinstance(i, int) for i in index)
        y = _transformed(moved[index], options, scratch)
        part = rows.block(index)
        if moved_grad_target is not None:
            _write_grad_target(y, weight, part, moved_grad_target[index], options, within)
        if moved_grad is not None:
            _write_grad_logits(y, moved_target[index], weight, part, moved_grad[index], options, within, scratch)


def _write_grad_target(
    y: Tensor, weight: Tensor | None, rows: RowGradients, grad_target: Tensor, options: Options, dim: int
) -> None:
    factor = rows.loss.unsqueeze(dim) * (options.label_smoothing - 1.0)
    if weight is not None:
        factor = factor * reference.along(weight, y, dim)
    if rows.log_prob is not None:
        factor = factor + rows.log_prob.unsqueeze(dim)
    grad_target.copy_(torch.log_softmax(y, dim).mul_(factor))


def _write_grad_logits(
    y: Tensor,
    target: Tensor,
    weight: Tensor | None,
    rows: RowGradients,
    grad_logits: Tensor,
    options: Options,
    dim: int,
    scratch: Scratch,
) -> None:
    in_place = grad_logits.dtype == y.dtype and grad_logits.stride(dim) == 1
    dy = torch.softmax(y, dim, out=grad_logits if in_place else scratch.take("dy", y.shape, y.dtype, y.device))
    grad = rows.loss.unsqueeze(dim)
    surplus = None
    if rows.entropy is not None:
        log_p = torch.log_softmax(y, dim).masked_fill_(dy == 0, 0.0)
        entropy = -(dy * log_p).sum(dim, keepdim=True)
        surplus = log_p.add_(entropy).mul_(dy).mul_(rows.entropy.unsqueeze(dim))
    q = reference.smoothed(target, weight, dim, options, y.dtype) if target.is_floating_point() else None
    of_probability = rows.of_probability
    if of_probability is None:
        assert q is not None
        of_probability = of_probabilities(rows, q.sum(dim), target.sum(dim, dtype=y.dtype))
    if options.z_loss:
        of_probability = of_probability + of_z_loss(rows, torch.logsumexp(y, dim), options)
    dy.mul_(of_probability.unsqueeze(dim))
    if q is not None:
        dy.sub_(q.mul_(grad) if q is not target else q * grad)
        if rows.log_prob is not None:
            dy.add_(target.to(y.dtype) * rows.log_prob.unsqueeze(dim))
    elif rows.label is not None and rows.of_label is not None:
        dy.scatter_add_(dim, rows.label.unsqueeze(dim), -rows.of_label.unsqueeze(dim))
        if options.label_smoothing:
            share = grad * (options.label_smoothing / y.size(dim))
            dy.sub_(share if weight is None else share * reference.along(weight, y, dim))
    if surplus is not None:
        dy.sub_(surplus)
    if options.softcap is not None:
        dy.mul_(1.0 - (y / options.softcap).square_())
    if options.logit_scale != 1.0:
        dy.mul_(options.logit_scale)
    if rows.outside is not None:
        dy.masked_fill_(rows.outside.unsqueeze(dim), float("nan"))
    if rows.ignored is not None:
        dy.masked_fill_(rows.ignored.unsqueeze(dim), 0.0)
    if dy is not grad_logits:
        grad_logits.copy_(dy)
