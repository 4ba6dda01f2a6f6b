"""Device functions over dense grids, against float64 (and fp64 ones against more digits)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from genloss_kernels.core import triton_math
from genloss_kernels.core.triton_math import (
    exp_flushed,
    expm1_excess,
    log1p_lower,
    log1p_unit,
    log_lower,
    log_share_excess,
    softplus_sigmoid,
    tanh,
)

pytestmark = pytest.mark.interpreter

BLOCK = 1 << 14


@triton.jit
def _map_kernel(x_ptr, a_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(a_ptr + lane, FUNCTION(tl.load(x_ptr + lane)))


@triton.jit
def _expm1_kernel(x_ptr, a_ptr, b_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    growth, excess = expm1_excess(tl.load(x_ptr + lane))
    tl.store(a_ptr + lane, growth)
    tl.store(b_ptr + lane, excess)


@triton.jit
def _log_share_kernel(v_ptr, a_ptr, b_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    v = tl.load(v_ptr + lane)
    log, excess = log_share_excess(1.0 + v, v)
    tl.store(a_ptr + lane, log)
    tl.store(b_ptr + lane, excess)


@triton.jit
def _softplus_kernel(x_ptr, a_ptr, b_ptr, c_ptr, d_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    above, below, probability, complement = softplus_sigmoid(tl.load(x_ptr + lane))
    tl.store(a_ptr + lane, above)
    tl.store(b_ptr + lane, below)
    tl.store(c_ptr + lane, probability)
    tl.store(d_ptr + lane, complement)


def _run(kernel, x: np.ndarray, outputs: int, device: torch.device, **constexprs: Any) -> list[np.ndarray]:
    """``kernel`` on as many copies of ``x`` as fill its block."""
    dtype = torch.float64 if x.dtype == np.float64 else torch.float32
    values = torch.from_numpy(np.resize(x, BLOCK)).to(device)
    results = [torch.empty(BLOCK, dtype=dtype, device=device) for _ in range(outputs)]
    with np.errstate(all="ignore"):
        kernel[(1,)](values, *results, **constexprs, BLOCK=BLOCK)
    return [r[: x.size].cpu().numpy() for r in results]


def _map(function: Any, x: np.ndarray, device: torch.device) -> np.ndarray:
    """A device function of one number."""
    (got,) = _run(_map_kernel, x, 1, device, FUNCTION=function)
    return got


def _ulps(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest error in units in the last place of ``got``'s type."""
    spacing = np.spacing(np.abs(wanted).astype(got.dtype)).astype(np.float64)
    return float(np.max(np.abs(got.astype(np.float64) - wanted.astype(np.float64)) / spacing))


def _grid(low: float, high: float, dtype: type) -> np.ndarray:
    """Magnitudes from ``low`` to ``high``, evenly spread by their logarithm and by themselves, both signs."""
    half = BLOCK // 4
    magnitudes = np.concatenate([np.geomspace(low, high, half), np.linspace(low, high, half)])
    return np.concatenate([magnitudes, -magnitudes]).astype(dtype)


def _exact(function, x: np.ndarray) -> np.ndarray:
    """``function`` of each value with more digits than fp64, rounded to fp64."""
    return np.array([float(function(Fraction(float(v)))) for v in x])


def _exp(x: Fraction) -> Fraction:
    """exp by its series after halving the argument, to about 40 digits for abs(x) < 4."""
    halvings = 0
    while abs(x) > Fraction(1, 4):
        x, halvings = x / 2, halvings + 1
    term = total = Fraction(1)
    for n in range(1, 30):
        term = term * x / n
        total += term
    # Keep the fractions short: 160 bits are 48 digits.
    for _ in range(halvings):
        total = Fraction(round(total * total * 2**160), 2**160)
    return total


def test_log1p(device: torch.device) -> None:
    x = np.abs(_grid(1e-30, 1.0, np.float32))
    got = _map(log1p_unit, x, device)
    assert _ulps(got, np.log1p(x.astype(np.float64))) <= 4.0
    got = _map(log1p_unit, np.float32([0.0, 1.0, 1e-45, 2.0**-24, 2.0**-23]), device)
    assert got[0] == 0.0
    assert _ulps(got[1:], np.log1p(np.float64([1.0, 1.4012984643e-45, 2.0**-24, 2.0**-23]))) < 1.5


