"""The comparison with float64 that comes before every verdict and every speed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import genloss_kernels as gk
from genloss_kernels.testing import assert_close, compare, tolerance

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
def test_rounding_passes_and_two_units_fail(dtype: torch.dtype, scale: float) -> None:
    expected = torch.randn(1000, dtype=torch.float64) * scale
    rounded = expected.to(dtype)
    assert_close(rounded, expected)
    # Not the smallest elements: those have the arithmetic's allowance as well.
    at = expected.abs().argmax()
    wrong = rounded.clone()
    unit = tolerance(dtype).storage * 2.0 ** (math.frexp(expected[at].item())[1] - 1)
    wrong[at] += (6.0 if dtype in (torch.float32, torch.float64) else 2.0) * unit
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(wrong, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_truncated_halves_pass(dtype: torch.dtype) -> None:
    """Triton's interpreter cuts the digits off when it stores bfloat16."""
    expected = torch.rand(1000, dtype=torch.float64) + 1.0
    nearest = expected.to(dtype)
    truncated = torch.where(nearest.double() > expected, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
    assert_close(truncated, expected)


def test_small_elements_are_held_to_their_own_size() -> None:
    """The largest element's error must not excuse a wrong small one."""
    expected = torch.tensor([1.0, 1e-4], dtype=torch.float64).repeat(500)
    like = expected.float()
    like[0] += 1e-5
    actual = expected.float()
    assert_close(actual + torch.where(expected == 1.0, 1e-5, 0.0).float(), expected, like)
    actual[1] += 1e-6
    with pytest.raises(AssertionError):
        assert_close(actual, expected, like)


def test_sums_of_products_are_held_to_the_largest_error() -> None:
    expected = torch.tensor([1.0, 1e-4], dtype=torch.float64).repeat(500)
    like = expected.float()
    like[0] += 1e-5
    actual = expected.float()
    actual[1] += 1e-5
    assert_close(actual, expected, like, products=True)
    with pytest.raises(AssertionError):
        assert_close(actual, expected, like)
    actual[1] += 2e-5
    with pytest.raises(AssertionError):
        assert_close(actual, expected, like, products=True)


def test_errors_of_torch_count_twice() -> None:
    expected = torch.linspace(1.0, 1.9, 64, dtype=torch.float64)
    like = expected.float()
    like[7] += 1e-4
    off = torch.zeros(64)
    off[40] = 1.9e-4
    assert_close(expected.float() + off, expected, like)
    with pytest.raises(AssertionError):
        assert_close(expected.float() + 1.2 * off, expected, like)


def test_cancellation_is_excused_where_torch_cancels_too() -> None:
    """Loss and gradient of a row whose target has nearly all the probability."""
    logits = torch.randn(256, 100)
    target = torch.randint(100, (256,))
    logits[torch.arange(256), target] = torch.linspace(3.0, 16.0, 256)
    results = {}
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        loss = F.cross_entropy(leaf, target, reduction="none")
        loss.sum().backward()
        results[dtype] = (loss.detach(), leaf.grad)
    own = logits.logsumexp(1) - logits[torch.arange(256), target]
    gradient = logits.softmax(1) - F.one_hot(target, 100)
    for actual, expected, like in zip((own, gradient), results[torch.float64], results[torch.float32], strict=True):
        assert_close(actual, expected, like)


def test_float64_is_judged_by_float32_to_scale() -> None:
    expected = torch.linspace(1.0, 1.9, 64, dtype=torch.float64)
    like = expected.float() * (1.0 + 1e-6)
    assert_close(expected * (1.0 + 1e-15), expected, like)
    with pytest.raises(AssertionError):
        assert_close(expected * (1.0 + 1e-13), expected, like)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_special_values_must_be_the_same(special: float) -> None:
    expected = torch.tensor([1.0, special], dtype=torch.float64)
    assert_close(expected.float(), expected)
    assert compare(torch.ones(2), expected).error == math.inf
    assert compare(torch.tensor([special, special]), expected).error == math.inf


def test_overflow_of_the_dtype_is_infinity() -> None:
    expected = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert_close(torch.tensor([math.inf, 1.0]).half(), expected)
    assert not compare(torch.tensor([65504.0, 1.0]).half(), expected).passed


def test_overflow_of_torch_excuses_nothing() -> None:
    expected = torch.tensor([1e6, 1.0], dtype=torch.float64)
    like = torch.tensor([math.inf, 1.0])
    assert_close(expected.float(), expected, like)
    assert not compare(torch.tensor([1.001e6, 1.0]), expected, like).passed


def test_zeros_and_subnormals() -> None:
    assert_close(torch.zeros(3), torch.zeros(3, dtype=torch.float64))
    assert not compare(torch.full((3,), 1e-30), torch.zeros(3, dtype=torch.float64)).passed
    subnormal = torch.tensor([3e-8], dtype=torch.float64)
    assert_close(subnormal.half(), subnormal)


def test_empty() -> None:
    assert compare(torch.empty(0), torch.empty(0, dtype=torch.float64)).passed


def test_more_elements_than_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gk.testing, "_CHUNK", 100)
    expected = torch.randn(30, 17, dtype=torch.float64)
    actual = expected.float()
    assert_close(actual, expected, expected.float())
    actual[11, 3] += 1e-3
    assert compare(actual, expected, expected.float()).error == pytest.approx(1e-3, rel=1e-3)


def test_a_comparison_needs_float64_and_one_shape() -> None:
    with pytest.raises(TypeError, match="float64"):
        compare(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="expected must have the shape"):
        compare(torch.ones(2), torch.ones(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="like must have the shape"):
        compare(torch.ones(2), torch.ones(2, dtype=torch.float64), torch.ones(1))
