"""Tensors whose memory does not hold their values, and the route through the dispatcher that they need."""

from __future__ import annotations

import pytest
import torch

import genloss_kernels as gk
from genloss_kernels.core import library


def _negated(x: torch.Tensor) -> torch.Tensor:
    """The values of ``x`` as a view that negates lazily."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("shape", [(6, 300), (6, 50)])
def test_lazily_negated_inputs(path: str, shape: tuple[int, ...]) -> None:
    x, t = torch.randn(shape), torch.rand(shape)
    labels = torch.arange(shape[0])
    for loss in (
        lambda v: gk.cross_entropy(v, labels),
        lambda v: gk.binary_cross_entropy_with_logits(v, t),
        lambda v: gk.gaussian_kl(t, v),
    ):
        expected = loss(x.clone().requires_grad_())
        given = _negated(x).requires_grad_()
        found = loss(given)
        assert torch.equal(found, expected)
        assert torch.equal(_negated(x), x)


def test_lazy_zero_as_upstream_gradient(path: str) -> None:
    x = torch.randn(6, 300, requires_grad=True)
    for loss in (gk.cross_entropy(x, torch.arange(6)), gk.gaussian_kl(x, x)):
        (grad,) = torch.autograd.grad(loss, x, torch._efficientzerotensor((), dtype=loss.dtype))
        assert torch.equal(grad, torch.zeros_like(x))


def test_who_needs_the_dispatcher() -> None:
    x = torch.randn(3)
    assert library.unwatched([x, None, torch.nn.Parameter(x)])
    assert not library.unwatched([_negated(x)])
    assert not library.unwatched([torch._efficientzerotensor(3)])
    assert not library.unwatched([x.as_subclass(type("Own", (torch.Tensor,), {}))])
    with torch._subclasses.FakeTensorMode():
        assert not library.unwatched([x])
    seen = []

    def look(y: torch.Tensor) -> torch.Tensor:
        seen.append(library.unwatched([y]))
        return y.sum()

    torch.func.grad(look)(x)
    assert seen == [False]