def test_logarithm_of_a_share_and_its_excess(device: torch.device) -> None:
    """Over every octave down to 2^-24, and of the second order at small v."""
    v = -np.concatenate([np.geomspace(1e-18, 0.5, BLOCK // 2), 1.0 - np.geomspace(2.0**-24, 0.5, BLOCK // 2)]).astype(
        np.float32
    )
    log, excess = _run(_log_share_kernel, v, 2, device)
    wide = v.astype(np.longdouble)
    # From a half on 1 + v is exact.
    assert _ulps(log, np.log1p(wide)) <= 2.0
    series = wide * wide * (0.5 - wide * (1 / 6 - wide * (1 / 12 - wide / 20)))
    assert _ulps(excess, np.where(np.abs(wide) < 1e-3, series, (1 + wide) * np.log1p(wide) - wide)) <= 5.0
    log, excess = _run(_log_share_kernel, np.float32([0.0, -1.0 + 2.0**-24, np.nan]), 2, device)
    assert (log[0], excess[0]) == (0.0, 0.0)
    assert log[1] == pytest.approx(-24 * np.log(2.0), rel=1e-7)
    assert np.isnan(log[2])
    assert np.isnan(excess[2])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logarithms_of_what_is_below_one(device: torch.device, dtype: type) -> None:
    """From the smallest subnormal number on."""
    x = np.concatenate([np.geomspace(1.5e-45, 1.0, BLOCK // 2)[:-1], np.linspace(1e-3, 1.0 - 1e-7, BLOCK // 2)]).astype(
        dtype
    )
    got = _map(log_lower, x, device)
    assert _ulps(got, np.log(x.astype(np.longdouble))) <= 2.0
    v = -np.abs(_grid(1e-18, 0.5, dtype))
    got = _map(log1p_lower, v, device)
    assert _ulps(got, np.log1p(v.astype(np.longdouble))) <= 3.0
    got = _map(log_lower, dtype([0.0]), device)
    assert got[0] < -103.3


def test_logarithm_of_a_share_double(device: torch.device) -> None:
    v = -np.concatenate([np.geomspace(1e-12, 0.5, BLOCK // 2), np.linspace(0.5, 0.999, BLOCK // 2)])
    _, excess = _run(_log_share_kernel, v, 2, device)
    wide = v.astype(np.longdouble)
    terms = sum((-wide) ** k / (k * (k - 1)) for k in range(2, 20))
    exact = np.where(np.abs(wide) < 0.05, terms, (1 + wide) * np.log1p(wide) - wide)
    assert np.all(np.abs(excess - exact) <= 2.0**-51 * np.abs(wide))


def test_exponential_without_subnormals(device: torch.device) -> None:
    """The argument is rounded after it is multiplied: an error in proportion to it."""
    x = -np.concatenate([np.linspace(0.0, 87.0, BLOCK - 1), [np.inf]]).astype(np.float32)
    got = _map(exp_flushed, x, device)
    exact = np.exp(x.astype(np.float64))
    assert np.all(np.abs(got - exact) <= (2.0 + np.minimum(np.abs(x), 87.0)) * 2.0**-23 * exact)
    assert got[-1] == 0.0
    got = _map(exp_flushed, x.astype(np.float64), device)
    assert np.all(np.abs(got - np.exp(x.astype(np.float64))) <= 2.0**-50 * got)


def test_log1p_double(device: torch.device) -> None:
    x = np.abs(_grid(1e-300, 1.0, np.float64))
    got = _map(log1p_unit, x, device)
    assert _ulps(got, np.log1p(x)) <= 3.0


def test_expm1_and_its_excess_keep_every_digit(device: torch.device) -> None:
    """Under the series, down to values whose square is subnormal."""
    x = _grid(1e-18, 0.4999999, np.float32)
    wide = x.astype(np.float64)
    growth, excess = _run(_expm1_kernel, x, 2, device)
    assert _ulps(growth, np.expm1(wide)) <= 2.0
    series = wide * wide * (0.5 + wide * (1 / 6 + wide * (1 / 24 + wide / 120)))
    exact = np.where(np.abs(wide) < 1e-2, series, np.expm1(wide) - wide)
    assert _ulps(excess, exact) <= 3.0


def test_expm1_beyond_the_series(device: torch.device) -> None:
    """What the subtraction costs from abs(v) = 0.5 on, where exp(v) is up to 8 times the excess."""
    x = _grid(0.5, 20.0, np.float32)
    growth, excess = _run(_expm1_kernel, x, 2, device)
    assert _ulps(growth, np.expm1(x.astype(np.float64))) <= 4.0
    assert _ulps(excess, np.expm1(x.astype(np.float64)) - x) <= 16.0


def test_expm1_double(device: torch.device) -> None:
    x = np.concatenate([_grid(1e-9, 0.4999999, np.float64)[::64], _grid(0.5, 3.0, np.float64)[::256]])
    growth, excess = _run(_expm1_kernel, x, 2, device)
    assert _ulps(growth, _exact(lambda v: _exp(v) - 1, x)) <= 6.0
    assert _ulps(excess, _exact(lambda v: _exp(v) - 1 - v, x)) <= 8.0


def test_expm1_far_out(device: torch.device) -> None:
    growth, excess = _run(_expm1_kernel, np.float32([0.0, -1000.0, 88.0, 1000.0, np.inf, -np.inf, np.nan]), 2, device)
    assert growth[:2].tolist() == [0.0, -1.0]
    assert excess[:2].tolist() == [0.0, 999.0]
    assert growth[2] == pytest.approx(np.exp(np.float64(88.0)), rel=1e-6)
    assert growth[3:6].tolist() == [np.inf, np.inf, -1.0]
    assert excess[3] == np.inf
    assert excess[5] == np.inf
    assert np.isnan(growth[6])
    assert np.isnan(excess[6])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softplus_and_sigmoid(device: torch.device, dtype: type) -> None:
    """Relative accuracy out to where the small side underflows: log(1 + exp(-x)) without log1p is 0 from 17 on."""
    x = np.concatenate([_grid(1e-6, 80.0, dtype)[1:], dtype([0.0])])
    wide = x.astype(np.longdouble)
    above, below, probability, complement = _run(_softplus_kernel, x, 4, device)
    small = np.exp(-np.abs(wide))
    softplus = np.log1p(small)
    assert _ulps(above, np.maximum(wide, 0) + softplus) <= 5.0
    assert _ulps(below, np.maximum(-wide, 0) + softplus) <= 5.0
    assert _ulps(probability, np.where(wide >= 0, 1, small) / (1 + small)) <= 3.0
    assert _ulps(complement, np.where(wide >= 0, small, 1) / (1 + small)) <= 3.0


def test_softplus_and_sigmoid_at_infinity(device: torch.device) -> None:
    above, below, probability, complement = _run(_softplus_kernel, np.float32([np.inf, -np.inf, 1e4]), 4, device)
    assert above.tolist() == [np.inf, 0.0, 1e4]
    assert below.tolist() == [0.0, np.inf, 0.0]
    assert probability.tolist() == [1.0, 0.0, 1.0]
    assert complement.tolist() == [0.0, 1.0, 0.0]


def test_tanh(device: torch.device) -> None:
    x = _grid(1e-7, 9.5, np.float32)
    got = _map(tanh, x, device)
    assert _ulps(got, np.tanh(x.astype(np.float64))) <= 6.0
    got = _map(tanh, np.float32([0.0, 9.1, -9.1, 1e30, np.inf, -np.inf, np.nan]), device)
    assert got[:6].tolist() == [0.0, 1.0, -1.0, 1.0, 1.0, -1.0]
    assert np.isnan(got[6])


def test_tanh_double(device: torch.device) -> None:
    x = _grid(1e-12, 3.0, np.float64)[::32]
    got = _map(tanh, x, device)

    def exact(v: Fraction) -> Fraction:
        e = _exp(v)
        e = e * e
        return (e - 1) / (e + 1)

    assert _ulps(got, _exact(exact, x)) <= 6.0
    got = _map(tanh, np.float64([0.0, 400.0, -400.0, np.inf, -np.inf]), device)
    assert got.tolist() == [0.0, 1.0, -1.0, 1.0, -1.0]


def test_lowest_is_the_last_finite_number() -> None:
    assert triton_math._LOWEST_32.value == np.finfo(np.float32).min
    assert triton_math._LOWEST_64.value == np.finfo(np.float64).min
