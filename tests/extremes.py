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
    """``limit``: the exact loss, and the gradients of the operands, in a dtype that holds them.

    ``documented`` says why ``instead`` comes out, where that is not the limit.
    """

    where: str
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    operands: tuple[Tensor, ...]
    limit: tuple[list[float], ...]
    documented: str = ""
    instead: tuple[list[float], ...] = ()

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


def _pairs(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    """The discriminator's loss in the usual way."""
    if kind == "relativistic":
        return F.binary_cross_entropy_with_logits(real - fake, torch.ones_like(real), reduction="none")
    if kind in ("minimax", "non_saturating"):
        of_real = F.binary_cross_entropy_with_logits(real, torch.ones_like(real), reduction="none")
        return of_real + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake), reduction="none")
    if kind == "lsgan":
        return 0.5 * (real - 1.0).square() + 0.5 * fake.square()
    return F.relu(1.0 - real) + F.relu(1.0 + fake) if kind == "hinge" else fake - real


def _game(kind: str, real: float, fake: float, *limit: float) -> Extreme:
    return Extreme(
        f"gan_discriminator_loss, {kind}, scores {real:g} and {fake:g}",
        lambda a, b: gk.gan_discriminator_loss(a, b, kind, reduction="none"),
        lambda a, b: _pairs(a, b, kind),
        (_numbers(real), _numbers(fake)),
        tuple([value] for value in limit),
    )


def _generated(kind: str, score: float, *limit: float) -> Extreme:
    usual = {"lsgan": lambda x: 0.5 * (x - 1.0).square(), "relativistic": lambda x: _pairs(x, torch.zeros_like(x), kind)}
    real = torch.zeros(1) if kind == "relativistic" else None
    return Extreme(
        f"gan_generator_loss, {kind}, score {score:g}",
        lambda fake: gk.gan_generator_loss(fake, kind, real=real, reduction="none"),
        usual.get(kind, lambda x: -x),
        (_numbers(score),),
        tuple([value] for value in limit),
    )


def _regression(loss: str, values: list[float], dtype: torch.dtype, *limit: list[float]) -> Extreme:
    shown = " and ".join(f"{value:g}" for value in values)
    target = torch.zeros(len(values), dtype=dtype)
    return Extreme(
        f"{loss}, differences of {shown}" + (" in fp16" if dtype == torch.float16 else ""),
        lambda x: getattr(gk, loss)(x, target),
        lambda x: getattr(F, loss)(x, target),
        (_numbers(*values, dtype=dtype),),
        limit,
    )


def _of_probability(probability: float, label: float, limit: tuple[float, ...], instead: tuple[float, ...] = ()) -> Extreme:
    target = _numbers(label)
    return Extreme(
        f"binary_cross_entropy, probability {probability:g}, target {label:g}",
        lambda x: gk.binary_cross_entropy(x, target, reduction="none"),
        lambda x: F.binary_cross_entropy(x, target, reduction="none"),
        (_numbers(probability),),
        tuple([value] for value in limit),
        "as torch: no logarithm below -100, no divisor below 1e-12" if instead else "",
        tuple([value] for value in instead),
    )


def _angle(size: float, added: float) -> tuple[list[float], list[float]]:
    """The loss between (size, size) and (size, 0), and the gradient of the first, with that much added to their squares."""
    first, second = 2.0 * size**2 + added, size**2 + added
    norms = math.sqrt(first * second)
    along, towards = size**3 / (first * norms), size / norms
    return [1.0 - size**2 / norms], [along - towards, along]


def _cosine(size: float) -> Extreme:
    x, other = torch.tensor([[size, size]], dtype=torch.float16), torch.tensor([[size, 0.0]], dtype=torch.float16)
    target, held = torch.ones(1), x[0, 0].item()
    return Extreme(
        f"cosine_embedding_loss, fp16 vectors ({size:g}, {size:g}) and ({size:g}, 0)",
        lambda x: gk.cosine_embedding_loss(x, other, target, reduction="sum"),
        lambda x: F.cosine_embedding_loss(x, other, target, reduction="sum"),
        (x,),
        _angle(held, 0.0),
        "as torch: 1e-12 added to each square",
        _angle(held, 1e-12),
    )


def _variational(logit: float, logvar: float, *limit: float) -> Extreme:
    """One pixel, whose target is 1, and one latent, whose mean is 0."""
    one = torch.ones(1, 1)
    return Extreme(
        f"vae_loss, logit {logit:g}, target 1, log-variance {logvar:g}",
        lambda x, v: gk.vae_loss(x, one, 0.0 * one, v, recon_loss="bce_with_logits").loss,
        lambda x, v: F.binary_cross_entropy_with_logits(x, one, reduction="sum") + _usual_kl(0.0 * one, v).sum(),
        (torch.tensor([[logit]]), torch.tensor([[logvar]])),
        tuple([value] for value in limit),
    )


