"""Infinities and extremes: what torch gives, what this library gives, and the exact limit.

    python -m tests.extremes > benchmarks/results/extremes.md

The rows are those of tests/test_extremes.py, which holds both paths to the limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import genloss_kernels as gk

INF, NAN = math.inf, math.nan


class Extreme(NamedTuple):
    """``limit``: the exact loss, and the gradients of the operands, in a dtype that holds them."""

    where: str
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    operands: tuple[Tensor, ...]
    limit: tuple[list[float], ...]

    def __str__(self) -> str:
        return self.where


def results(loss: Callable[..., Tensor], operands: tuple[Tensor, ...]) -> tuple[list[float], ...]:
    """The loss and the gradient of each operand, flat."""
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value.sum(), leaves)
    return tuple(t.detach().double().flatten().tolist() for t in (value, *gradients))


def _numbers(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _usual_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1.0 + logvar - mu.square() - logvar.exp())


def _labelled(logits: list[float], label: int, where: str, *limit: list[float]) -> Extreme:
    target = torch.tensor([label])
    return Extreme(
        f"cross_entropy, {where}",
        lambda x: gk.cross_entropy(x.unsqueeze(0), target, reduction="sum"),
        lambda x: F.cross_entropy(x.unsqueeze(0), target, reduction="sum"),
        (_numbers(*logits),),
        limit,
    )


def _binary(logit: float, label: float, *limit: float) -> Extreme:
    target = _numbers(label)
    return Extreme(
        f"binary_cross_entropy_with_logits, logit {logit:g}, target {label:g}",
        lambda x: gk.binary_cross_entropy_with_logits(x, target, reduction="none"),
        lambda x: F.binary_cross_entropy_with_logits(x, target, reduction="none"),
        (_numbers(logit),),
        tuple([value] for value in limit),
    )


def _gaussian(mu: float, logvar: float, *limit: float) -> Extreme:
    return Extreme(
        f"gaussian_kl, mean {mu:g}, log-variance {logvar:g}",
        lambda m, v: gk.gaussian_kl(m, v, reduction="none"),
        _usual_kl,
        (_numbers(mu), _numbers(logvar)),
        tuple([value] for value in limit),
    )


def _penalty(loss: str, values: list[float], dtype: torch.dtype, where: str, *limit: list[float]) -> Extreme:
    def usual(grad: Tensor) -> Tensor:
        squares = grad.flatten(1).square().sum(1)
        return 5.0 * squares if loss == "r1_penalty" else (squares.sqrt() - 1.0).square()

    return Extreme(
        f"{loss}, {where}",
        lambda grad: getattr(gk, loss)(grad, reduction="sum"),
        usual,
        (torch.tensor([values], dtype=dtype),),
        limit,
    )


def _scores(kind: str, score: float, *limit: float) -> Extreme:
    # The usual way: a target of ones or zeros.
    def usual(fake: Tensor) -> Tensor:
        ones = torch.ones_like(fake)
        if kind == "non_saturating":
            return F.binary_cross_entropy_with_logits(fake, ones, reduction="none")
        return -F.binary_cross_entropy_with_logits(fake, 0.0 * ones, reduction="none")

    return Extreme(
        f"gan_generator_loss, {kind}, score {score:g}",
        lambda fake: gk.gan_generator_loss(fake, kind, reduction="none"),
        usual,
        (_numbers(score),),
        tuple([value] for value in limit),
    )


def _distilled(student: list[float], teacher: list[float], where: str, *limit: list[float]) -> Extreme:
    def usual(x: Tensor) -> Tensor:
        return F.kl_div(torch.log_softmax(x, -1), torch.softmax(torch.tensor([teacher]), -1), reduction="sum")

    return Extreme(
        f"kl_div_with_logits, {where}",
        lambda x: gk.kl_div_with_logits(x, torch.tensor([teacher]), reduction="sum"),
        usual,
        (torch.tensor([student]),),
        limit,
    )


def extremes() -> Iterator[Extreme]:
    yield _labelled([3e38, 0.0], 0, "a logit of 3e38 at the target", [0.0], [0.0, 0.0])
    yield _labelled([-INF, 0.0], 1, "a logit of -inf elsewhere", [0.0], [0.0, 0.0])
    yield _labelled([-INF, 0.0], 0, "a logit of -inf at the target", [INF], [-1.0, 1.0])
    yield _labelled([NAN, 0.0], -100, "an ignored row that holds NaN", [0.0], [0.0, 0.0])
    yield _binary(INF, 1.0, 0.0, 0.0)
    yield _binary(-INF, 0.0, 0.0, 0.0)
    yield _binary(INF, 0.0, INF, 1.0)
    yield _binary(-INF, 1.0, INF, -1.0)
    yield _binary(-200.0, 0.0, math.exp(-200.0), 0.0)
    small = 1e-4
    yield _gaussian(0.0, small, 0.5 * (math.expm1(small) - small), 0.0, 0.5 * math.expm1(small))
    yield _gaussian(0.0, -INF, INF, 0.0, -0.5)
    yield _gaussian(1e20, 0.0, INF, 1e20, 0.0)
    yield _distilled([0.0, -INF], [0.0, -INF], "a class that neither has", [0.0], [0.0, 0.0])
    yield _distilled([1.0, 1.0], [0.0, -INF], "a class that the teacher lacks", [math.log(2.0)], [-0.5, 0.5])
    yield Extreme(
        "js_div_with_logits, no class in common",
        lambda x: gk.js_div_with_logits(x, torch.tensor([[200.0, 0.0]]), reduction="sum"),
        lambda x: _usual_js(x, torch.tensor([[200.0, 0.0]])),
        (torch.tensor([[0.0, 200.0]]),),
        ([math.log(2.0)], [0.0, 0.0]),
    )
    yield Extreme(
        "categorical_entropy, a logit of -inf",
        gk.categorical_entropy,
        lambda x: -(torch.softmax(x, -1) * torch.log_softmax(x, -1)).sum(-1),
        (torch.tensor([[0.0, 0.0, -INF]]),),
        ([math.log(2.0)], [0.0, 0.0, 0.0]),
    )
    yield _scores("non_saturating", INF, 0.0, 0.0)
    yield _scores("non_saturating", -INF, INF, -1.0)
    yield _scores("minimax", -INF, 0.0, 0.0)
    half = torch.float16
    yield _penalty("gradient_penalty", [0.0, 0.0], torch.float32, "norm 0", [1.0], [0.0, 0.0])
    norm = 1000.0
    yield _penalty("gradient_penalty", [600.0, 800.0], torch.float32, "norm 1000", [(norm - 1.0) ** 2], [1198.8, 1598.4])
    yield _penalty("gradient_penalty", [3e-30, 4e-30], torch.float32, "norm 5e-30", [1.0], [-1.2, -1.6])
    yield _penalty("r1_penalty", [48.0, 64.0], half, "norm 80 in fp16", [32000.0], [480.0, 640.0])


def _usual_js(x: Tensor, t: Tensor) -> Tensor:
    p, q = torch.softmax(x, -1), torch.softmax(t, -1)
    m = torch.log(0.5 * (p + q))
    return 0.5 * ((p * (p.log() - m)).sum(-1) + (q * (q.log() - m)).sum(-1))


EXTREMES = tuple(extremes())


def _shown(numbers: tuple[list[float], ...]) -> list[str]:
    value, *gradients = (", ".join(f"{number:.6g}" for number in part) for part in numbers)
    return [value, "; ".join(gradients)]


def table() -> str:
    titles = ["loss and where", "torch", "its gradient", "genloss_kernels", "its gradient", "limit", "its gradient"]
    lines = [titles, ["---"] * len(titles)]
    for row in EXTREMES:
        found: list[Any] = [results(loss, row.operands) for loss in (row.torchs, row.ours)]
        lines.append([row.where, *(text for numbers in (*found, row.limit) for text in _shown(numbers))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table())
