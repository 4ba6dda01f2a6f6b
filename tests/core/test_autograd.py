"""The short way to an autograd.Function, against the long one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from genloss_kernels.core.autograd import apart, apply, through_transforms


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _twice(x: Tensor) -> Tensor:
    return apply(_Double, x, 2.0).sum()


def test_value_and_gradient() -> None:
    x = torch.ones(3, requires_grad=True)
    _twice(x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_under_a_functorch_transform() -> None:
    """There only the long way sees the transform."""
    assert torch.func.grad(_twice)(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]


# Dynamo makes an instance of every Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled() -> None:
    """There only the long way can be traced."""
    x = torch.ones(3, requires_grad=True)
    torch.compile(_twice, fullgraph=True, backend="aot_eager")(x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


_ran: list[str] = []


class _Cubes(torch.autograd.Function):
    """Sum of the cubes, whose plain backward no transform sees through."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.pow(3).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    @through_transforms
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if grad is None:
            return (None,)
        if torch.is_grad_enabled():
            _ran.append("differentiable")
            (x,) = apart([x])
            return torch.autograd.grad(x.pow(3).sum(), x, grad, create_graph=True)
        _ran.append("plain")
        return (x.square() * (3.0 * grad.item()),)


@pytest.fixture
def cubes() -> tuple[Tensor, Tensor]:
    _ran.clear()
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    return x, apply(_Cubes, x)


def test_a_plain_upstream_gradient_takes_the_plain_branch(cubes: tuple[Tensor, Tensor]) -> None:
    x, loss = cubes
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(2.0 * loss, x)
    assert found.tolist() == [6.0, 24.0]
    assert _ran == ["plain"]


def test_a_gradient_to_be_differentiated(cubes: tuple[Tensor, Tensor]) -> None:
    x, loss = cubes
    (found,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.autograd.grad(found.sum(), x)[0].tolist() == [6.0, 12.0]
    assert _ran == ["differentiable"]


def test_a_batch_takes_the_differentiable_branch_and_keeps_no_graph(cubes: tuple[Tensor, Tensor]) -> None:
    x, loss = cubes
    found = torch.func.vmap(lambda g: torch.autograd.grad(loss, x, g, retain_graph=True)[0])(torch.tensor([1.0, 2.0]))
    assert found.tolist() == [[3.0, 12.0], [6.0, 24.0]]
    assert not found.requires_grad
    assert _ran == ["differentiable"]


def test_a_tangent_is_a_gradient_of_its_own(cubes: tuple[Tensor, Tensor]) -> None:
    x, loss = cubes
    primal, tangent = torch.tensor(2.0), torch.tensor(5.0)
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(loss, x, forward_ad.make_dual(primal, tangent), retain_graph=True)
        dual = forward_ad.unpack_dual(found)
        assert dual.primal.tolist() == [6.0, 24.0]
        assert dual.tangent.tolist() == [15.0, 60.0]
    pushed = torch.func.jvp(lambda g: torch.autograd.grad(loss, x, g, retain_graph=True)[0], (primal,), (tangent,))
    assert [t.tolist() for t in pushed] == [[6.0, 24.0], [15.0, 60.0]]
    assert _ran == ["plain"] * 4


class _Scaled(torch.autograd.Function):
    """Each operand on its own."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return 2.0 * a, 3.0 * b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    @through_transforms
    def backward(ctx: Any, of_a: Tensor | None, of_b: Tensor | None) -> tuple[Tensor | None, ...]:
        return None if of_a is None else 2.0 * of_a, None if of_b is None else 3.0 * of_b


def test_a_gradient_beside_one_with_a_tangent_has_none() -> None:
    a, b = torch.ones((), requires_grad=True), torch.ones((), requires_grad=True)
    one = torch.ones(())
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(one, 5.0 * one), one
        of_a, of_b = (forward_ad.unpack_dual(g) for g in torch.autograd.grad(apply(_Scaled, a, b), (a, b), upstream))
        assert (of_a.primal, of_a.tangent, of_b.primal, of_b.tangent) == (2.0, 10.0, 3.0, None)
        (alone,) = torch.autograd.grad(apply(_Scaled, a, b)[0], a, upstream[0])
        assert forward_ad.unpack_dual(alone).tangent == 10.0


def test_nested_tangents_are_refused_rather_than_lost(cubes: tuple[Tensor, Tensor]) -> None:
    x, loss = cubes
    one = torch.tensor(1.0)

    def slope(g: Tensor) -> Tensor:
        return torch.func.jvp(lambda h: torch.autograd.grad(loss, x, h * h, retain_graph=True)[0], (g,), (one,))[1]

    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.func.jvp(slope, (one,), (one,))
