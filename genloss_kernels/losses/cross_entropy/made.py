"""Cross entropy whose gradient the forward makes beside the loss: logits read once and their gradient written once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import (
    _top_saved_tensors_default_hooks,  # pyright: ignore[reportAttributeAccessIssue, reportMissingModuleSource]
)

from ...core import autograd, backend
from ...core.handover import hand_over, keep
from ...core.library import unwatched
from ...core.reduction import Reduction, accumulator, launch_reduction
from . import reference
from .op import gradient_like, loss_and_gradient, reference_gradients
from .reference import Options


def fits(input: Tensor, target: Tensor, rest: Sequence[Tensor | None], options: Options) -> bool:
    """Whether the gradient may be made in the forward: of labels and one number, asked for, and not rounded to nothing.

    Before a loss scale, most of a gradient in fp16 is below the smallest number of that dtype. Activation checkpointing
    and offloading look at what is saved, which must not depend on the thread that recomputes it.
    """
    return (
        backend.gradients_made_in_forward()
        and input.requires_grad
        and not target.is_floating_point()
        and options.reduction != Reduction.NONE
        and not options.stats
        and input.dtype != torch.float16
        and unwatched((input, target, *rest))
        and _top_saved_tensors_default_hooks(False) is None
    )


def _make(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
    options: Options, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    acc = accumulator(logits.dtype)
    if options.by_normalizer(divisor):
        divisor = reference.mean_divisor(target, weight, row_weight, logits.size(1), target != options.ignore_index, acc)
    gradient, one = gradient_like(logits), torch.ones((), dtype=acc, device=logits.device)
    rows = loss_and_gradient(logits, target, weight, row_weight, divisor, one, options, gradient, None, True)
    loss = torch.empty((), dtype=dtype, device=logits.device)
    by = options.number(divisor) if divisor is None else divisor
    launch_reduction((rows, None, None, None), (loss, None, None, None), rows.numel(), acc, divisor=by)
    return loss, gradient


class CrossEntropyMadeInForward(torch.autograd.Function):
    """Mean or sum over labels; the first backward scales the gradient in place and hands it over."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
        options: Options, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.options = options
        tensors = logits, target, weight, row_weight, divisor
        loss, gradient = _make(*tensors, options, dtype)
        keep(ctx, tensors, (gradient,))
        return loss

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,), nothing = grads, (None,) * 6
        if grad is None:
            return None, *nothing
        logits, target, weight, row_weight, divisor = ctx.saved_tensors
        if torch.is_grad_enabled():
            upstream = (grad, None, None, None)
            found, _ = reference_gradients(
                logits, target, weight, row_weight, divisor, ctx.options, upstream, need_logits=True, need_target=False
            )
            return found, *nothing

        def make() -> tuple[Tensor, ...]:
            return _make(logits, target, weight, row_weight, divisor, ctx.options, grad.dtype)[1:]

        (made,) = hand_over(ctx, (), grad, make, triton=True)
        return made, *nothing
