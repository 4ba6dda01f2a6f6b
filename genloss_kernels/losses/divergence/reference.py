"""Divergences and entropy in plain PyTorch, differentiable to any order: oracle, transforms and second derivatives."""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.reduction import accumulator


class Kind(enum.IntEnum):
    FORWARD_KL = 0  # KL(teacher || student)
    REVERSE_KL = 1  # KL(student || teacher)
    JS = 2
    ENTROPY = 3  # of the student; there is no teacher


class Options(NamedTuple):
    """What a divergence depends on beside its logits; ``divisor`` None: the loss of each row."""

    kind: int
    temperature: float = 1.0
    beta: float = 0.5  # the teacher's weight in the mixture
    divisor: int | None = None


def arithmetic(input: Tensor, target: Tensor | None) -> torch.dtype:
    """The dtype of arithmetic: fp64 if either is."""
    return accumulator(input.dtype if target is None else torch.promote_types(input.dtype, target.dtype))


def rows(input: Tensor, target: Tensor | None, options: Options) -> Tensor:
    """Loss of each row of logits (..., V), found in fp64: the plain formulas lose what close distributions differ by."""
    return _rows(input.double(), None if target is None else target.double(), options).to(arithmetic(input, target))


def _rows(input: Tensor, target: Tensor | None, options: Options) -> Tensor:
    student = torch.log_softmax(input / options.temperature, -1)
    if target is None:
        return -_expectation(student, student)
    teacher = torch.log_softmax(target / options.temperature, -1)
    scale = options.temperature**2
    if options.kind != Kind.JS:
        p, q = (teacher, student) if options.kind == Kind.FORWARD_KL else (student, teacher)
        return scale * _expectation(p, p, q)
    # Infinities where neither has mass must not meet.
    nothing = (teacher == -math.inf) & (student == -math.inf)
    mixture = _mixture(teacher.masked_fill(nothing, 0.0), student.masked_fill(nothing, 0.0), options.beta)
    of_teacher, of_student = (_expectation(log_p, log_p, mixture) for log_p in (teacher, student))
    return scale * (options.beta * of_teacher + (1.0 - options.beta) * of_student)


def _mixture(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Logarithm of the mixture, from that of the more likely: of equal ones exactly that, as logaddexp's need not be."""
    excess = student - teacher
    below = excess <= 0.0
    gap = torch.where(below, excess, -excess)
    share = torch.where(below, excess.new_full((), 1.0 - beta), beta)
    return torch.where(below, teacher, student) + torch.log1p(share * torch.expm1(gap))


def _expectation(log_p: Tensor, value: Tensor, less: Tensor | None = None) -> Tensor:
    """Mean under p of ``value``, or of what it exceeds ``less`` by, terms with p = 0 left out."""
    p = log_p.exp()
    # Their infinities must not meet the 0, in the gradient neither.
    empty = p == 0.0
    value = value.masked_fill(empty, 0.0)
    if less is not None:
        value = value - less.masked_fill(empty, 0.0)
    return (p * value).sum(-1)


def plain(input: Tensor, target: Tensor | None, options: Options) -> Tensor:
    """Each row's entropy or KL divergence by the fewest differentiable operators: NaN where a class has no probability."""
    student = torch.log_softmax(_warm(input, options), -1, dtype=torch.float64)
    if target is None:
        return -torch.linalg.vecdot(student.exp(), student)
    teacher = torch.log_softmax(_warm(target, options), -1, dtype=torch.float64)
    p, q = (teacher, student) if options.kind == Kind.FORWARD_KL else (student, teacher)
    return torch.linalg.vecdot(p.exp(), p - q) * options.temperature**2


def _warm(logits: Tensor, options: Options) -> Tensor:
    return logits if options.temperature == 1.0 else logits.double() / options.temperature


def reduce(rows: Tensor, options: Options) -> Tensor:
    return rows if options.divisor is None else rows.sum() / options.divisor


def divergence(input: Tensor, target: Tensor | None, options: Options) -> Tensor:
    """The reduced loss, in the dtype of arithmetic."""
    return reduce(rows(input, target, options), options)
