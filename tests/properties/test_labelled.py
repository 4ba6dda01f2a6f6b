"""Cross entropy of labels and of probabilities, linear cross entropy, negative log-likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import genloss_kernels as gk

from . import blocks, oracles
from .judging import WIDTHS, Loss, Recipe, judge, recipes, vanishes
from .operands import DTYPES, Operand, Values, normal, operands
from .shapes import class_shapes, dtypes

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

# Of one class the gradient is 0 as the difference of what smoothing parts, which torch does not part.
ONE_CLASS = {"label_smoothing": st.just(0.0)}

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
    return draw(operands(shape, dtype, values, expandable=False)), ignore_index


def _divisors(dtype: torch.dtype) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.just(2.5), operands((), dtype, Values("positive", 8.0)))


@st.composite
def _cross_entropy(
    draw: st.DrawFn,
    wide: bool,
    probabilities: bool,
    values: Callable[[], st.SearchStrategy[Values]] = normal,
    among: tuple[torch.dtype, ...] = DTYPES,
    **fixed: Any,
) -> Recipe:
    shape = draw(class_shapes(wide=wide))
    place = min(1, len(shape) - 1)
    n_classes, rows = shape[place], (*shape[:place], *shape[place + 1 :])
    dtype = draw(st.sampled_from(among))
    given = {"input": operands(shape, dtype, draw(values()))}
    options = LOSS_OPTIONS | fixed
    if probabilities:
        other = draw(st.sampled_from((dtype, dtype, *among)))
        mass = Values("distribution", draw(st.sampled_from((1.0, 8.0))), dim=place)
        given["target"] = operands(shape, other, mass)
    else:
        target, ignore_index = draw(_labels(rows, n_classes))
        given["target"] = st.just(target)
        options |= {"ignore_index": st.just(ignore_index)} | (ONE_CLASS if n_classes == 1 else {})
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
    rows = tuple(draw(st.sampled_from([(blocks.ROWS + 3,), (9,), (2, 5), (3, 2, 2)] if wide else [(2,), (), (1,), (2, 2), (0,)])))
    width, n_classes = draw(st.sampled_from((3, 1, 8, 17))), draw(st.sampled_from((7, 1, 2, 33, 65)))
    inner = (3,) if len(rows) == 1 and not several and draw(st.integers(0, 7)) == 7 else ()
    layer = (n_classes, *inner)
    scale = draw(st.sampled_from((1.0, 0.0, 4.0)))
    given = {
        "input": operands((*rows, width), dtype, Values(scale=scale)),
        "linear_weight": operands((*layer, width), dtype, Values(scale=0.5)),
    }
    if draw(st.booleans()):
        given["linear_bias"] = operands(layer, dtype, Values())
    options = LOSS_OPTIONS | fixed
    differentiable = ("input", "linear_weight", "linear_bias")
    if draw(st.booleans()):
        place = 1 if inner else len(rows)
        given["target"] = operands((*rows, *layer), dtype, Values("distribution", dim=place))
        differentiable += ("target",)
    else:
        target, ignore_index = draw(_labels((*rows, *inner), n_classes))
        given["target"] = st.just(target)
        options |= {"ignore_index": st.just(ignore_index)} | (ONE_CLASS if n_classes == 1 else {})
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
    hold(name, LOSSES[name], wide=wide, share=2)
