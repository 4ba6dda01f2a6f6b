"""Gradients that the forward made: handed over once, scaled, made again, and never where they would be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core import formulas, made
from genloss_kernels.core.reduction import Reduction
from genloss_kernels.losses.regression import api as regression_api


def _term(loss: str = "mse_loss", factor: float = 1.0) -> made.Part:
    return made.Part(loss, (0.0, 0.0, 0.0), 0, Reduction.MEAN, factor)


def _drawn(*shape: int) -> tuple[Tensor, Tensor, None, None]:
    return torch.randn(shape).requires_grad_(), torch.randn(shape).requires_grad_(), None, None


@pytest.fixture
def made_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls, make = [], made._make

    def counted(part: made.Part, tensors: tuple[Tensor | None, ...], needed: tuple[bool, ...], *given: Any) -> object:
        calls.append(sum(needed))
        return make(part, tensors, needed, *given)

    monkeypatch.setattr(made, "_make", counted)
    return calls


@pytest.mark.parametrize("blocks", [2**17, 16])
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_value_and_gradients(factor: float, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "BLOCK_ELEMENTS", blocks)
    tensors = _drawn(7, 13)
    x, t, *_ = tensors
    (found,) = made.apply((_term(),), torch.float32, tensors)
    wanted = torch.nn.functional.mse_loss(x, t)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found * factor, (x, t)), torch.autograd.grad(wanted * factor, (x, t)))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_half_precision_rounds_once(factor: float, dtype: torch.dtype, batched: bool) -> None:
    """After the upstream gradient is known; a second backward gives the same bits."""
    torch.manual_seed(0)
    x, t = (torch.randn(64, 64).to(dtype).requires_grad_() for _ in range(2))
    (loss,) = made.apply((_term(),), dtype, (x, t, None, None))
    exact = torch.nn.functional.mse_loss(x.double(), t.double())
    assert loss == exact.to(dtype)
    upstream = torch.tensor(factor, dtype=dtype)
    wanted = [g.to(dtype) for g in torch.autograd.grad(exact * upstream.double(), (x, t))]
    for _ in range(2):
        given = upstream.expand(2) if batched else upstream
        found = torch.autograd.grad(loss, (x, t), given, retain_graph=True, is_grads_batched=batched)
        for ours, theirs in zip(found, wanted, strict=True):
            assert all(torch.equal(part, theirs) for part in (ours if batched else [ours]))


def test_two_terms_and_each_alone() -> None:
    a, b = _drawn(5, 9), _drawn(4)
    parts = (_term(factor=1.0), _term("l1_loss", 0.5))
    leaves = (*a[:2], *b[:2])

    def wanted() -> tuple[Tensor, ...]:
        first, second = torch.nn.functional.mse_loss(*a[:2]), torch.nn.functional.l1_loss(*b[:2])
        return first + 0.5 * second, first, second

    for place in range(3):
        found = made.apply(parts, torch.float32, (*a, *b))
        torch.testing.assert_close(found, wanted())
        ours, theirs = (torch.autograd.grad(results[place], leaves, allow_unused=True) for results in (found, wanted()))
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.allclose(one, other)
    every = made.apply(parts, torch.float32, (*a, *b))
    together = torch.autograd.grad(every[0] + 2.0 * every[1] - every[2], leaves)
    of_torch = wanted()
    torch.testing.assert_close(together, torch.autograd.grad(of_torch[0] + 2.0 * of_torch[1] - of_torch[2], leaves))


def test_made_once_and_again_with_the_same_bits(made_calls: list[int]) -> None:
    x, t, *_ = tensors = _drawn(6, 5)
    loss = made.apply((_term(),), torch.float32, tensors)[0] * 3.0
    first = torch.autograd.grad(loss, (x, t), retain_graph=True)
    assert made_calls == [2]
    kept = [g.clone() for g in first]
    for gradient in first:
        gradient.zero_()
    second = torch.autograd.grad(loss, (x, t))
    assert made_calls == [2, 2]
    assert all(map(torch.equal, second, kept))


def test_nothing_is_made_for_what_does_not_learn(made_calls: list[int]) -> None:
    x, t, *_ = _drawn(6, 5)
    made.apply((_term(),), torch.float32, (x, t.detach(), None, None))
    with torch.no_grad():
        loss, *_ = made.apply((_term(),), torch.float32, (x, t, None, None))
    assert made_calls == [1, 0]
    assert not loss.requires_grad
    _, fixed, learnt = made.apply((_term(), _term()), torch.float32, (x.detach(), t.detach(), None, None, x, t, None, None))
    assert not fixed.requires_grad
    assert learnt.requires_grad


def test_derivatives_of_second_order() -> None:
    tensors = [t if t is None else t.detach().double().requires_grad_() for t in _drawn(3, 4)]

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return made.apply((_term(), _term(factor=2.0)), torch.float64, (x, t, None, None, t, x, None, None))[0]

    assert torch.autograd.gradcheck(loss, tensors[:2])
    assert torch.autograd.gradgradcheck(loss, tensors[:2])


def test_an_operand_changed_before_the_backward_is_noticed() -> None:
    x, t, *_ = _drawn(4)
    y = x * 1.0
    loss, *_ = made.apply((_term(),), torch.float32, (y, t, None, None))
    y.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("other", "reduction"),
    [
        (torch.ones(3), Reduction.MEAN),
        (torch.ones(4, dtype=torch.bfloat16), Reduction.MEAN),
        (torch.ones(4), Reduction.NONE),
        (torch.ones(4), Reduction.SAMPLE),
    ],
    ids=["broadcast", "mixed", "per element", "per sample"],
)
def test_what_does_not_fit(other: Tensor, reduction: Reduction) -> None:
    assert made.fits((torch.ones(4), torch.ones(4), None, None), Reduction.MEAN)
    assert not made.fits((torch.ones(4), other, None, None), reduction)
    assert not made.fits((torch.ones(4, dtype=torch.int32), other, None, None), Reduction.MEAN)
    assert not made.fits((torch.ones(0), torch.ones(0), None, None), Reduction.MEAN)
    with gk.testing.device_semantics():
        assert not made.fits((torch.ones(4), torch.ones(4), None, None), Reduction.MEAN)


@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss"])
def test_large_regressions_make_their_gradients(loss: str, made_calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression_api, "MADE_FROM", dict.fromkeys(regression_api.MADE_FROM, 20))
    for size, calls in ((19, 0), (20, 1)):
        x, t = torch.randn(size).requires_grad_(), torch.randn(size)
        found, wanted = getattr(gk, loss)(x, t), getattr(torch.nn.functional, loss)(x, t)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(wanted, x))
        assert len(made_calls) == calls
    getattr(gk, loss)(x, t, reduction="none")
    assert len(made_calls) == 1


def test_the_default_device_moves_no_loss() -> None:
    x, t, *_ = tensors = _drawn(6, 5)
    with torch.device("meta"):
        loss = made.apply((_term(),), torch.float32, tensors)[0]
        found = torch.autograd.grad(loss, (x, t))
    assert {loss.device.type, *(g.device.type for g in found)} == {"cpu"}
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(x, t))
