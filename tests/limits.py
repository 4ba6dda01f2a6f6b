"""The losses by torch's own functions, or at infinities, where these and the plain formulas give NaN, by their limits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .properties import oracles


def _reduced(values: Tensor, reduction: str, divisor: float | Tensor) -> Tensor:
    """``divisor`` is the means'."""
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / divisor


def cross_entropy(input: Tensor, target: Tensor, weight: Tensor, row_weight: Tensor, reduction: str) -> Tensor:
    rows = F.cross_entropy(input, target, weight, reduction="none") * row_weight
    divisor = row_weight
    if not target.is_floating_point():
        # Ignored rows, which all are where there is no class, do not count.
        valid = target != -100
        rows, divisor = torch.where(valid, rows, 0.0), row_weight[valid] * weight[target[valid].long()]
    return _reduced(rows, reduction, divisor.sum())


def binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, reduction: str, pos_weight: Tensor | float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Of targets that are not certain, for which a term may be 0 times infinity."""
    mask = torch.ones_like(input, dtype=torch.bool) if mask is None else mask
    x, t = torch.where(mask, input, 0.0), torch.where(mask, target, 0.0)
    values = pos_weight * t * F.softplus(-x, threshold=80.0) + (1.0 - t) * F.softplus(x, threshold=80.0)
    return _reduced(torch.where(mask, values, 0.0), reduction, mask.sum())


def vae_loss(
    recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, recon_loss: str, beta: float, reduction: str
) -> Tensor:
    if recon_loss == "mse":
        return oracles.vae_loss(recon, target, mu, logvar, recon_loss, beta, reduction)["loss"]
    parts = (
        binary_cross_entropy_with_logits(recon, target, "none"),
        oracles.gaussian_kl(mu, logvar, reduction="none"),
    )
    samples = [part.flatten(1).sum(1) if part.dim() > 1 else part for part in parts]
    divisors = [part.numel() if reduction == "mean" else recon.size(0) for part in parts]
    pixels, kl = (_reduced(s, reduction, divisor) for s, divisor in zip(samples, divisors, strict=True))
    return pixels + beta * kl


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """A class that ``p`` lacks adds 0."""
    p = log_p.exp()
    held = p != 0.0
    return (p * (torch.where(held, log_p, 0.0) - torch.where(held, log_q, 0.0))).sum(-1)


def _of_batch(rows: Tensor, reduction: str) -> Tensor:
    return _reduced(rows, reduction, rows.size(0) if reduction == "batchmean" else rows.numel())


def kl_div_with_logits(
    input: Tensor, target: Tensor, reduction: str, temperature: float = 1.0, direction: str = "forward"
) -> Tensor:
    student, teacher = (torch.log_softmax(x / temperature, -1) for x in (input, target))
    rows = _kl(teacher, student) if direction == "forward" else _kl(student, teacher)
    return _of_batch(rows * temperature**2, reduction)


def js_div_with_logits(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    student, teacher = (torch.log_softmax(x, -1) for x in (input, target))
    either = (student > -math.inf) | (teacher > -math.inf) | student.isnan() | teacher.isnan()
    middle = torch.logaddexp(*(torch.where(either, x, 0.0) for x in (student, teacher))) - math.log(2.0)
    return _of_batch(0.5 * (_kl(teacher, middle) + _kl(student, middle)), reduction)


def categorical_entropy(logits: Tensor, reduction: str) -> Tensor:
    log_p = torch.log_softmax(logits, -1)
    return _of_batch(-_kl(log_p, torch.zeros_like(log_p)), reduction)
