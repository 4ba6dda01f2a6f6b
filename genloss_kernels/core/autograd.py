"""Calling an autograd.Function without what a small loss cannot afford."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, less the binding of default arguments where nothing needs it.

    ``Function.apply`` inspects the signature of a forward that has a ``setup_context`` on every call, some 40 us; beyond
    that it only dispatches to functorch, which is asked here first.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]


def apart(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Views in which a backward may differentiate again: where one operand depends on another, or is the same tensor, a
    path from this one to that belongs to whoever asked for the gradient, and would be counted twice.
    """
    return [t if t is None else t.view_as(t) for t in tensors]
