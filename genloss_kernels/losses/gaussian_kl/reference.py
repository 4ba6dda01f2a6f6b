"""KL divergence of diagonal Gaussians in plain PyTorch: reference, and the eager path's formulas on blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.elementwise_op import Formulas, Scalars, register_formulas

NAME = "gaussian_kl"

# Bits of the flags; kernels.py reads the same.
GENERAL, CLAMPED, FREE_BITS = 1, 2, 4

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
        v, square = v - prior, square * torch.exp(-prior)
    # In fp64 the plain difference keeps all the digits that fp32 can show, down to a log-variance of 1e-8.
    excess = expm1_excess(v) if dtype == torch.float64 else torch.expm1(v) - v
    kl = 0.5 * (excess + square)
    if flags & FREE_BITS:
        kl = torch.where(kl > scalars[0], kl, scalars[0] + 0.0 * kl.detach())
    return kl.to(dtype)


def _result_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def value(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor | None, logvar_p: Tensor | None, scalars: Scalars, flags: int
) -> Tensor:
    if _result_dtype(mu_q, logvar_q, mu_p, logvar_p) == torch.float64:
        return reference(mu_q, logvar_q, mu_p, logvar_p, scalars, flags)
    v, square = _differences(mu_q, logvar_q, mu_p, logvar_p, scalars, flags)
    kl = (torch.expm1(v).sub_(v) + square).mul_(0.5)
    return kl.clamp_(min=scalars[0]).float() if flags & FREE_BITS else kl.float()


def _differences(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor | None, logvar_p: Tensor | None, scalars: Scalars, flags: int
) -> tuple[Tensor, Tensor]:
    """Difference of the log-variances in fp64, and the square of the means' in units of p's variance in fp32."""
    v = _clamp(logvar_q.double(), scalars, flags)
    distance = mu_q.float() if mu_p is None else mu_q.float() - mu_p.float()
    square = distance * distance
    if logvar_p is None:
        return v, square
    prior = _clamp(logvar_p.float(), scalars, flags)
    return v - prior, square * torch.neg(prior).exp_()


# Mean excess above which the rounding of exp in fp64, 1e-16 an element, does not show in fp32.
_PLAIN_ABOVE = 1e-6


def total(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor | None, logvar_p: Tensor | None, scalars: Scalars, flags: int
) -> Tensor:
    """Sum of the values: exp takes a sixth of the time of expm1, and adding first and subtracting last saves passes."""
    if flags & FREE_BITS or _result_dtype(mu_q, logvar_q, mu_p, logvar_p) == torch.float64:
        return value(mu_q, logvar_q, mu_p, logvar_p, scalars, flags).sum()
    v, square = _differences(mu_q, logvar_q, mu_p, logvar_p, scalars, flags)
    if v.shape != square.shape:
        v, square = torch.broadcast_tensors(v, square)
    excess = torch.exp(v).sum() - v.sum() - v.numel()
    if v.device.type != "cpu" or float(excess) < _PLAIN_ABOVE * v.numel():
        excess = torch.expm1(v).sub_(v).sum()
    return (excess + square.sum()) * 0.5


def gradient(
    mu_q: Tensor,
    logvar_q: Tensor,
    mu_p: Tensor | None,
    logvar_p: Tensor | None,
    scalars: Scalars,
    flags: int,
    grad: Tensor | float,
    outputs: Sequence[Tensor | None],
) -> None:
    dmu_q, dlogvar_q, dmu_p, dlogvar_p = outputs
    dtype = _result_dtype(mu_q, logvar_q, mu_p, logvar_p)
    if flags & FREE_BITS:
        pays = value(mu_q, logvar_q, mu_p, logvar_p, scalars, flags & ~FREE_BITS) > scalars[0]
        grad = torch.where(pays, torch.as_tensor(grad, dtype=dtype, device=pays.device), 0.0)
    v = _clamp(logvar_q.to(dtype), scalars, flags)
    distance = mu_q.to(dtype) if mu_p is None else mu_q.to(dtype) - mu_p.to(dtype)
    precision = None
    if logvar_p is not None:
        prior = _clamp(logvar_p.to(dtype), scalars, flags)
        v, precision = v - prior, torch.neg(prior).exp_()
    if dmu_q is not None or dmu_p is not None:
        dmu = distance * grad if dmu_q is None else _product(distance, grad, dmu_q)
        if precision is not None:
            dmu = dmu.mul_(precision) if dmu_q is not None else dmu * precision
        if dmu_p is not None:
            dmu_p.copy_(dmu).neg_()
    if dlogvar_p is not None:
        square = distance * distance
        growth = torch.expm1(v) + (square if precision is None else square * precision)
        _product(growth, grad, dlogvar_p).mul_(-0.5)
    if dlogvar_q is not None:
        # exp(v) - 1 = tanh(v / 2) (exp(v) + 1): to the last digit at small v, in two thirds of the time of expm1.
        half = torch.tanh(v * 0.5)
        torch.addcmul(half, half, torch.exp(v), out=dlogvar_q).mul_(grad * 0.5)
    if flags & CLAMPED:
        for d, logvar in ((dlogvar_q, logvar_q), (dlogvar_p, logvar_p)):
            if d is not None and logvar is not None:
                d.mul_((logvar >= scalars[1]) & (logvar <= scalars[2]))


def _product(a: Tensor, b: Tensor | float, out: Tensor) -> Tensor:
    """a * b, broadcast, in ``out``."""
    return out.copy_(a).mul_(b)


def _kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.gaussian_kl_value, kernels.gaussian_kl_gradient


register_formulas(NAME, Formulas(_kernels, reference, value, total, gradient))
