"""Cross entropy of labels and of probabilities, linear cross entropy, negative log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import genloss_kernels as gk

from . import blocks, oracles
from .judging import WIDTHS, Loss, Recipe, recipes, vanish
from .operands import DTYPES, GRID_SCALES, Operand, Values, normal, operands
from .shapes import class_shapes

REDUCTIONS = st.sampled_from(("mean", "sum", "none"))
PRECISE = (torch.float32, torch.float64)

# Numbers that float32 holds exactly: the interpreter hands a kernel nothing wider.
LOSS_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "reduction": REDUCTIONS,
    "label_smoothing": st.sampled_from((0.0, 0.125, 1.0)),
    # High enough to leave tanh digits at the largest of the logits.
    "softcap": st.sampled_from((None, None, 64.0)),
    "logit_scale": st.sampled_from((1.0, 0.75, -1.5)),
    "z_loss": st.sampled_from((0.0, 0.0, 2.0**-6)),
    "return_stats": st.booleans(),
}

# Of one class what softmax and label leave is exactly 0 in torch, and here but for the rounding of what is added to either.
ONE_CLASS = {"label_smoothing": st.just(0.0), "z_loss": st.just(0.0)}

PLAIN: dict[str, Any] = {
    "label_smoothing": st.just(0.0), "softcap": st.none(), "logit_scale": st.just(1.0), "z_loss": st.just(0.0),
    "return_stats": st.just(False),
}  # fmt: skip


@st.composite
def _labels(draw: st.DrawFn, shape: tuple[int, ...], n_classes: int) -> tuple[Operand, int]:
    """Labels, some of which are the ignored one or none is, and which that is: any integer."""
    ignore_index = draw(st.sampled_from((-100, 0, n_classes - 1, 255, -(2**40))))
    ignored = ignore_index if draw(st.booleans()) else None
    small = n_classes <= 200 and 0 <= ignore_index <= 255 and draw(st.booleans())
    dtype = torch.uint8 if small else torch.int64
    values = Values("labels", classes=n_classes, ignored=ignored)
    return draw(operands(shape, dtype, values, expandable=())), ignore_index


def _divisors(dtype: torch.dtype) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.just(2.5), operands((), dtype, Values("positive", 8.0)))


@st.composite
def _cross_entropy(
    draw: st.DrawFn,
    wide: bool,
    probabilities: bool,
    values: Callable[..., st.SearchStrategy[Values]] = normal,
    among: tuple[torch.dtype, ...] = DTYPES,
    **fixed: Any,
) -> Recipe:
    shape = draw(class_shapes(wide=wide))
    place = min(1, len(shape) - 1)
    n_classes, rows = shape[place], (*shape[:place], *shape[place + 1 :])
    dtype = draw(st.sampled_from(among))
    options = LOSS_OPTIONS | fixed | (ONE_CLASS if n_classes == 1 else {})
    options["label_smoothing"] = st.just(smoothing := draw(options["label_smoothing"]))
    # Even odds on both sides leave nothing to compare but rounding.
    uneven = [d for d in range(len(shape)) if d != place]
    if smoothing == 1.0:
        given = {"input": operands(shape, dtype, draw(values(scales=GRID_SCALES)), expandable=uneven)}
    else:
        given = {"input": operands(shape, dtype, draw(values()))}
    if probabilities:
        other = draw(st.sampled_from((dtype, dtype, *among)))
        mass = Values("distribution", draw(st.sampled_from((1.0, 8.0))), dim=place)
        given["target"] = operands(shape, other, mass, expandable=uneven)
    else:
        target, ignore_index = draw(_labels(rows, n_classes))
        given["target"] = st.just(target)
        options |= {"ignore_index": st.just(ignore_index)}
    if draw(st.booleans()):
        given["weight"] = operands((n_classes,), dtype, Values("positive"))
    reduction = draw(options["reduction"])
    extra = draw(st.booleans()) and "softcap" not in fixed
    if extra:
        given["row_weight"] = operands(rows, dtype, Values("positive"))
    if extra and reduction == "mean" and (divisor := draw(_divisors(torch.float32))) is not None:
        if isinstance(divisor, Operand):
            given["divisor"] = st.just(divisor)
        else:
            options["divisor"] = st.just(divisor)
    return draw(recipes(given, options | {"reduction": st.just(reduction)}, ("input", *["target"] * probabilities)))


def _of_labels(wide: bool, **fixed: Any) -> st.SearchStrategy[Recipe]:
    return _cross_entropy(wide, False, **fixed)


def _of_probabilities(wide: bool, **fixed: Any) -> st.SearchStrategy[Recipe]:
    return _cross_entropy(wide, True, **fixed)


@st.composite
def _nll(draw: st.DrawFn, wide: bool, among: tuple[torch.dtype, ...] = DTYPES) -> Recipe:
    shape = draw(class_shapes(wide=wide))
    place = min(1, len(shape) - 1)
    rows = (*shape[:place], *shape[place + 1 :])
    if wide and len(rows) == 1:
        # As many rows as make several tiles.
        rows = (rows[0] + 2 * blocks.ELEMENTS,)
        shape = (*rows, shape[1])
    dtype = draw(st.sampled_from(among))
    target, ignore_index = draw(_labels(rows, shape[place]))
    given = {"input": operands(shape, dtype, Values("logarithms", 2.0, dim=place)), "target": st.just(target)}
    if draw(st.booleans()):
        given["weight"] = operands((shape[place],), dtype, Values("positive"))
    return draw(recipes(given, {"reduction": REDUCTIONS, "ignore_index": st.just(ignore_index)}, ("input",)))


@st.composite
def _linear(
    draw: st.DrawFn, wide: bool, among: tuple[torch.dtype, ...] = DTYPES, several: bool = False, **fixed: Any
) -> Recipe:
    """A layer and what goes into it; with a bias or not, of labels or probabilities, in one dtype as torch asks."""
    dtype = draw(st.sampled_from(among))
    chunks, chunk = ((blocks.ROWS + 3,), (9,), (2, 5), (3, 2, 2)), ((2,), (), (1,), (2, 2), (0,))
    rows: tuple[int, ...] = draw(st.sampled_from(chunks if wide else chunk))
    width, n_classes = draw(st.sampled_from((3, 1, 8, 17))), draw(st.sampled_from((7, 1, 2, 33, 65)))
    inner = (3,) if len(rows) == 1 and not several and draw(st.integers(0, 7)) == 7 else ()
    layer = (n_classes, *inner)
    scale = draw(st.sampled_from((1.0, 2.0**-10, 4.0)))
    # Of classes that differ: even odds on both sides leave nothing to compare but rounding.
    given = {
        "input": operands((*rows, width), dtype, Values(scale=scale)),
        "linear_weight": operands((*layer, width), dtype, Values(scale=0.5), expandable=(1, 2)),
    }
    if draw(st.booleans()):
        given["linear_bias"] = operands(layer, dtype, Values(), expandable=(1,))
    options = LOSS_OPTIONS | fixed | (ONE_CLASS if n_classes == 1 else {})
    differentiable = ("input", "linear_weight", "linear_bias")
    if draw(st.booleans()):
        place = 1 if inner else len(rows)
        given["target"] = operands((*rows, *layer), dtype, Values("distribution", dim=place), expandable=range(place))
        differentiable += ("target",)
    else:
        target, ignore_index = draw(_labels((*rows, *inner), n_classes))
        given["target"] = st.just(target)
        options |= {"ignore_index": st.just(ignore_index)}
    if draw(st.booleans()):
        given["weight"] = operands((n_classes,), dtype, Values("positive"))
    if draw(st.booleans()):
        given["row_weight"] = operands((*rows, *inner), dtype, Values("positive"))
    if not several:
        options["options"] = st.sampled_from((None, gk.LinearCrossEntropyOptions(gather_rows=True)))
    return draw(recipes(given, options, differentiable))


def _torch_nll(input: Tensor, target: Tensor, **rest: Any) -> Tensor:
    return F.nll_loss(input, target.long(), **rest)


HALVES = {dtype: dtype for dtype in (torch.float16, torch.bfloat16)}

LOSSES = {
    "cross_entropy of labels": Loss(gk.cross_entropy, oracles.cross_entropy, _of_labels, ("input",)),
    "cross_entropy of probabilities": Loss(
        gk.cross_entropy, oracles.cross_entropy, _of_probabilities, ("input", "target"), precise=False
    ),
    "linear_cross_entropy": Loss(
        gk.linear_cross_entropy, oracles.linear_cross_entropy, _linear, ("input", "target"), products=True, judge=HALVES
    ),
    "nll_loss": Loss(gk.nll_loss, _torch_nll, _nll, ("input",), blocks=False),
}  # fmt: skip


@WIDTHS
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(name: str, wide: bool, hold: Callable[..., None]) -> None:
    hold(name, LOSSES[name], wide=wide)


def _permutation(size: int, device: torch.device) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size)).to(device)


def _shifted(input: Tensor, target: Tensor, **rest: Any) -> Any:
    """By a number for each row, which these logits take exactly."""
    shape = [1 if d == min(1, input.dim() - 1) else n for d, n in enumerate(input.shape)]
    shift = torch.arange(math.prod(shape), device=input.device).view(shape) % 64 - 32
    return gk.cross_entropy(input + shift.to(input), target, **rest)


def _classes_permuted(input: Tensor, target: Tensor, weight: Tensor | None = None, **rest: Any) -> Any:
    place = min(1, input.dim() - 1)
    order = _permutation(input.size(place), input.device)
    if target.is_floating_point():
        target = target.index_select(place, order)
    else:
        valid = target != rest["ignore_index"]
        target = torch.where(valid, order.argsort()[torch.where(valid, target, 0).long()], -100)
        rest["ignore_index"] = -100
    weight = None if weight is None else weight[order]
    return gk.cross_entropy(input.index_select(place, order), target, weight, **rest)


def _rows_permuted(input: Tensor, target: Tensor, row_weight: Tensor | None = None, **rest: Any) -> Any:
    if input.dim() == 1:
        return gk.cross_entropy(input, target, row_weight=row_weight, **rest)
    order = _permutation(input.size(0), input.device)
    row_weight = None if row_weight is None else row_weight[order]
    found = gk.cross_entropy(input[order], target[order], row_weight=row_weight, **rest)
    return found[order.argsort()] if rest["reduction"] == "none" else found


def _mean_of_rows(input: Tensor, target: Tensor, weight: Tensor | None = None, **rest: Any) -> Tensor:
    """``sum`` and ``mean`` of cross entropy without extras from ``none``."""
    rest, reduction = rest | {"reduction": "none"}, rest["reduction"]
    rows = gk.cross_entropy(input, target, weight, **rest)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if target.is_floating_point():
        return rows.sum() / rows.numel()
    valid = target != rest["ignore_index"]
    weight = input.new_ones(input.size(min(1, input.dim() - 1))) if weight is None else weight
    return rows.sum() / torch.where(valid, weight[torch.where(valid, target, 0).long()], 0.0).sum()


def _by_the_sum(input: Tensor, target: Tensor, **rest: Any) -> Tensor:
    """``sum`` is the mean times what that divides by."""
    if rest["reduction"] != "sum":
        return gk.cross_entropy(input, target, **rest)
    return 8.0 * gk.cross_entropy(input, target, **rest | {"reduction": "mean"}, divisor=8.0)


def _of_log_softmax(input: Tensor, target: Tensor, **rest: Any) -> Tensor:
    for name in ("label_smoothing", "softcap", "logit_scale", "z_loss", "return_stats"):
        rest.pop(name)
    return gk.nll_loss(torch.log_softmax(input, min(1, input.dim() - 1)), target, **rest)


def _in_chunks(size: int) -> Callable[..., Any]:
    options = gk.LinearCrossEntropyOptions(batch_chunk_size=size)
    return lambda *tensors, **rest: gk.linear_cross_entropy(*tensors, **rest | {"options": options})


def _within(budget: int) -> Callable[..., Any]:
    """Bytes for so many rows of logits; in half precision the gradient's copy counts too."""

    def variant(input: Tensor, linear_weight: Tensor, target: Tensor, **rest: Any) -> Any:
        row = 8 * linear_weight[..., 0].numel() * input.element_size()
        options = gk.LinearCrossEntropyOptions(memory_budget=budget * row)
        return gk.linear_cross_entropy(input, linear_weight, target, **rest | {"options": options})

    return variant


