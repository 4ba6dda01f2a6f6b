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


# A logit farther than this below its row's maximum counts as -inf.
FAR = 1e30

# Below these a divergence shows in its own dtype that fp64 log-probabilities are off by 1e-15.
_CLOSE = {torch.float32: 2.0**-24, torch.float64: 2.0**-10}


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
    """Loss of each row of logits (..., V), found in fp64."""
    return _rows(input.double(), None if target is None else target.double(), options).to(arithmetic(input, target))


def _rows(input: Tensor, target: Tensor | None, options: Options) -> Tensor:
    student = torch.log_softmax(input / options.temperature, -1)
    if target is None:
        return _entropy(student)
    teacher = torch.log_softmax(target / options.temperature, -1)
    scale = options.temperature**2
    if options.kind != Kind.JS:
        p, q = (teacher, student) if options.kind == Kind.FORWARD_KL else (student, teacher)
        # By addition, which leaves q its gradient.
        return scale * _kl(p, torch.where(q < -FAR, q - math.inf, q))
    # Infinities where neither has mass must not meet.
    nothing = (teacher == -math.inf) & (student == -math.inf)
    mixture = _mixture(teacher.masked_fill(nothing, 0.0), student.masked_fill(nothing, 0.0), options.beta)
    mixture = mixture.masked_fill(nothing, -math.inf)
    return scale * (options.beta * _kl(teacher, mixture) + (1.0 - options.beta) * _kl(student, mixture))


def _mixture(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Logarithm of the mixture, from that of the more likely: of equal ones exactly that, as logaddexp's need not be."""
    excess = student - teacher
    below = excess <= 0.0
    gap = torch.where(below, excess, -excess)
    share = torch.where(below, excess.new_full((), 1.0 - beta), beta)
    return torch.where(below, teacher, student) + torch.log1p(share * torch.expm1(gap))


def _entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    # The infinity must not meet the 0, in the gradient neither.
    return -(p * log_p.masked_fill(p == 0.0, 0.0)).sum(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of p (exp(d) - 1 - d) with d = log q - log p: no term is negative, and small ones keep their digits."""
    # Where exp(d) may overflow, and where two infinities would meet, that is q.
    empty = log_p < -700.0
    d = (log_q - log_p).masked_fill(empty, 0.0)
    return torch.where(empty, log_q.exp(), log_p.exp() * (torch.expm1(d) - d)).sum(-1)


def plain(input: Tensor, target: Tensor | None, options: Options) -> Tensor | None:
    """Each row's value by the fewest differentiable operators.

    None where a class has no probability, or as good as none, and where two distributions are close.
    """
    student = torch.log_softmax(_warm(input, options), -1, dtype=torch.float64)
    if target is None:
        found = -torch.linalg.vecdot(student.exp(), student)
        return found if math.isfinite(found.detach().sum()) else None
    teacher = torch.log_softmax(_warm(target, options), -1, dtype=torch.float64)
    if options.kind == Kind.JS:
        p, q = teacher.exp(), student.exp()
        mixture = torch.lerp(q, p, options.beta).log()
        of_teacher, of_student = torch.linalg.vecdot(p, teacher - mixture), torch.linalg.vecdot(q, student - mixture)
        found = options.beta * of_teacher + (1.0 - options.beta) * of_student
    else:
        p, q = (teacher, student) if options.kind == Kind.FORWARD_KL else (student, teacher)
        difference = p - q
        found = torch.linalg.vecdot(p.exp(), difference)
        # NaN is no number below.
        if not float(difference.detach().max()) < FAR:
            return None
    if not float(found.detach().min()) >= _CLOSE[arithmetic(input, target)]:
        return None
    return found if options.temperature == 1.0 else found * options.temperature**2


def _warm(logits: Tensor, options: Options) -> Tensor:
    return logits if options.temperature == 1.0 else logits.double() / options.temperature


def reduce(rows: Tensor, options: Options) -> Tensor:
    return rows if options.divisor is None else rows.sum() / options.divisor


def divergence(input: Tensor, target: Tensor | None, options: Options) -> Tensor:
    """The reduced loss, in the dtype of arithmetic."""
    return reduce(rows(input, target, options), options)
