"""The plain PyTorch form of the Gaussian KL divergence, against torch.distributions, exact values and differences."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core.formulas import reduced
from genloss_kernels.core.reduction import Reduction
from genloss_kernels.losses.gaussian_kl.reference import CLAMPED, FREE_BITS, GENERAL, NAME, expm1_excess, reference

NO_SCALARS = (0.0, 0.0, 0.0)


def excess(v: float) -> float:
    """exp(v) - 1 - v by forty digits of decimal arithmetic."""
    with localcontext() as context:
        context.prec = 60
        exact = Decimal(v)
        return float(exact.exp() - 1 - exact)


def _value(*numbers: float | None, free_bits: float | None = None, clamp: tuple[float, float] | None = None) -> float:
    tensors = [None if n is None else torch.tensor(n, dtype=torch.float64) for n in numbers]
    tensors += [None] * (4 - len(tensors))
    flags = (GENERAL if len(numbers) > 2 else 0) | (FREE_BITS if free_bits is not None else 0) | (CLAMPED if clamp else 0)
    return reference(*tensors, (free_bits or 0.0, *(clamp or (0.0, 0.0))), flags).item()


def _normal(mu: Tensor, logvar: Tensor) -> torch.distributions.Normal:
    return torch.distributions.Normal(mu, (0.5 * logvar).exp())


def test_agrees_with_distributions() -> None:
    mu_q, logvar_q, mu_p, logvar_p = (torch.randn(4, 5, dtype=torch.float64) for _ in range(4))
    zero = torch.zeros_like(mu_q)
    for prior in ((mu_p, logvar_p), (mu_p, zero), (zero, logvar_p), (zero, zero)):
        wanted = torch.distributions.kl_divergence(_normal(mu_q, logvar_q), _normal(*prior))
        torch.testing.assert_close(reference(mu_q, logvar_q, *prior, NO_SCALARS, GENERAL), wanted)
    torch.testing.assert_close(reference(mu_q, logvar_q, None, None, NO_SCALARS, 0), wanted)


def test_by_hand() -> None:
    two, three = math.log(2.0), math.log(3.0)
    assert _value(3.0, 0.0) == 4.5
    assert _value(0.0, two) == pytest.approx(0.5 * (1.0 - two))
    assert _value(1.0, two, 3.0, three) == pytest.approx(0.5 * (2.0 / 3.0 - 1.0 - math.log(2.0 / 3.0) + 4.0 / 3.0))
    assert _value(1.0, 0.7, 1.0, 0.7) == 0.0
    assert _value(0.0, 0.0, -2.0, three) == pytest.approx(0.5 * (1.0 / 3.0 - 1.0 + three + 4.0 / 3.0))


def test_free_bits_and_clamp_by_hand() -> None:
    assert _value(1.0, 0.0, free_bits=0.25) == 0.5
    assert _value(1.0, 0.0, free_bits=0.75) == 0.75
    assert _value(1.0, 5.0, clamp=(-1.0, 0.0)) == 0.5
    assert _value(1.0, -5.0, clamp=(0.0, 1.0)) == 0.5
    # Both log-variances are clamped.
    assert _value(1.0, 5.0, 0.0, -5.0, clamp=(0.0, 0.0)) == 0.5
    assert _value(1.0, 2.0, 0.0, -5.0, clamp=(-1.0, 1.0)) == pytest.approx(0.5 * (math.exp(2.0) - 3.0 + math.e))


@pytest.mark.parametrize("exponent", range(-12, 2))
def test_excess_keeps_every_digit(exponent: int) -> None:
    for mantissa in (1.0, 2.5, 4.99, -1.0, -3.0, -4.99):
        v = torch.tensor(mantissa * 10.0**exponent, dtype=torch.float64)
        wanted = excess(v.item())
        assert abs(expm1_excess(v).item() - wanted) <= 4.0 * math.ulp(wanted), v.item()


def test_excess_far_out() -> None:
    v = torch.tensor([0.0, -1000.0, 1000.0, -math.inf], dtype=torch.float64)
    assert expm1_excess(v).tolist() == [0.0, 999.0, math.inf, math.inf]


def test_excess_has_derivatives() -> None:
    """Where the series ends and at 0, in the branch that is not taken too."""
    v = torch.tensor([0.0, 1e-6, 0.4999, 0.5, -0.5, -0.4999, 3.0, -700.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(expm1_excess(v).sum(), v, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), v)
    torch.testing.assert_close(first, torch.expm1(v))
    torch.testing.assert_close(second, torch.exp(v))


def test_result_is_fp32_for_halves() -> None:
    half, double = torch.full((2,), 0.25, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float64)
    assert reference(half, half, None, None, NO_SCALARS, 0).dtype == torch.float32
    assert reference(half, half, None, double, NO_SCALARS, GENERAL).dtype == torch.float64


@pytest.mark.parametrize("flags", [0, CLAMPED, FREE_BITS, CLAMPED | FREE_BITS])
def test_derivatives(flags: int) -> None:
    tensors = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    scalars = (0.4, -0.6, 0.5)

    def general(*given: Tensor) -> Tensor:
        return reference(*given, scalars, flags | GENERAL)

    def standard(*given: Tensor) -> Tensor:
        return reference(*given, None, None, scalars, flags)

    for function, given in ((general, tensors), (standard, tensors[:2])):
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


def test_reductions() -> None:
    mu, logvar = torch.ones(4, 3, 2), torch.zeros(4, 3, 2)
    wanted = {Reduction.SUM: 12.0, Reduction.MEAN: 0.5, Reduction.BATCHMEAN: 3.0}
    for reduction, value in wanted.items():
        assert reduced(NAME, (mu, logvar, None, None), None, NO_SCALARS, 0, reduction).item() == value
    sample = reduced(NAME, (mu, logvar, None, None), None, NO_SCALARS, 0, Reduction.SAMPLE)
    assert sample.tolist() == [3.0] * 4
    sample = reduced(NAME, (mu[:, 0, 0], logvar[:, 0, 0], None, None), None, NO_SCALARS, 0, Reduction.SAMPLE)
    assert sample.tolist() == [0.5] * 4
    # Elements that come of broadcasting count.
    column, row = torch.ones(4, 1), torch.zeros(3)
    assert reduced(NAME, (column, row, None, None), None, NO_SCALARS, 0, Reduction.SUM).item() == 6.0
    assert reduced(NAME, (column, row, None, None), None, NO_SCALARS, 0, Reduction.NONE).shape == (4, 3)


def test_known_failure_two_meanings_of_mean() -> None:
    """``mean`` divided by elements in one place and by samples in another (pytorch #2259)."""
    mu, logvar = torch.ones(4, 6), torch.zeros(4, 6)
    wanted = {"sum": 12.0, "mean": 0.5, "batchmean": 3.0}
    assert {r: gk.gaussian_kl(mu, logvar, reduction=r).item() for r in wanted} == wanted
