"""KL divergence of diagonal Gaussians in plain PyTorch: reference, and the eager path's formulas on blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.formulas import Formulas, Scalars, register_formulas
from ...core.scratch import Scratch

NAME = "gaussian_kl"

# Bits of the flags; kernels.py reads the same.
GENERAL, CLAMPED, FREE_BITS = 1, 2, 4

_LOG2_E = math.log2(math.e)

# v^17/17! is below half a unit in the last place of fp64 for abs(v) < 0.5.
_SERIES_TERMS = 17


def expm1_excess(v: Tensor) -> Tensor:
    """exp(v) - 1 - v in fp64, to the last digit at small v, differentiable to any order."""
    small = v.abs() < 0.5
    inner = torch.where(small, v, 0.0)
    series = 1.0 + inner / _SERIES_TERMS
    for k in range(_SERIES_TERMS - 1, 2, -1):
        series = 1.0 + inner / k * series
    return torch.where(small, inner * inner * 0.5 * series, torch.expm1(v) - v)


def _clamp(logvar: Tensor, scalars: Scalars, flags: int) -> Tensor:
    return logvar.clamp(scalars[1], scalars[2]) if flags & CLAMPED else logvar


def reference(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor | None, logvar_p: Tensor | None, scalars: Scalars, flags: int
) -> Tensor:
    dtype = _result_dtype(mu_q, logvar_q, mu_p, logvar_p)
    v = _clamp(logvar_q.double(), scalars, flags)
    distance = mu_q.double() if mu_p is None else mu_q.double() - mu_p.double()
    square = distance.square()
    if logvar_p is not None:
        prior = _clamp(logvar_p.double(), scalars, flags)
        v, square = v - prior, (distance * _inverse_deviation(prior)).square()
    # In fp64 the plain difference keeps all the digits that fp32 can show, down to a log-variance of 1e-8.
    excess = expm1_excess(v) if dtype == torch.float64 else torch.expm1(v) - v
    kl = 0.5 * (excess + square)
    if flags & FREE_BITS:
        kl = torch.where(kl <= scalars[0], scalars[0], kl)
    return kl.to(dtype)


def plain_sum(mu: Tensor, logvar: Tensor) -> Tensor:
    """Sum of the standard divergences of operands in fp32 or half precision, by the fewest differentiable operators."""
    v, mu = logvar.double(), mu.float()
    return ((torch.expm1(v) - v).sum() + mu.square().sum()) * 0.5


def _result_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def value(
    mu_q: Tensor,
    logvar_q: Tensor,
    mu_p: Tensor | None,
    logvar_p: Tensor | None,
    scalars: Scalars,
    flags: int,
    scratch: Scratch,
) -> Tensor:
    if _result_dtype(mu_q, logvar_q, mu_p, logvar_p) == torch.float64:
        return reference(mu_q, logvar_q, mu_p, logvar_p, scalars, flags)
    v, square, _ = _differences(mu_q, logvar_q, mu_p, logvar_p, scalars, flags, scratch)
    kl = torch.expm1(v, out=scratch.take("excess", v.shape, torch.float64, v.device)).sub_(v).add_(square).mul_(0.5)
    return kl.clamp_(min=scalars[0]).float() if flags & FREE_BITS else kl.float()


def _differences(
    mu_q: Tensor,
    logvar_q: Tensor,
    mu_p: Tensor | None,
    logvar_p: Tensor | None,
    scalars: Scalars,
    flags: int,
    scratch: Scratch,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Difference of the log-variances in fp64; in fp32 the square of the means' in units of p's deviation, and 1 / that."""
    v = _clamp(scratch.cast("logvar_q", logvar_q, torch.float32), scalars, flags)
    prior = None
    if logvar_p is not None:
        prior = _clamp(scratch.cast("logvar_p", logvar_p, torch.float32), scalars, flags)
        v = _subtract(v, prior, "difference", scratch)
    wide = scratch.take("v", v.shape, torch.float64, v.device).copy_(v)
    distance = scratch.cast("mu_q", mu_q, torch.float32)
    if mu_p is not None:
        distance = _subtract(distance, scratch.cast("mu_p", mu_p, torch.float32), "distance", scratch)
    square = scratch.take("square", v.shape, torch.float32, v.device)
    if prior is None:
        return wide, torch.mul(distance, distance, out=square), None
    inverse = _inverse_deviation(prior, scratch.take("inverse", v.shape, torch.float32, v.device))
    return wide, torch.mul(distance, inverse, out=square).square_(), inverse


def _subtract(a: Tensor, b: Tensor, name: str, scratch: Scratch) -> Tensor:
    return torch.sub(a, b, out=scratch.take(name, a.shape, a.dtype, a.device))


# exp of this is the last that is finite, in each dtype of arithmetic.
_LAST = {torch.float32: 88.0, torch.float64: 709.0}


def _inverse_deviation(logvar: Tensor, out: Tensor | None = None) -> Tensor:
    """exp(-logvar / 2), finite, so that equal means are at distance 0 from a Gaussian however narrow."""
    if out is None:
        return torch.exp((logvar * -0.5).clamp(max=_LAST[logvar.dtype]))
    return torch.mul(logvar, -0.5, out=out).clamp_(max=_LAST[logvar.dtype]).exp_()


