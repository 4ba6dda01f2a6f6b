"""The operators that every elementwise loss and every sum of two shares: all reductions, masks and broadcasting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genloss_kernels.core import elementwise, elementwise_op, formulas, pair, pair_op
from genloss_kernels.core.launch import Tile
from genloss_kernels.core.pair import Sum, Term
from genloss_kernels.core.reduction import Reduction
from genloss_kernels.losses.gaussian_kl.reference import NAME as GAUSSIAN

MSE, L1 = "mse_loss", "l1_loss"
NUMBERS = (0.0, 0.0, 0.0)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 and blocks of 64, so that a few elements go through every loop more than once."""
    monkeypatch.setattr(elementwise, "ELEMENTWISE_TILES", dict.fromkeys((2, 4, 8), Tile(16, 4)))
    monkeypatch.setattr(elementwise, "TILES_PER_PROGRAM", 2)
    monkeypatch.setattr(pair, "REDUCTION_TILE", Tile(2, 4))
    monkeypatch.setattr(formulas, "BLOCK_ELEMENTS", 64)


def _agree(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> None:
    """Values and gradients, the latter of sums in which every element has a weight of its own."""
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
        weight = torch.rand_like(theirs) + 0.5
        slopes = [
            torch.autograd.grad((loss * weight).sum(), leaves, retain_graph=True, allow_unused=True)
            for loss in (ours, theirs)
        ]
        for one, other in zip(*slopes, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("reduction", "masked"), [*((r, False) for r in Reduction), *((r, True) for r in (Reduction.NONE, Reduction.MEAN))]
)
@pytest.mark.parametrize("shape", [(5, 100), (100,), (5, 1), ()])
def test_one_term(path: str, shape: tuple[int, ...], reduction: Reduction, masked: bool) -> None:
    x, t = torch.randn(5, 100).requires_grad_(), torch.randn(shape).requires_grad_()
    mask = torch.rand(5, 100) < 0.6 if masked else None
    given: Any = ((x, t, None, None), mask, NUMBERS, 0, reduction)
    found = elementwise_op.apply(MSE, *given, torch.float32, triton=path == "triton", by_reference=False)
    _agree((found,), (formulas.reduced(MSE, *given),), (x, t))


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_elements_lie_as_those_of_torchs_losses(path: str, layout: Any) -> None:
    """And a compiler knows how."""
    x, t = layout(torch.rand(2, 3, 4, 5)), layout(torch.rand(2, 3, 4, 5))
    arguments = (MSE, x, t, None, None, None, *NUMBERS, 0, int(Reduction.NONE), torch.float32, path == "triton")
    found, _ = elementwise_op.elementwise_forward(*arguments)
    wanted = torch.nn.functional.mse_loss(x, t, reduction="none")
    torch.testing.assert_close(found, wanted, check_stride=True)
    torch.library.opcheck(torch.ops.genloss.elementwise_forward.default, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("capacity", [None, 20.0])
@pytest.mark.parametrize("reduction", [r for r in Reduction if r != Reduction.NONE])
def test_two_terms(path: str, reduction: Reduction, capacity: float | None) -> None:
    """Of other sizes, so that each has as many programs a sample as it takes."""
    first = tuple(torch.randn(5, 100).requires_grad_() for _ in range(2))
    second = tuple(torch.randn(5, 40).requires_grad_() for _ in range(2))
    terms = Term(MSE, *first, 0.0, 0), Term(L1, *second, 0.0, 0)
    rule = Sum(0.7, None, capacity, reduction)
    found = pair_op.apply(*terms, rule, torch.float32, triton=path == "triton", by_reference=False)
    _agree(found, pair_op.composed(*terms, rule), (*first, *second))


def test_second_derivatives_of_two_terms(path: str) -> None:
    """In each operand, one of which depends on another."""
    x, t, y = (torch.randn(3, 7, dtype=torch.float64).requires_grad_() for _ in range(3))

    def slopes(by_reference: bool) -> tuple[Tensor, ...]:
        terms = Term(MSE, x, t * x, 0.0, 0), Term(MSE, y, t.sin(), 0.0, 0)
        rule = Sum(0.7, None, None, Reduction.SUM)
        loss, *_ = pair_op.apply(*terms, rule, torch.float64, triton=path == "triton", by_reference=by_reference)
        first = torch.autograd.grad(loss, (x, t, y), create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, t, y))

    for found, wanted in zip(slopes(False), slopes(True), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(100,), (5, 1), ()])
def test_gradients_have_the_shapes_of_their_operands(path: str, shape: tuple[int, ...]) -> None:
    """Before autograd, which would add up a gradient that is too wide."""
    x, t, grad, kept = torch.randn(5, 100), torch.randn(shape), torch.ones(()), torch.empty(0)
    options = (*NUMBERS, 0, int(Reduction.SUM), [True, True, False, False], path == "triton")
    found = elementwise_op._backward(MSE, x, t, None, None, None, grad, kept, *options)
    assert [g.shape for g in found[:2]] == [x.shape, t.shape]
    torch.testing.assert_close(found[1], (2 * (t - x)).sum_to_size(shape))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_of_few_elements_has_its_own_upstream_gradient(path: str, count: int) -> None:
    x, t, upstream = torch.randn(count, requires_grad=True), torch.randn(count), torch.arange(1.0, count + 1)
    options: Any = ((x, t, None, None), None, NUMBERS, 0, Reduction.NONE, torch.float32)
    loss = elementwise_op.apply(MSE, *options, triton=path == "triton", by_reference=False)
    torch.testing.assert_close(torch.autograd.grad(loss, x, upstream), (2.0 * (x - t) * upstream,))


def test_what_a_forward_saves_is_in_fp32() -> None:
    """So nothing is saved for operands of which one is in fp64, nor where no gradient will be asked for."""
    x, t = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
    count = formulas.formulas_of(GAUSSIAN).saves(0)
    assert count > 0

    def saved(*operands: Tensor, reduction: Reduction = Reduction.SUM) -> int:
        return elementwise_op.savable(GAUSSIAN, (*operands, None, None), 0, reduction)

    assert saved(x, t) == saved(x, t.bfloat16()) == count
    assert not any((saved(x, t.double()), saved(x.detach(), t), saved(x, t[:1]), saved(x, t, reduction=Reduction.NONE)))
    with torch.no_grad():
        assert saved(x, t) == 0
