"""Cross entropy by PyTorch operators over blocks that stay in the cache; nothing of the logits' size but the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.layout import row_blocks
from ...core.reduction import accumulator
from . import reference
from .reference import Options, Rows

# 1 MiB of fp32: half of a core's second-level cache, and long enough to hide the cost of calling operators.
BLOCK_ELEMENTS = 2**18


def _class_dim(logits: Tensor) -> int:
    """Dimension in which to keep the classes: last if they are contiguous, else where they are."""
    return logits.dim() - 1 if logits.dim() == 2 or logits.stride(1) == 1 else 1


def _blocks(tensor: Tensor, dim: int) -> list[tuple[int | slice, ...]]:
    if dim == tensor.dim() - 1:
        return list(row_blocks(tensor.shape, BLOCK_ELEMENTS))
    return list(row_blocks((tensor.size(0), math.prod(tensor.shape[1:])), BLOCK_ELEMENTS))


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    options: Options,
) -> Rows:
    """Loss and statistics of each row of logits (N, C, d1, ...)."""
    dim = _class_dim(logits)
    moved = logits.movedim(1, dim)
    moved_target = target.movedim(1, dim) if target.is_floating_point() else target
    shape = logits.select(1, 0).shape
    dtype = accumulator(logits.dtype)
    results = Rows(
        *(torch.empty(shape, dtype=dtype, device=logits.device) for _ in range(5)),
        *(torch.empty(shape, dtype=torch.bool, device=logits.device) for _ in range(2)),
    )
    for index in _blocks(moved, dim):
        within = dim - sum(isinstance(i, int) for i in index)
        block = reference.rows(
            moved[index],
            moved_target[index],
            weight,
            None if row_weight is None else row_weight[index],
            options,
            within,
        )
        for result, part in zip(results, block, strict=True):
            result[index] = part
    return results


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
    grad_loss, *grad_statistics = grads
    dtype = accumulator(logits.dtype)
    shape = logits.select(1, 0).shape
    grad = torch.zeros((), dtype=dtype, device=logits.device) if grad_loss is None else grad_loss.to(dtype)
    if divisor is not None:
        grad = grad / divisor.to(dtype)
    elif options.divisor is not None:
        grad = grad / options.divisor
    grad = grad.expand(shape)
    if row_weight is not None:
        grad = grad * row_weight.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    dim = _class_dim(logits)
    probabilities = target.is_floating_point()
    moved = logits.movedim(1, dim)
    moved_target = target.movedim(1, dim) if probabilities else target
    moved_grad = None if grad_logits is None else grad_logits.movedim(1, dim)
    moved_grad_target = None if grad_target is None else grad_target.movedim(1, dim)
    for index in _blocks(moved, dim):
        within = dim - sum(isinstance(i, int) for i in index)
        _backward_block(
            moved[index],
            moved_target[index],
            weight,
            grad[index],
            [None if g is None else g.expand(shape)[index] for g in grad_statistics],
            None if moved_grad is None else moved_grad[index],
            None if moved_grad_target is None else moved_grad_target[index],
            options,
            within,
        )


def _backward_block(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    grad_statistics: list[Tensor | None],
    grad_logits: Tensor | None,
    grad_target: Tensor | None,
    options: Options,
    dim: int,
) -> None:
    grad_lse, grad_log_prob, grad_entropy = grad_statistics
    probabilities = target.is_floating_point()
    smoothing, n_classes = options.label_smoothing, logits.size(dim)
    y = reference.transform(logits, options)
    if grad_target is not None:
        factor = grad.unsqueeze(dim) * (smoothing - 1.0)
        if weight is not None:
            factor = factor * reference.along(weight, y, dim)
        if grad_log_prob is not None:
            factor = factor + grad_log_prob.unsqueeze(dim)
        grad_target.copy_(torch.log_softmax(y, dim).mul_(factor))
    if grad_logits is None:
        return
    in_place = grad_logits.dtype == y.dtype and grad_logits.stride(dim) == 1
    dy = torch.softmax(y, dim, out=grad_logits) if in_place else torch.softmax(y, dim)
    surplus = None
    if grad_entropy is not None:
        log_p = torch.log_softmax(y, dim).masked_fill_(dy == 0, 0.0)
        entropy = -(dy * log_p).sum(dim, keepdim=True)
        surplus = log_p.add_(entropy).mul_(dy).mul_(grad_entropy.unsqueeze(dim))
    of_label = of_probability = grad
    q = valid = outside = label = None
    if probabilities:
        q = reference.smoothed(target, weight, dim, options, y.dtype)
        of_probability = grad * q.sum(dim)
    else:
        label, valid, outside = reference.labels(target, n_classes, options.ignore_index)
        if weight is not None:
            of_label = of_probability = grad * weight[label]
        if smoothing:
            of_label = of_label * (1.0 - smoothing)
            mass = 1.0 if weight is None else weight.sum() / n_classes
            of_probability = of_label + grad * (smoothing * mass)
    if options.z_loss:
        of_probability = of_probability + 2.0 * options.z_loss * grad * torch.logsumexp(y, dim)
    if grad_lse is not None:
        of_probability = of_probability + grad_lse
    if grad_log_prob is not None:
        if probabilities:
            of_probability = of_probability - grad_log_prob * target.sum(dim)
        else:
            of_probability = of_probability - grad_log_prob
            of_label = of_label - grad_log_prob
    dy.mul_(of_probability.unsqueeze(dim))
    if q is not None:
        dy.sub_(q.mul_(grad.unsqueeze(dim)) if q is not target else q * grad.unsqueeze(dim))
        if grad_log_prob is not None:
            dy.add_(target * grad_log_prob.unsqueeze(dim))
    elif label is not None and outside is not None:
        dy.scatter_add_(dim, label.unsqueeze(dim), -of_label.unsqueeze(dim))
        if smoothing:
            share = grad.unsqueeze(dim) * (smoothing / n_classes)
            dy.sub_(share if weight is None else share * reference.along(weight, y, dim))
    if surplus is not None:
        dy.sub_(surplus)
    if options.softcap is not None:
        dy.mul_(1.0 - (y / options.softcap).square_())
    if options.logit_scale != 1.0:
        dy.mul_(options.logit_scale)
    if valid is not None and outside is not None:
        if dy.device.type != "cpu" or outside.any():
            dy.masked_fill_(outside.unsqueeze(dim), float("nan"))
        if dy.device.type != "cpu" or not valid.all():
            dy.masked_fill_(~valid.unsqueeze(dim), 0.0)
    if dy is not grad_logits:
        grad_logits.copy_(dy)
