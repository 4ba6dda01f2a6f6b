"""Registering operators with PyTorch's dispatcher, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("genloss", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``genloss::<schema>`` and return its overload.

    One implementation serves every device: whether it launches kernels or runs PyTorch operators is an argument of the
    operator, since the backward runs on a thread that cannot see the forward's context.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"genloss::{name}", fake, lib=_library)
    return getattr(torch.ops.genloss, name).default
