"""Divergences of distributions and of logits, and entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import genloss_kernels as gk

from . import oracles
from .judging import WIDTHS, Loss, Recipe, recipes
from .operands import Values, normal, operands
from .shapes import dtypes, narrower, row_shapes, shapes

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")

REDUCTIONS = st.sampled_from(("batchmean", "mean", "sum", "none"))
BOTH = ("input", "target")


@st.composite
def _of_distributions(draw: st.DrawFn, wide: bool, **fixed: Any) -> Recipe:
    shape = draw(shapes(wide=wide, least=1))
    kinds, log_target = draw(dtypes(2)), draw(st.booleans())
    place = draw(st.integers(0, len(shape) - 1))
    scale = draw(st.sampled_from((1.0, 0.0, 4.0)))
    own = shape if draw(st.integers(0, 3)) else draw(narrower(shape))
    kind = "logarithms" if log_target else "distribution"
    given = {
        "input": operands(shape, kinds[0], Values("logarithms", scale, dim=place)),
        "target": operands(own, kinds[1], Values(kind if own == shape else "normal" if log_target else "doubt", 1.0, dim=place)),
    }
    options = {"reduction": REDUCTIONS, "log_target": st.just(log_target)}
    return draw(recipes(given, options | fixed, BOTH))


@st.composite
def of_logits(
    draw: st.DrawFn,
    wide: bool,
    options: dict[str, st.SearchStrategy[Any]],
    names: tuple[str, ...] = BOTH,
    among: tuple[torch.dtype, ...] | None = None,
    values: Callable[[], st.SearchStrategy[Values]] = normal,
) -> Recipe:
    shape = draw(row_shapes(wide=wide))
    kinds = draw(dtypes(len(names))) if among is None else (draw(st.sampled_from(among)),) * len(names)
    given = {name: operands(shape, dtype, draw(values())) for name, dtype in zip(names, kinds, strict=True)}
    return draw(recipes(given, {"reduction": REDUCTIONS} | options, names))


TEMPERATURES = {"temperature": st.sampled_from((1.0, 2.0, 0.75))}
BETAS = TEMPERATURES | {"beta": st.sampled_from((0.5, 0.25, 0.875))}


def _loss(
    function: Callable[..., Any],
    oracle: Callable[..., Any],
    options: dict[str, st.SearchStrategy[Any]],
    names: tuple[str, ...] = BOTH,
) -> Loss:
    # Gradients are p * (value - mean), and values of close distributions differences.
    return Loss(function, oracle, lambda wide, **rest: of_logits(wide, options, names, **rest), names, products=True)


LOSSES = {
    "kl_div": Loss(gk.kl_div, F.kl_div, _of_distributions, BOTH),
    **{
        f"kl_div_with_logits {direction}": _loss(
            gk.kl_div_with_logits, oracles.kl_div_with_logits, TEMPERATURES | {"direction": st.just(direction)}
        )
        for direction in ("forward", "reverse")
    },
    "js_div_with_logits": _loss(gk.js_div_with_logits, oracles.js_div_with_logits, BETAS),
    "categorical_entropy": _loss(gk.categorical_entropy, oracles.categorical_entropy, {}, ("logits",)),
}


@WIDTHS
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(name: str, wide: bool, hold: Callable[..., None]) -> None:
    hold(name, LOSSES[name], wide=wide, share=2)
