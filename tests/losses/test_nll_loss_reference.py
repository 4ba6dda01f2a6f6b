"""The plain PyTorch form of the negative log-likelihood, against torch, values worked by hand and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genloss_kernels.losses.nll_loss import reference

from .comparison import check


def _loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    loss = reference.nll_loss(input, target, weight, ignore_index, reduction, checked=False)
    outside = (target != ignore_index) & ((target < 0) | (target >= input.size(1)))
    if not outside.any():
        checked = reference.nll_loss(input, target, weight, ignore_index, reduction, checked=True)
        assert torch.equal(loss.isnan(), checked.isnan())
        assert torch.equal(loss.nan_to_num(), checked.nan_to_num())
    return loss


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 2, 4)])
def test_agrees_with_torch(shape: tuple[int, ...], weighted: bool, reduction: str) -> None:
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target.view(-1)[1] = -100
    options: dict[str, Any] = {"weight": torch.rand(shape[1], dtype=torch.float64)} if weighted else {}
    arguments = {"input": torch.randn(shape, dtype=torch.float64), "target": target, "reduction": reduction, **options}
    check(_loss, F.nll_loss, arguments)
    check(_loss, F.nll_loss, arguments | {"target": target.clamp(min=0), "ignore_index": 2})


def test_by_hand() -> None:
    x = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]])
    target, weight = torch.tensor([1, 0, -100]), torch.tensor([3.0, 5.0])
    assert _loss(x, target, reduction="none").tolist() == [2.0, 3.0, 0.0]
    assert _loss(x, target, weight, reduction="sum").item() == 19.0
    assert _loss(x, target, weight).item() == 19.0 / 8.0


def test_labels_out_of_range_give_nan() -> None:
    x = torch.zeros(4, 3, requires_grad=True)
    rows = _loss(x, torch.tensor([3, -1, 0, 2]), reduction="none")
    assert rows.isnan().tolist() == [True, True, False, False]
    assert _loss(x, torch.tensor([3, -1, 0, 2])).isnan()
    # Also where the label that takes its place is the ignored one.
    rows = _loss(x, torch.tensor([3, -1, 0, 2]), ignore_index=0, reduction="none")
    assert rows.isnan().tolist() == [True, True, False, False]
    # As the ignored label, one out of range is no more than that.
    assert _loss(x, torch.tensor([3, 3, 0, 2]), ignore_index=3, reduction="none").isfinite().all()


def test_derivatives() -> None:
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    target, weight = torch.tensor([[0, 1], [-100, 3], [2, 2]]), torch.rand(4, dtype=torch.float64)
    for reduction in ("none", "mean", "sum"):
        assert torch.autograd.gradcheck(lambda x, r=reduction: _loss(x, target, weight, reduction=r), x)
        assert torch.autograd.gradgradcheck(lambda x, r=reduction: _loss(x, target, weight, reduction=r).square(), x)
