"""The losses that torch lacks, or has with fewer options, by their definitions in torch's operators."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _reduced(values: Tensor, reduction: str, divisor: float | Tensor) -> Tensor:
    """``divisor`` is the mean's."""
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / divisor


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    return_stats: bool = False,
) -> dict[str, Tensor]:
    y = input.movedim(min(1, input.dim() - 1), -1) * logit_scale
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    n_classes, lse, log_p = y.size(-1), torch.logsumexp(y, -1), torch.log_softmax(y, -1)
    weight = y.new_ones(n_classes) if weight is None else weight
    row_weight = torch.ones_like(lse) if row_weight is None else row_weight
    if target.is_floating_point():
        t, valid = target.movedim(min(1, target.dim() - 1), -1), torch.ones_like(lse, dtype=torch.bool)
        normalizer = row_weight
    else:
        valid = target != ignore_index
        label = torch.where(valid, target, 0).long()
        t, normalizer = F.one_hot(label, n_classes).to(y), weight[label] * row_weight
    q = weight * ((1.0 - label_smoothing) * t + label_smoothing / n_classes)
    rows = row_weight * (z_loss * lse.square() - (q * log_p).sum(-1))
    divisor = torch.where(valid, normalizer, 0.0).sum() if divisor is None else divisor
    found = {"loss": _reduced(torch.where(valid, rows, 0.0), reduction, divisor)}
    if return_stats:
        statistics = {"lse": lse, "log_prob": (t * log_p).sum(-1), "entropy": -(log_p.exp() * log_p).sum(-1)}
        found |= {name: torch.where(valid, s, 0.0) for name, s in statistics.items()}
        found |= {"n_valid": valid.sum(), "n_correct": (valid & (y.argmax(-1) == t.argmax(-1))).sum()}
    return found


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    row_weight: Tensor | None = None,
    options: Any = None,
    **rest: Any,
) -> dict[str, Tensor]:
    """Logits in the dtype of the product and what follows in float32 at least; ``options`` make no difference."""
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias).unflatten(-1, linear_weight.shape[:-1])
    at, to = input.dim() - 1, min(1, input.dim() - 1)
    logits = (logits.float() if logits.dtype.itemsize == 2 else logits).movedim(at, to)
    if target.is_floating_point():
        target = target.movedim(at, to)
    return cross_entropy(
        logits, target, ignore_index=-100 if ignore_index is None else ignore_index, row_weight=row_weight, **rest
    )


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    t = (1.0 - label_smoothing) * target + 0.5 * label_smoothing
    values = F.binary_cross_entropy_with_logits(input, t, weight, pos_weight=pos_weight, reduction="none")
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.expand(values.shape)
    return _reduced(torch.where(kept, values, 0.0), reduction, kept.sum())


def gaussian_kl(
    mu_q: Tensor,
    logvar_q: Tensor,
    mu_p: Tensor | float = 0.0,
    logvar_p: Tensor | None = None,
    reduction: str = "batchmean",
    free_bits: float | None = None,
    capacity: float | None = None,
    logvar_clamp: tuple[float, float] | None = None,
) -> Tensor:
    logvar_p = torch.zeros_like(logvar_q) if logvar_p is None else logvar_p
    if logvar_clamp is not None:
        logvar_q, logvar_p = logvar_q.clamp(*logvar_clamp), logvar_p.clamp(*logvar_clamp)
    v = logvar_q - logvar_p
    kl = 0.5 * (torch.expm1(v) - v + (mu_q - mu_p).square() * torch.exp(-logvar_p))
    if free_bits is not None:
        kl = torch.where(kl > free_bits, kl, free_bits)
    if capacity is not None:
        kl = (kl.sum(tuple(range(1, kl.dim()))) if kl.dim() > 1 else kl) - capacity
        return _reduced(kl.abs(), reduction, kl.size(0))
    return _reduced(kl, reduction, kl.size(0) if reduction == "batchmean" else kl.numel())


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """By the definition, which says what to expect of other dtypes; in float64 to the digits of close distributions too."""
    excess = log_p - log_q
    terms = log_p.exp() * excess
    # Less the first order of each term, all of which sum to 0.
    return (terms - log_q.exp() * torch.expm1(excess) if terms.dtype == torch.float64 else terms).sum(-1)


def kl_div_with_logits(
    input: Tensor, target: Tensor, temperature: float = 1.0, direction: str = "forward", reduction: str = "batchmean"
) -> Tensor:
    student, teacher = (torch.log_softmax(x / temperature, -1) for x in (input, target))
    rows = _kl(teacher, student) if direction == "forward" else _kl(student, teacher)
    return _by_batch(input, rows * temperature**2, reduction)