def _of_logits(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None, **rest: Any) -> Any:
    """Cross entropy of logits (N, V), made beforehand."""
    rows, n_classes = input.shape[:-1], linear_weight.size(0)
    logits = F.linear(input, linear_weight, linear_bias).reshape(-1, n_classes)
    target = target.reshape(-1, n_classes) if target.is_floating_point() else target.reshape(-1)
    row_weight = rest.pop("row_weight", None)
    row_weight = None if row_weight is None else row_weight.reshape(-1)
    found = gk.cross_entropy(logits, target, row_weight=row_weight, **rest)
    return found.reshape(rows) if rest["reduction"] == "none" else found


def _with(name: str, **fixed: Any) -> Loss:
    loss = LOSSES[name]
    return replace(loss, recipes=lambda wide: loss.recipes(wide, **fixed))


_LABELS, _PROBABILITIES, _LINEAR = "cross_entropy of labels", "cross_entropy of probabilities", "linear_cross_entropy"
_ON_A_GRID = {"among": PRECISE, "values": partial(normal, "grid"), **PLAIN}
_NO_STATISTICS = {"return_stats": st.just(False)}

# Ways to the same numbers.
INVARIANTS: dict[str, tuple[str, Loss, Callable[..., Any]]] = {
    "shifted logits": (_LABELS, _with(_LABELS, **_ON_A_GRID), _shifted),
    "shifted logits, probabilities": (_PROBABILITIES, _with(_PROBABILITIES, **_ON_A_GRID), _shifted),
    "permuted classes": (_LABELS, _with(_LABELS, **_NO_STATISTICS), _classes_permuted),
    "permuted classes, probabilities": (_PROBABILITIES, _with(_PROBABILITIES, **_NO_STATISTICS), _classes_permuted),
    "permuted rows": (_LABELS, _with(_LABELS, **_NO_STATISTICS), _rows_permuted),
    "permuted rows, probabilities": (_PROBABILITIES, _with(_PROBABILITIES, **_NO_STATISTICS), _rows_permuted),
    "reduced rows": (_LABELS, _with(_LABELS, among=PRECISE, **PLAIN), _mean_of_rows),
    "reduced rows, probabilities": (_PROBABILITIES, _with(_PROBABILITIES, among=PRECISE, **PLAIN), _mean_of_rows),
    "sum by the mean": (_LABELS, _with(_LABELS, among=PRECISE, **PLAIN), _by_the_sum),
    "log-likelihood of log_softmax": (_LABELS, _with(_LABELS, among=PRECISE, **PLAIN), _of_log_softmax),
    "chunks of one row": (_LINEAR, _with(_LINEAR, several=True), _in_chunks(1)),
    "chunks of two rows": (_LINEAR, _with(_LINEAR, several=True), _in_chunks(2)),
    "one chunk": (_LINEAR, _with(_LINEAR, several=True), _in_chunks(64)),
    "chunks within a budget": (_LINEAR, _with(_LINEAR, several=True), _within(3)),
    "logits beforehand": (_LINEAR, _with(_LINEAR, several=True, among=PRECISE, **_NO_STATISTICS), _of_logits),
}  # fmt: skip


@pytest.mark.parametrize("name", INVARIANTS)
def test_invariant(name: str, hold: Callable[..., None]) -> None:
    loss_name, loss, variant = INVARIANTS[name]
    hold(loss_name, loss, wide=True, variant=variant)


@pytest.mark.parametrize("name", [_LABELS, _PROBABILITIES])
def test_gradients_of_rows_sum_to_0(name: str, explore: Callable[..., None]) -> None:
    """Softmax less a distribution: nothing is left for all logits together."""
    plain = PLAIN | {"label_smoothing": LOSS_OPTIONS["label_smoothing"], "reduction": st.just("none")}

    def check(arguments: dict[str, Any]) -> bool:
        logits = arguments["input"].requires_grad_()
        (grad,) = torch.autograd.grad(gk.cross_entropy(**arguments).sum(), logits)
        # Each of the two sums to 1 at most, times a weight of 1.25 at most.
        return vanish(grad.movedim(min(1, grad.dim() - 1), -1), 2.5)

    explore(name, _with(name, **plain), check)