def _given(log_probability: float, target: float, limit: list[float], instead: tuple[list[float], ...] = ()) -> Extreme:
    given = _numbers(target)
    return Extreme(
        f"kl_div, log-probability {log_probability:g}, target {target:g}",
        lambda x: gk.kl_div(x, given, reduction="sum"),
        lambda x: F.kl_div(x, given, reduction="sum"),
        (_numbers(log_probability),),
        (limit, [-target]),
        "as torch: 0 times -inf; kl_div_with_logits gives the limit" if instead else "",
        instead,
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
    for kind in ("minimax", "non_saturating", "hinge", "relativistic"):
        yield _game(kind, INF, -INF, 0.0, 0.0, 0.0)
        yield _game(kind, -INF, INF, INF, -1.0, 1.0)
    yield _game("wasserstein", INF, 0.0, -INF, -1.0, 1.0)
    yield _game("lsgan", 1e20, 0.0, INF, 1e20, 0.0)
    yield _generated("lsgan", 1e20, INF, 1e20)
    yield _generated("hinge", INF, -INF, -1.0)
    yield _generated("wasserstein", INF, -INF, -1.0)
    yield _generated("relativistic", INF, 0.0, 0.0)
    yield _generated("relativistic", -INF, INF, -1.0)
    yield _variational(INF, 0.0, 0.0, 0.0, 0.0)
    yield _variational(-INF, 0.0, INF, -1.0, 0.0)
    yield _variational(INF, -INF, INF, 0.0, -0.5)
    yield _variational(INF, small, 0.5 * (math.expm1(small) - small), 0.0, 0.5 * math.expm1(small))
    yield _given(-INF, 1.0, [INF])
    yield _given(-100.0, 0.0, [0.0])
    yield _given(-INF, 0.0, [0.0], ([NAN], [0.0]))
    yield Extreme(
        "contrastive_divergence_loss, energies 3e38 and 0",
        gk.contrastive_divergence_loss,
        lambda a, b: a.mean() - b.mean() + 0.0 * (a.square().mean() + b.square().mean()),
        (_numbers(3e38), _numbers(0.0)),
        ([3e38], [1.0], [-1.0]),
    )
    half = torch.float16
    yield _regression("mse_loss", [256.0, 0.0], half, [32768.0], [256.0, 0.0])
    yield _regression("mse_loss", [1e20], torch.float32, [INF], [2e20])
    yield _regression("l1_loss", [INF], torch.float32, [INF], [1.0])
    yield _regression("smooth_l1_loss", [3e38], torch.float32, [3e38], [1.0])
    yield _regression("smooth_l1_loss", [INF], torch.float32, [INF], [1.0])
    yield _regression("huber_loss", [3e38], torch.float32, [3e38], [1.0])
    yield _regression("huber_loss", [-INF], torch.float32, [INF], [-1.0])
    yield Extreme(
        "gaussian_nll_loss, difference 0, variance 0",
        lambda x, v: gk.gaussian_nll_loss(x, torch.zeros(1), v),
        lambda x, v: F.gaussian_nll_loss(x, torch.zeros(1), v),
        (_numbers(0.0), _numbers(0.0)),
        ([-INF], [0.0], [INF]),
        "as torch: no variance below 1e-6, and none of the clamp in the gradient",
        ([0.5 * math.log(1e-6)], [0.0], [0.5e6]),
    )
    yield _of_probability(0.0, 0.0, (0.0, 1.0), (0.0, 0.0))
    yield _of_probability(0.0, 1.0, (INF, -INF), (100.0, -1e12))
    yield _of_probability(1e-30, 1.0, (-math.log(1e-30), -1e30), (-math.log(1e-30), -1e12))
    yield _cosine(1e-4)
    yield _cosine(300.0)
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
    titles = [
        "loss and where",
        "torch",
        "its gradient",
        "genloss_kernels",
        "its gradient",
        "limit",
        "its gradient",
        "if not it",
    ]
    lines = [titles, ["---"] * len(titles)]
    for row in EXTREMES:
        found: list[Any] = [results(loss, row.operands) for loss in (row.torchs, row.ours)]
        lines.append([row.where, *(text for numbers in (*found, row.limit) for text in _shown(numbers)), row.documented])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table())
