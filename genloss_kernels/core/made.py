"""Reduced losses on the CPU whose gradients are made in the forward, while a block of the operands is in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, backend
from .elementwise import arithmetic, divisor_of
from .formulas import Scalars, blocks, formulas_of, reduced
from .library import batched, unwatched
from .reduction import Reduction
from .scratch import Scratch


class Part(NamedTuple):
    """A term of a loss: an elementwise loss by the name of its formulas, reduced, and the factor that it has in the sum."""

    loss: str
    scalars: Scalars
    flags: int
    reduction: Reduction
    factor: float = 1.0


_OPERANDS = 4
_NOTHING = (False,) * _OPERANDS
_REDUCTIONS = (Reduction.MEAN, Reduction.SUM, Reduction.BATCHMEAN)


def fits(tensors: Sequence[Tensor | None], reduction: Reduction) -> bool:
    """Whether a term on these operands, on the eager path, can make its gradients, and would have a use for them."""
    first, *others = (t for t in tensors if t is not None)
    return (
        first.device.type == "cpu"
        and first.is_floating_point()
        and reduction in _REDUCTIONS
        and first.numel() > 0
        and all(t.dtype == first.dtype and t.shape == first.shape for t in others)
        and unwatched(tensors)
        and backend.plain(*tensors)
    )


def _make(
    part: Part,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    upstream: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[float, list[Tensor | None]]:
    """The reduced term and its gradients, in the dtype of the operands unless one is given."""
    first = tensors[0]
    assert first is not None
    formulas, scratch, divisor = formulas_of(part.loss), Scratch(), divisor_of(part.reduction, first.shape)
    gradients = [
        torch.empty_like(t, dtype=dtype) if need and t is not None else None for t, need in zip(tensors, needed, strict=True)
    ]
    acc = arithmetic(tensors)
    count = formulas.saves(part.flags) if acc == torch.float32 else 0
    total = 0.0
    for every in blocks([*tensors, *gradients], first.shape, by_sample=False):
        operands = [t if t is None else scratch.cast(f"operand {k}", t, acc) for k, t in enumerate(every[:_OPERANDS])]
        outputs = [
            g if g is None or g.dtype == acc else scratch.take(f"gradient {k}", g.shape, acc, g.device)
            for k, g in enumerate(every[_OPERANDS:])
        ]
        arguments = (*operands, part.scalars, part.flags, scratch)
        if formulas.both is not None:
            total += float(formulas.both(*arguments, upstream / divisor, outputs))
        else:
            shape = next(t.shape for t in operands if t is not None)
            saved = [scratch.take(f"saved {k}", shape, torch.float32, first.device) for k in range(count)]
            total += float(formulas.total(*arguments, saved))
            formulas.gradient(*arguments, upstream / divisor, outputs, saved)
        for gradient, output in zip(every[_OPERANDS:], outputs, strict=True):
            if gradient is not None and output is not None and gradient is not output:
                gradient.copy_(output)
    return total / divisor, gradients


class MadeInForward(torch.autograd.Function):
    """The sum of terms and, where there are several, each of them; the first backward hands over what the forward made."""

    @staticmethod
    def forward(ctx: Any, parts: tuple[Part, ...], dtype: torch.dtype, learn: bool, *tensors: Tensor | None) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.parts = parts
        terms = [(part, given, needed if learn else _NOTHING) for part, given, needed in _terms(ctx, tensors)]
        made = [_make(*term) for term in terms]
        ctx.made = [gradient for _, gradients in made for gradient in gradients]
        # No dtype of a result but fp64 holds more than fp32, and a factor of 0 must not hide that.
        most = torch.finfo(arithmetic(tensors)).max
        values = [math.copysign(math.inf, value) if abs(value) > most else value for value, _ in made]
        loss = sum(part.factor * value for part, value in zip(parts, values, strict=True))
        # On the operands' device, whatever the default one is.
        results = [torch.tensor(v, dtype=dtype, device="cpu") for v in ((loss, *values) if len(parts) > 1 else (loss,))]
        ctx.mark_non_differentiable(*(r for r, term in zip(results[1:], terms, strict=False) if not any(term[2])))
        return tuple(results)

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            return None, None, None, *_differentiable(ctx.parts, tensors, needed, upstreams)
        # In one step, for backwards of one graph on several threads; what a compiler has written to the context may be lost.
        made = ctx.made if torch.compiler.is_compiling() else ctx.__dict__.pop("made", None)
        of_sum, *own = map(_number, upstreams)
        result: list[Tensor | None] = []
        for k, (part, given, wanted) in enumerate(_terms(ctx, tensors)):
            asked = [] if of_sum is None else [of_sum * part.factor]
            asked += [] if not own or own[k] is None else [own[k]]
            # A term of which nothing was asked gets no gradient, rather than a 0 that infinities would make NaN.
            ready = None if made is None else made[k * _OPERANDS :][:_OPERANDS]
            result += _gradients(part, given, wanted, ready, sum(asked)) if asked else [None] * _OPERANDS
        return None, None, None, *result


def _terms(ctx: Any, tensors: Sequence[Tensor | None]) -> list[tuple[Part, Sequence[Tensor | None], Sequence[bool]]]:
    places = [slice(k * _OPERANDS, (k + 1) * _OPERANDS) for k in range(len(ctx.parts))]
    needed = ctx.needs_input_grad[3:]
    return [(part, tensors[place], needed[place]) for part, place in zip(ctx.parts, places, strict=True)]


def _number(upstream: Tensor | None) -> Any:
    """Its value, but of a batch, which has several, and not to a compiler."""
    if upstream is None or torch.compiler.is_compiling() or batched(upstream):
        return upstream
    return upstream.item()


def _gradients(
    part: Part, tensors: Sequence[Tensor | None], needed: Sequence[bool], made: list[Tensor | None] | None, factor: Any
) -> list[Tensor | None]:
    """Those ``made`` in the forward, or made now, times ``factor``; none is rounded to half precision before that."""
    acc = arithmetic(tensors)
    rounded = any(t is not None and t.dtype != acc for t in tensors)
    if rounded and isinstance(factor, Tensor):
        wide = _make(part, tensors, needed, dtype=acc)[1]
        return [g if g is None or t is None else (g * factor).to(t.dtype) for g, t in zip(wide, tensors, strict=True)]
    if rounded and factor != 1.0:
        return _make(part, tensors, needed, factor)[1]
    ready = _make(part, tensors, needed)[1] if made is None else made
    return [g if g is None else _scaled(g, factor) for g in ready]


def _scaled(gradient: Tensor, factor: Any) -> Tensor:
    if isinstance(factor, Tensor):
        return gradient * factor
    if factor == 1.0:
        return gradient
    # A transform forbids writing to what it did not make.
    return gradient.mul_(factor) if unwatched((gradient,)) else gradient * factor


def _differentiable(
    parts: Sequence[Part], tensors: Sequence[Tensor | None], needed: Sequence[bool], upstreams: Sequence[Tensor | None]
) -> list[Tensor | None]:
    tensors = autograd.apart(tensors)
    values = [
        reduced(part.loss, tensors[k * _OPERANDS :][:_OPERANDS], None, part.scalars, part.flags, part.reduction)
        for k, part in enumerate(parts)
    ]
    loss = torch.stack([part.factor * value for part, value in zip(parts, values, strict=True)]).sum()
    given = [(v, g.to(v.dtype)) for v, g in zip((loss, *values), upstreams, strict=False) if g is not None]
    wanted = [t for t, need in zip(tensors, needed, strict=True) if need and t is not None]
    found = iter(
        torch.autograd.grad([v for v, _ in given], wanted, [g for _, g in given], create_graph=True, allow_unused=True)
    )
    return [next(found) if need else None for need in needed]


def apply(parts: tuple[Part, ...], dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Loss, and of several ``parts`` each term; ``tensors`` are four operands for each part."""
    return MadeInForward.apply(parts, dtype, torch.is_grad_enabled(), *tensors)  # pyright: ignore[reportReturnType]
