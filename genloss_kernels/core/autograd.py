"""Calling an autograd.Function without what a small loss cannot afford."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backend

_Gradients = tuple[Tensor | None, ...]


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, less the binding of default arguments where nothing needs it.

    ``Function.apply`` inspects the signature of a forward that has a ``setup_context`` on every call, some 40 us; beyond
    that it only dispatches to functorch, which is asked here first.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]


def through_transforms(backward: Callable[..., _Gradients]) -> Callable[..., _Gradients]:
    """Let a backward whose upstream gradients are a ``vmap``'s batch or carry a tangent take its differentiable branch."""

    @functools.wraps(backward)
    def chosen(ctx: Any, *grads: Tensor | None) -> _Gradients:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not backend.transformed(*grads):
            return backward(ctx, *grads)
        if backend.pushes_forward(*grads):
            return _linear(backward, ctx, grads)
        with torch.enable_grad():
            found = backward(ctx, *grads)
        return tuple(None if g is None else g.detach() for g in found)

    return chosen


def _linear(backward: Callable[..., _Gradients], ctx: Any, grads: _Gradients) -> _Gradients:
    """Primals and tangents one after the other: a gradient is linear in the upstream ones."""
    duals = [(None, None) if g is None else forward_ad.unpack_dual(g) for g in grads]
    found = backward(ctx, *(primal for primal, _ in duals))
    tangents = backward(ctx, *(tangent for _, tangent in duals))
    return tuple(g if g is None or t is None else forward_ad.make_dual(g, t) for g, t in zip(found, tangents, strict=True))


def apart(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Views in which a backward may differentiate again: where one operand depends on another, or is the same tensor, a
    path from this one to that belongs to whoever asked for the gradient, and would be counted twice.
    """
    return [t if t is None else t.view_as(t) for t in tensors]