# Mean excess above which the rounding of exp in fp64, 1e-16 an element, does not show in fp32.
_PLAIN_ABOVE = 1e-6

# Elements below which an operator less is worth more than a quicker exponential.
_FEW = 2**13


def total(
    mu_q: Tensor,
    logvar_q: Tensor,
    mu_p: Tensor | None,
    logvar_p: Tensor | None,
    scalars: Scalars,
    flags: int,
    scratch: Scratch,
    saved: Sequence[Tensor] = (),
) -> Tensor | float:
    """Sum of the values: exp2 in fp64 takes a third of the time of expm1, and subtracting sums saves passes."""
    wide = _result_dtype(mu_q, logvar_q, mu_p, logvar_p) == torch.float64
    if flags & FREE_BITS or wide or mu_q.device.type != "cpu":
        return value(mu_q, logvar_q, mu_p, logvar_p, scalars, flags, scratch).sum()
    v, square, inverse = _differences(mu_q, logvar_q, mu_p, logvar_p, scalars, flags, scratch)
    growth, excess = scratch.take("growth in fp64", v.shape, torch.float64, v.device), 0.0
    tiny = v.numel() < _FEW
    if not tiny:
        excess = torch.mul(v, _LOG2_E, out=growth).exp2_().sub_(1.0).sum().item() - v.sum().item()
        tiny = excess < _PLAIN_ABOVE * v.numel()
    if tiny:
        torch.expm1(v, out=growth)
    if saved:
        saved[0].copy_(growth)
        if inverse is not None:
            saved[1].copy_(inverse)
    if tiny:
        excess = growth.sub_(v).sum().item()
    return (excess + square.sum().item()) * 0.5


def gradient(
    mu_q: Tensor,
    logvar_q: Tensor,
    mu_p: Tensor | None,
    logvar_p: Tensor | None,
    scalars: Scalars,
    flags: int,
    scratch: Scratch,
    grad: Tensor | float,
    outputs: Sequence[Tensor | None],
    saved: Sequence[Tensor] = (),
) -> None:
    dmu_q, dlogvar_q, dmu_p, dlogvar_p = outputs
    dtype = _result_dtype(mu_q, logvar_q, mu_p, logvar_p)
    if flags & FREE_BITS:
        # Not so NaN, which shows in the loss too.
        free = value(mu_q, logvar_q, mu_p, logvar_p, scalars, flags & ~FREE_BITS, scratch) <= scalars[0]
        grad = torch.where(free, 0.0, torch.as_tensor(grad, dtype=dtype, device=free.device))
    distance = scratch.cast("mu_q", mu_q, dtype)
    if mu_p is not None:
        distance = _subtract(distance, scratch.cast("mu_p", mu_p, dtype), "distance", scratch)
    growth, inverse = (*saved, None, None)[:2]
    if growth is None:
        growth, inverse = _growth(logvar_q, logvar_p, scalars, flags, dtype, scratch)
    if inverse is not None:
        distance = torch.mul(distance, inverse, out=scratch.take("scaled", distance.shape, dtype, distance.device))
    if dlogvar_p is not None:
        torch.mul(distance, distance, out=dlogvar_p).add_(growth).mul_(grad * -0.5)
    if dlogvar_q is not None:
        torch.mul(growth, grad * 0.5, out=dlogvar_q)
    if dmu_q is not None or dmu_p is not None:
        first, second = (dmu_q, dmu_p) if dmu_q is not None else (dmu_p, None)
        assert first is not None
        torch.mul(distance, grad if dmu_q is not None else -grad, out=first)
        if inverse is not None:
            first.mul_(inverse)
        if second is not None:
            torch.neg(first, out=second)
    if flags & CLAMPED:
        for name, d, logvar in (("logvar_q", dlogvar_q, logvar_q), ("logvar_p", dlogvar_p, logvar_p)):
            if d is not None and logvar is not None:
                wide = scratch.cast(name, logvar, dtype)
                d.mul_((wide >= scalars[1]) & (wide <= scalars[2]))


def _growth(
    logvar_q: Tensor, logvar_p: Tensor | None, scalars: Scalars, flags: int, dtype: torch.dtype, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """exp(v) - 1 for the difference v of the log-variances, and the inverse of p's deviation."""
    v, inverse = _clamp(scratch.cast("logvar_q", logvar_q, dtype), scalars, flags), None
    if logvar_p is not None:
        prior = _clamp(scratch.cast("logvar_p", logvar_p, dtype), scalars, flags)
        v = _subtract(v, prior, "difference", scratch)
        inverse = _inverse_deviation(prior, scratch.take("inverse", v.shape, dtype, v.device))
    return torch.expm1(v, out=scratch.take("growth", v.shape, dtype, v.device)), inverse


def _saves(flags: int) -> int:
    return 0 if flags & FREE_BITS else 2 if flags & GENERAL else 1


def _kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.gaussian_kl_value, kernels.gaussian_kl_gradient


register_formulas(NAME, Formulas(_kernels, reference, value, total, gradient, _saves))
