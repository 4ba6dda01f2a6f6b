"""Cases of the Gaussian KL divergence and negative log-likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .case import BENCH, BYTES, DOCTOR, Call, Case, table, torchs
from .draws import FLOAT32, flat


def gaussian_kl_oracle(
    mu_q: Tensor,
    logvar_q: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    reduction: str = "batchmean",
    free_bits: float | None = None,
    capacity: float | None = None,
    logvar_clamp: tuple[float, float] | None = None,
) -> Tensor:
    """The divergence by ``torch.distributions``, with the extra keywords spelled out."""
    mu_p = torch.zeros_like(mu_q) if mu_p is None else mu_p
    logvar_p = torch.zeros_like(logvar_q) if logvar_p is None else logvar_p
    if logvar_clamp is not None:
        logvar_q, logvar_p = logvar_q.clamp(*logvar_clamp), logvar_p.clamp(*logvar_clamp)
    q = torch.distributions.Normal(mu_q, (0.5 * logvar_q).exp(), validate_args=False)
    p = torch.distributions.Normal(mu_p, (0.5 * logvar_p).exp(), validate_args=False)
    kl = torch.distributions.kl_divergence(q, p)
    if free_bits is not None:
        kl = kl.clamp(min=free_bits)
    if capacity is not None:
        kl = (kl.flatten(1).sum(1) - capacity).abs() if kl.dim() > 1 else (kl - capacity).abs()
        return kl if reduction == "none" else kl.sum() if reduction == "sum" else kl.mean()
    if reduction == "none":
        return kl
    return kl.mean() if reduction == "mean" else kl.sum() / (kl.size(0) if reduction == "batchmean" else 1)


def gaussian_kl_usual(mu_q: Tensor, logvar_q: Tensor) -> Tensor:
    """The formula of most variational autoencoders, batchmean."""
    return -0.5 * torch.sum(1 + logvar_q - mu_q.pow(2) - logvar_q.exp()) / mu_q.size(0)


def gaussian_kl_usual_general(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
    """The usual formula between two Gaussians, batchmean."""
    spread = (logvar_q.exp() + (mu_q - mu_p).pow(2)) / logvar_p.exp()
    return 0.5 * torch.sum(logvar_p - logvar_q + spread - 1) / mu_q.size(0)


def _gaussians(*shape: int, general: bool = False, prior: tuple[int, ...] = (), **options: Any) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        names = ("mu_q", "logvar_q", "mu_p", "logvar_p")
        shapes = [shape, shape, prior or shape, prior or shape]
        count = 4 if general or prior else 2
        tensors = {
            name: torch.randn(size, generator=generator, device=device).to(dtype)
            for name, size in list(zip(names, shapes, strict=True))[:count]
        }
        return Call(tensors | options, tuple(tensors))

    return make


def _likelihood(*shape: int, var: tuple[int, ...] | float = (), **options: Any) -> Callable[..., Call]:
    """Means, and variances of at least a quarter."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        mean, target = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
        if isinstance(var, float):
            return Call({"input": mean, "target": target, "var": var, **options}, ("input",))
        variance = (torch.rand(var or shape, generator=generator, device=device) + 0.25).to(dtype)
        return Call({"input": mean, "target": target, "var": variance, **options}, ("input", "var"))

    return make


_case = table(gaussian_kl=gaussian_kl_oracle, gaussian_nll_loss=torchs.gaussian_nll_loss)


def gaussian_kl() -> Iterator[Case]:
    loss = "gaussian_kl"
    yield _case(loss, "standard 512 x 512", _gaussians(512, 512), BYTES)
    yield _case(loss, "standard 32 x 1024", _gaussians(32, 1024), DOCTOR)
    yield _case(loss, "general 512 x 512", _gaussians(512, 512, general=True), BYTES)
    yield _case(loss, "general 32 x 1024", _gaussians(32, 1024, general=True), DOCTOR)
    yield _case(loss, "ragged 509 x 511", _gaussians(509, 511), BYTES)
    yield _case(loss, "learned prior 61 x 33", _gaussians(61, 33, prior=(33,), reduction="mean"), DOCTOR)
    yield _case(
        loss, "free bits, capacity, clamp",
        _gaussians(17, 1001, general=True, free_bits=0.5, capacity=1200.0, logvar_clamp=(-1.0, 1.0)), DOCTOR,
    )  # fmt: skip
    yield _case(loss, "per element", _gaussians(17, 33, general=True, reduction="none"), DOCTOR)
    yield _case(loss, "standard", flat(_gaussians), BENCH, builtin=gaussian_kl_usual, dtypes=FLOAT32)
    yield _case(
        loss, "general", flat(_gaussians, general=True), BENCH, builtin=gaussian_kl_usual_general, dtypes=FLOAT32
    )  # fmt: skip
    yield _case(loss, "small batch 64 x 32", _gaussians(64, 32), BENCH, builtin=gaussian_kl_usual, dtypes=FLOAT32)


def gaussian_nll_loss() -> Iterator[Case]:
    loss = "gaussian_nll_loss"
    yield _case(loss, "elements 2**18", _likelihood(2**18), BYTES)
    yield _case(loss, "elements 2**15", _likelihood(2**15, full=True), DOCTOR)
    yield _case(loss, "clamped", _likelihood(37, 1001, eps=0.5), DOCTOR)
    yield _case(loss, "one variance a row", _likelihood(61, 257, var=(61, 1)), DOCTOR)
    yield _case(loss, "one variance", _likelihood(61, 257, var=0.3, reduction="sum"), DOCTOR)
    yield _case(loss, "per element", _likelihood(37, 53, reduction="none"), DOCTOR)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(loss, "elements", flat(_likelihood), BENCH, dtypes=(dtype,))
