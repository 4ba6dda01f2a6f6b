"""The operators and the autograd.Function of a loss of two elementwise terms, whose formulas families have registered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, pair
from .elementwise import Operands, arithmetic
from .elementwise_op import eager_backward, eager_forward, savable
from .formulas import formulas_of, reduced
from .library import register
from .pair import Sum, Term
from .reduction import Reduction


def _scalars(term: Term) -> tuple[float, float, float]:
    return term.s0, 0.0, 0.0


def _widened(term: Term, dtype: torch.dtype) -> Term:
    """The term in the arithmetic of both, where the other is in fp64 and it is not."""
    if arithmetic(term.operands) == dtype:
        return term
    return term._replace(a=term.a.to(dtype), b=None if term.b is None else term.b.to(dtype))


def _beta(rule: Sum, dtype: torch.dtype) -> float | Tensor:
    return rule.beta if rule.beta_tensor is None else rule.beta_tensor.to(dtype)


def _eager_forward(
    first: Term, second: Term, rule: Sum, dtype: torch.dtype, saved: Sequence[Sequence[Tensor]] = ((), ())
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = arithmetic([*first.operands, *second.operands])
    values = []
    for term, by_sample, kept in zip((first, second), rule.by_sample(), saved, strict=True):
        reduction = Reduction.SAMPLE if by_sample else rule.reduction
        operands = Operands(_widened(term, acc).operands, None, term.shape)
        value, _ = eager_forward(formulas_of(term.loss), operands, _scalars(term), term.flags, reduction, acc, kept)
        values.append(value)
    one, sums = values
    other = _distance(sums, rule)
    sums = one.new_empty(0) if rule.capacity is None else sums
    return (one + _beta(rule, acc) * other).to(dtype), one.to(dtype), other.to(dtype), sums


def _distance(value: Tensor, rule: Sum) -> Tensor:
    """The second term, from its sums by sample where it has a capacity."""
    if rule.capacity is None:
        return value
    value = (value - rule.capacity).abs()
    if rule.reduction == Reduction.SAMPLE:
        return value
    return value.sum() / value.size(0) if rule.reduction != Reduction.SUM else value.sum()


def _eager_backward(
    first: Term, second: Term, rule: Sum, sums: Tensor, upstreams: Sequence[Tensor | None], needed: Sequence[bool],
    saved: Sequence[Sequence[Tensor]] = ((), ()),
) -> list[Tensor | None]:  # fmt: skip
    acc = arithmetic([*first.operands, *second.operands])
    total, *own = (None if g is None else g.to(acc) for g in upstreams)
    found: list[Tensor | None] = []
    parts = zip(
        (first, second), (1.0, _beta(rule, acc)), own, rule.by_sample(), (needed[:2], needed[2:]), saved, strict=True
    )
    for term, factor, part, by_sample, wanted, kept in parts:
        if not any(wanted):
            found += [None, None]
            continue
        grad = first.a.new_zeros((), dtype=acc) if total is None else total * factor
        grad = grad if part is None else grad + part
        reduction = Reduction.SAMPLE if by_sample else rule.reduction
        if term is second and rule.capacity is not None:
            grad = grad * torch.sign(sums - rule.capacity) / rule.divisors(first, second)[1]
        operands, formulas = Operands(_widened(term, acc).operands, None, term.shape), formulas_of(term.loss)
        nothing = sums.new_empty(0)
        grads = eager_backward(
            formulas, operands, grad, nothing, _scalars(term), term.flags, reduction, [*wanted, False, False], kept
        )
        found += [
            None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads[:2], (term.a, term.b), strict=True)
        ]
    return found


def _forward(
    first: str, a: Tensor, b: Tensor | None, first_s0: float, first_flags: int,
    second: str, c: Tensor, d: Tensor | None, second_s0: float, second_flags: int,
    beta: float, beta_tensor: Tensor | None, capacity: float | None, reduction: int, dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    terms = Term(first, a, b, first_s0, first_flags), Term(second, c, d, second_s0, second_flags)
    rule = Sum(beta, beta_tensor, capacity, Reduction(reduction))
    if triton:
        values = formulas_of(first).kernels()[0], formulas_of(second).kernels()[0]
        return pair.forward(values, *terms, rule, dtype)
    return _eager_forward(*terms, rule, dtype)


def _forward_fake(
    first: str, a: Tensor, b: Tensor | None, first_s0: float, first_flags: int,
    second: str, c: Tensor, d: Tensor | None, second_s0: float, second_flags: int,
    beta: float, beta_tensor: Tensor | None, capacity: float | None, reduction: int, dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    samples = Term(second, c, d, second_s0, second_flags).shape[:1]
    shape = samples if reduction == Reduction.SAMPLE else ()
    sums = a.new_empty((0,) if capacity is None else samples, dtype=arithmetic((a, b, c, d)))
    return a.new_empty(shape, dtype=dtype), a.new_empty(shape, dtype=dtype), a.new_empty(shape, dtype=dtype), sums


def _backward(
    first: str, a: Tensor, b: Tensor | None, first_s0: float, first_flags: int,
    second: str, c: Tensor, d: Tensor | None, second_s0: float, second_flags: int,
    sums: Tensor, grad: Tensor | None, grad_first: Tensor | None, grad_second: Tensor | None,
    beta: float, beta_tensor: Tensor | None, capacity: float | None, reduction: int, needed: list[bool], triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    terms = Term(first, a, b, first_s0, first_flags), Term(second, c, d, second_s0, second_flags)
    rule = Sum(beta, beta_tensor, capacity, Reduction(reduction))
    upstreams = grad, grad_first, grad_second
    if triton:
        gradients = formulas_of(first).kernels()[1], formulas_of(second).kernels()[1]
        grads = pair.backward(gradients, *terms, rule, sums, upstreams, needed)
    else:
        grads = _eager_backward(*terms, rule, sums, upstreams, needed)
    da, db, dc, dd = (a.new_empty(0) if g is None else g for g in grads)
    return da, db, dc, dd


def _backward_fake(
    first: str, a: Tensor, b: Tensor | None, first_s0: float, first_flags: int,
    second: str, c: Tensor, d: Tensor | None, second_s0: float, second_flags: int,
    sums: Tensor, grad: Tensor | None, grad_first: Tensor | None, grad_second: Tensor | None,
    beta: float, beta_tensor: Tensor | None, capacity: float | None, reduction: int, needed: list[bool], triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    da, db, dc, dd = (
        a.new_empty(0) if t is None or not need else torch.empty_like(t)
        for t, need in zip((a, b, c, d), needed, strict=True)
    )
    return da, db, dc, dd


_TERMS = (
    "str first, Tensor a, Tensor? b, float first_s0, int first_flags,"
    " str second, Tensor c, Tensor? d, float second_s0, int second_flags"
)
_SUM = "float beta, Tensor? beta_tensor, float? capacity, int reduction"
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"

pair_forward = register(f"pair_forward({_TERMS}, {_SUM}, ScalarType dtype, bool triton) -> {_FOUR}", _forward, _forward_fake)
pair_backward = register(
    f"pair_backward({_TERMS}, Tensor sums, Tensor? grad, Tensor? grad_first, Tensor? grad_second, {_SUM}, bool[] needed,"
    f" bool triton) -> {_FOUR}",
    _backward,
    _backward_fake,
)


class Pair(torch.autograd.Function):
    """Loss, first and second term with their hand-written backward; also what the backward needs of the forward."""

    @staticmethod
    def forward(
        first: str, a: Tensor, b: Tensor | None, first_s0: float, first_flags: int,
        second: str, c: Tensor, d: Tensor | None, second_s0: float, second_flags: int,
        beta: float, beta_tensor: Tensor | None, capacity: float | None, reduction: int, dtype: torch.dtype, triton: bool,
        saves: tuple[int, int],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if not any(saves):
            return pair_forward(
                first, a, b, first_s0, first_flags, second, c, d, second_s0, second_flags,
                beta, beta_tensor, capacity, reduction, dtype, triton,
            )  # fmt: skip
        terms = Term(first, a, b, first_s0, first_flags), Term(second, c, d, second_s0, second_flags)
        kept = [[torch.empty_like(t.a, dtype=torch.float32) for _ in range(n)] for t, n in zip(terms, saves, strict=True)]
        rule = Sum(beta, beta_tensor, capacity, Reduction(reduction))
        return *_eager_forward(*terms, rule, dtype, kept), *kept[0], *kept[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *terms, beta, beta_tensor, capacity, reduction, _, triton, saves = inputs
        needs = ctx.needs_input_grad
        fixed = [output[place] for place, at in ((1, 1), (2, 6)) if not any(needs[at : at + 2])]
        ctx.mark_non_differentiable(*fixed, *output[3:])
        ctx.set_materialize_grads(False)
        first, a, b, first_s0, first_flags, second, c, d, second_s0, second_flags = terms
        ctx.save_for_backward(a, b, c, d, beta_tensor, *output[3:])
        ctx.first, ctx.second = (first, first_s0, first_flags), (second, second_s0, second_flags)
        ctx.beta, ctx.capacity, ctx.reduction, ctx.triton, ctx.saves = beta, capacity, reduction, triton, saves

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        a, b, c, d, beta_tensor, sums, *saved = ctx.saved_tensors
        upstreams = grads[:3]
        tensors = (a, b, c, d)
        # A term of which nothing was asked gets no gradient, rather than a 0 that infinities would make NaN.
        asked = [any(upstreams[place] is not None for place in places) for places in ((0, 1), (0, 2))]
        needed = [ctx.needs_input_grad[i] and asked[i > 2] for i in (1, 2, 6, 7)]
        (first, first_s0, first_flags), (second, second_s0, second_flags) = ctx.first, ctx.second
        terms = Term(first, a, b, first_s0, first_flags), Term(second, c, d, second_s0, second_flags)
        rule = Sum(ctx.beta, beta_tensor, ctx.capacity, Reduction(ctx.reduction))
        if not any(needed):
            result = [None] * 4
        elif torch.is_grad_enabled():
            a, b, c, d = tensors = autograd.apart(tensors)
            terms = terms[0]._replace(a=a, b=b), terms[1]._replace(a=c, b=d)
            given = [(v, g.to(v.dtype)) for v, g in zip(composed(*terms, rule), upstreams, strict=True) if g is not None]
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            found = iter(torch.autograd.grad([v for v, _ in given], wanted, [g for _, g in given], create_graph=True))
            result = [next(found) if need else None for need in needed]
        elif any(ctx.saves):
            kept = saved[: ctx.saves[0]], saved[ctx.saves[0] :]
            result = _eager_backward(*terms, rule, sums, upstreams, needed, kept)
        else:
            every = pair_backward(
                first, a, b, first_s0, first_flags, second, c, d, second_s0, second_flags,
                sums, *upstreams, ctx.beta, beta_tensor, ctx.capacity, ctx.reduction, needed, ctx.triton,
            )  # fmt: skip
            result = [g if need else None for g, need in zip(every, needed, strict=True)]
        return None, result[0], result[1], None, None, None, result[2], result[3], *(None,) * 9


def composed(first: Term, second: Term, rule: Sum) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, first and second term by the references: differentiable to any order."""
    acc, values = arithmetic([*first.operands, *second.operands]), []
    for term, by_sample in zip((first, second), rule.by_sample(), strict=True):
        reduction, operands = Reduction.SAMPLE if by_sample else rule.reduction, _widened(term, acc).operands
        values.append(reduced(term.loss, operands, None, _scalars(term), term.flags, reduction))
    one, other = values[0], _distance(values[1], rule)
    beta = _beta(rule, one.dtype)
    return one + (other if isinstance(beta, float) and beta == 1.0 else beta * other), one, other


def apply(
    first: Term, second: Term, rule: Sum, dtype: torch.dtype, *, triton: bool, by_reference: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, first and second term by the operators, or ``by_reference`` where a transform must see through them."""
    if by_reference:
        loss, one, other = composed(first, second, rule)
        return loss.to(dtype), one.to(dtype), other.to(dtype)
    saves = (0, 0)
    if not triton:
        acc = arithmetic([*first.operands, *second.operands])
        saves = tuple(
            0 if by_sample else savable(term.loss, _widened(term, acc).operands, term.flags, rule.reduction)
            for term, by_sample in zip((first, second), rule.by_sample(), strict=True)
        )
    loss, one, other, *_ = autograd.apply(
        Pair, *first, *second, rule.beta, rule.beta_tensor, rule.capacity, int(rule.reduction), dtype, triton, saves
    )
    return loss, one, other
