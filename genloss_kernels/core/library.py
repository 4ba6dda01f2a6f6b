"""Registering operators with PyTorch's dispatcher, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _AutoDispatchBelowAutograd,  # pyright: ignore[reportAttributeAccessIssue]
    _len_torch_dispatch_stack,  # pyright: ignore[reportAttributeAccessIssue]
)
from torch._C._functorch import is_legacy_batchedtensor

_PLAIN = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("genloss", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``genloss::<schema>``; returns a function that calls it, or the implementation where nothing watches.

    One implementation serves every device: whether it launches kernels or runs PyTorch operators is an argument of the
    operator, since the backward runs on a thread that cannot see the forward's context. The dispatcher costs more than a
    small loss, and serves ``torch.compile``, modes, transforms and subclasses of tensors.
    """
    name, _, arguments = schema.partition("(")

    def dispatched(*args: Any) -> Any:
        # An exported program may call operators above autograd, where tensors that require a gradient take no out=.
        with _AutoDispatchBelowAutograd():
            return implementation(*args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, dispatched, "CompositeExplicitAutograd")
    torch.library.register_fake(f"genloss::{name}", fake, lib=_library)
    operator = getattr(torch.ops.genloss, name).default
    places = [
        k for k, argument in enumerate(arguments.partition(")")[0].split(",")) if argument.lstrip().startswith("Tensor")
    ]

    def call(*args: Any) -> Any:
        return implementation(*args) if unwatched([args[place] for place in places]) else operator(*args)

    return call


def unwatched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether no compiler, transform, mode or subclass needs to see an operator."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or _len_torch_dispatch_stack()
        or not all(map(_plain, tensors))
    )


def _plain(tensor: Tensor | None) -> bool:
    """Whether the tensor's memory holds its values: a lazy negation or zero, or a batch, only the dispatcher resolves."""
    if tensor is None:
        return True
    return type(tensor) in _PLAIN and not (tensor.is_neg() or tensor._is_zerotensor() or batched(tensor))


def batched(gradient: Tensor) -> bool:
    """Whether this is a batch of upstream gradients that looks like one of them: ``is_grads_batched``."""
    return is_legacy_batchedtensor(gradient)
