"""Gradients that a forward made: kept until the first backward, which scales them in place and hands them over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .library import batched
from .scaling import scale_


def keep(ctx: Any, operands: Sequence[Tensor | None], made: tuple[Tensor, ...]) -> None:
    """Save ``operands`` and, where no compiler must see them among these, the gradients beside them."""
    compiling = torch.compiler.is_compiling()
    ctx.save_for_backward(*operands, *(made if compiling else ()))
    ctx.made = None if compiling else made


def hand_over(
    ctx: Any, stored: Sequence[Tensor], grad: Tensor, make: Callable[[], Sequence[Tensor]], *, triton: bool
) -> tuple[Tensor, ...]:
    """The gradients times ``grad``; what the forward made is given away once, and after that made again.

    ``stored`` is what was saved beside the operands, which checkpointing lets a backward read but once.
    """
    if stored:
        return tuple(g * grad for g in stored)
    compiling = torch.compiler.is_compiling()  # where what is written to the context may be lost
    # In one step, for backwards of one graph on several threads.
    made = ctx.made if compiling else ctx.__dict__.pop("made", None)
    if made is None:
        made = make()
    # A transform forbids writing to what it did not make.
    if compiling or batched(grad) or torch._C._are_functorch_transforms_active():
        return tuple(g * grad for g in made)
    scale_(made, grad, triton=triton)
    return tuple(made)