def js_div_with_logits(
    input: Tensor, target: Tensor, beta: float = 0.5, temperature: float = 1.0, reduction: str = "batchmean"
) -> Tensor:
    student, teacher = (torch.log_softmax(x / temperature, -1) for x in (input, target))
    ours, theirs = student.new_tensor(math.log1p(-beta)), student.new_tensor(math.log(beta))
    # Less the rounding of weights that sum to 1: of one class alone the middle is exactly that.
    middle = torch.logaddexp(teacher + theirs, student + ours) - torch.logaddexp(theirs, ours)
    rows = beta * _kl(teacher, middle) + (1.0 - beta) * _kl(student, middle)
    return _by_batch(input, rows * temperature**2, reduction)


def categorical_entropy(logits: Tensor, reduction: str = "none") -> Tensor:
    log_p = torch.log_softmax(logits, -1)
    return _by_batch(logits, -(log_p.exp() * log_p).sum(-1), reduction)


def _by_batch(logits: Tensor, rows: Tensor, reduction: str) -> Tensor:
    return _reduced(rows, reduction, logits.size(0) if reduction == "batchmean" else rows.numel())


def vae_loss(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    recon_loss: str = "mse",
    beta: float | Tensor = 1.0,
    reduction: str = "batchmean",
    free_bits: float | None = None,
    capacity: float | None = None,
) -> dict[str, Tensor]:
    losses = {"mse": F.mse_loss, "l1": F.l1_loss, "bce": F.binary_cross_entropy}
    pixels = losses.get(recon_loss, binary_cross_entropy_with_logits)(recon, target, reduction="none")
    values = gaussian_kl(mu, logvar, reduction="none", free_bits=free_bits)
    samples = [x.sum(tuple(range(1, x.dim()))) if x.dim() > 1 else x for x in (pixels, values)]
    if capacity is not None:
        samples[1] = (samples[1] - capacity).abs()
    elements = [pixels.numel(), values.numel() if capacity is None else values.size(0)]
    divisors = elements if reduction == "mean" else [recon.size(0)] * 2
    part, kl = (_reduced(x, reduction, divisor) for x, divisor in zip(samples, divisors, strict=True))
    return {"loss": part + beta * kl, "recon": part, "kl": kl}


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=80.0)


_DISCRIMINATOR = {
    "minimax": (lambda r: _softplus(-r), _softplus),
    "non_saturating": (lambda r: _softplus(-r), _softplus),
    "lsgan": (lambda r: (r - 1.0).square() / 2.0, lambda f: f.square() / 2.0),
    "hinge": (lambda r: F.relu(1.0 - r), lambda f: F.relu(1.0 + f)),
    "wasserstein": (lambda r: -r, lambda f: f),
}

_GENERATOR = {
    "minimax": lambda f: -_softplus(f),
    "non_saturating": lambda f: _softplus(-f),
    "lsgan": lambda f: (f - 1.0).square() / 2.0,
    "hinge": lambda f: -f,
    "wasserstein": lambda f: -f,
}


def gan_discriminator_loss(real: Tensor, fake: Tensor, kind: str = "non_saturating", reduction: str = "mean") -> Tensor:
    if kind == "relativistic":
        return _reduced(_softplus(fake - real), reduction, real.numel())
    of_real, of_fake = _DISCRIMINATOR[kind]
    return _reduced(of_real(real), reduction, real.numel()) + _reduced(of_fake(fake), reduction, fake.numel())


def gan_generator_loss(
    fake: Tensor, kind: str = "non_saturating", real: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    return _reduced(_softplus(real - fake) if real is not None else _GENERATOR[kind](fake), reduction, fake.numel())


def gradient_penalty(grad: Tensor, target: float = 1.0, reduction: str = "mean") -> Tensor:
    norms = torch.linalg.vector_norm(grad.reshape(grad.size(0), math.prod(grad.shape[1:])), dim=1)
    return _reduced((norms - target).square(), reduction, grad.size(0))


def r1_penalty(grad: Tensor, gamma: float = 10.0, reduction: str = "mean") -> Tensor:
    squares = grad.square().sum(tuple(range(1, grad.dim()))) if grad.dim() > 1 else grad.square()
    return _reduced(0.5 * gamma * squares, reduction, grad.size(0))


def contrastive_divergence_loss(
    positive_energy: Tensor, negative_energy: Tensor, l2: float = 0.0, reduction: str = "mean"
) -> Tensor:
    first = _reduced(positive_energy + l2 * positive_energy.square(), reduction, positive_energy.numel())
    return first + _reduced(l2 * negative_energy.square() - negative_energy, reduction, negative_energy.numel())
