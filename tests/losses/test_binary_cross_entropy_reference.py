"""The plain PyTorch form of binary cross entropy, against torch, values worked by hand and finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genloss_kernels.core.formulas import reduced
from genloss_kernels.core.reduction import Reduction
from genloss_kernels.losses.binary_cross_entropy.reference import NAME, reference

from .comparison import check

INF, NAN = math.inf, math.nan
REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


def _loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    tensors = (input, target, weight, pos_weight)
    return reduced(NAME, tensors, mask, (label_smoothing, 0.0, 0.0), 0, REDUCTIONS[reduction])


def _values(x: list[float], t: list[float], smoothing: float = 0.0, **weights: float) -> list[float]:
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in weights.items()}
    tensors = [torch.tensor(v, dtype=torch.float64) for v in (x, t)]
    return reference(*tensors, given.get("weight"), given.get("pos_weight"), (smoothing, 0.0, 0.0), 0).tolist()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", [(), ("weight",), ("pos_weight",), ("weight", "pos_weight")])
def test_agrees_with_torch(weights: tuple[str, ...], reduction: str) -> None:
    arguments: dict[str, Any] = {
        "input": 4.0 * torch.randn(3, 5, dtype=torch.float64),
        "target": torch.rand(3, 5, dtype=torch.float64),
        "reduction": reduction,
    }
    arguments |= {name: torch.rand(5, dtype=torch.float64) + 0.5 for name in weights}
    check(_loss, F.binary_cross_entropy_with_logits, arguments, ("input", "target"))


def test_by_hand() -> None:
    """At x = log 3 the probability is 3/4."""
    x, one, none = math.log(3.0), math.log(4.0 / 3.0), math.log(4.0)
    assert _values([x, x, x, -x], [1.0, 0.0, 0.25, 1.0]) == pytest.approx([one, none, 0.25 * one + 0.75 * none, none])
    assert _values([x, x], [1.0, 0.0], weight=2.0) == pytest.approx([2.0 * one, 2.0 * none])
    assert _values([x, x], [1.0, 0.0], pos_weight=3.0) == pytest.approx([3.0 * one, none])
    # Smoothing of 0.2 moves targets 0 and 1 to 0.1 and 0.9.
    assert _values([x, x], [1.0, 0.0], 0.2) == pytest.approx([0.9 * one + 0.1 * none, 0.1 * one + 0.9 * none])
    both = _values([x], [1.0], 0.2, weight=2.0, pos_weight=3.0)
    assert both == pytest.approx([2.0 * (3.0 * 0.9 * one + 0.1 * none)])
    assert _values([x], [1.0], 1.0) == pytest.approx([0.5 * (one + none)])


def test_masked_mean_by_hand() -> None:
    x, t = torch.tensor([0.0, NAN, 0.0, INF]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([True, False, True, False])
    assert _loss(x, t, mask=mask).item() == pytest.approx(math.log(2.0))
    assert _loss(x, t, mask=mask, reduction="sum").item() == pytest.approx(2.0 * math.log(2.0))
    assert _loss(x, t, mask=mask, reduction="none").tolist() == pytest.approx([math.log(2.0), 0.0, math.log(2.0), 0.0])
    # Rows count as often as they are broadcast.
    rows = torch.zeros(2, 3)
    assert _loss(rows, rows, mask=torch.tensor([[True], [False]])).item() == pytest.approx(math.log(2.0))
    assert _loss(x, t, mask=torch.zeros(4, dtype=torch.bool)).isnan()


def test_infinite_logits() -> None:
    assert _values([INF, -INF, INF, -INF], [1.0, 0.0, 0.0, 1.0]) == [0.0, 0.0, INF, INF]
    assert _values([INF, -INF], [0.5, 0.5]) == [INF, INF]
    assert _values([INF, -INF], [0.0, 1.0], weight=0.0) == [0.0, 0.0]
    assert _values([-INF], [1.0], pos_weight=0.0) == [0.0]
    assert all(math.isnan(v) for v in _values([NAN, NAN], [0.0, 1.0]))


def test_derivatives_at_coefficient_0() -> None:
    """A hard target cuts one term off at infinity only: elsewhere its derivative in the target is there."""
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    dx, dt = torch.autograd.grad(_loss(x, t, reduction="sum"), (x, t))
    torch.testing.assert_close(dx, torch.sigmoid(x) - t)
    torch.testing.assert_close(dt, -x)


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(masked: bool) -> None:
    x, t = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    weight, pos_weight = (torch.rand(4, dtype=torch.float64) + 0.5 for _ in range(2))
    mask = torch.rand(3, 4) < 0.5 if masked else None
    for reduction in REDUCTIONS:

        def function(x: Tensor, t: Tensor, reduction: str = reduction) -> Tensor:
            return _loss(x, t, weight, pos_weight, mask=mask, label_smoothing=0.1, reduction=reduction)

        given = (x.requires_grad_(), t.requires_grad_())
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


def test_nothing_of_masked_elements_reaches_a_derivative() -> None:
    x = torch.tensor([1.0, NAN, INF], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([1.0, 0.5, NAN], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, False])
    grads = torch.autograd.grad(_loss(x, t, mask=mask), (x, t), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), (x, t))
    for grad in (*grads, *second):
        assert grad[0].isfinite()
        assert not grad[1:].any()


def test_arithmetic_is_in_fp32_for_halves() -> None:
    half, double = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float64)
    assert reference(half, half, None, None, (0.0, 0.0, 0.0), 0).dtype == torch.float32
    assert reference(half, half, None, double, (0.0, 0.0, 0.0), 0).dtype == torch.float64
