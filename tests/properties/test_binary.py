"""Binary cross entropy of logits and of probabilities."""

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
from .operands import DTYPES, Values, operands
from .shapes import dtypes, narrower, shapes

REDUCTIONS = st.sampled_from(("mean", "sum", "none"))


@st.composite
def _of_logits(
    draw: st.DrawFn, wide: bool, among: tuple[torch.dtype, ...] | None = None, extras: bool = True, **fixed: Any
) -> Recipe:
    shape = draw(shapes(wide=wide))
    kinds = draw(dtypes(4)) if among is None else (draw(st.sampled_from(among)),) * 4
    given = {
        "input": operands(shape, kinds[0]),
        "target": operands(shape, kinds[1], Values("probability")),
    }
    if extras:
        for name, dtype in zip(("weight", "pos_weight"), kinds[2:], strict=True):
            if draw(st.booleans()):
                given[name] = operands(draw(narrower(shape)), dtype, Values("positive"))
        if draw(st.booleans()):
            given["mask"] = operands(draw(narrower(shape)), torch.bool, Values("bits"))
    options = {"reduction": REDUCTIONS, "label_smoothing": st.sampled_from((0.0, 0.125, 1.0))} | fixed
    return draw(recipes(given, options, ("input", "target")))


@st.composite
def _of_probabilities(draw: st.DrawFn, wide: bool) -> Recipe:
    shape, dtype = draw(shapes(wide=wide)), draw(st.sampled_from(DTYPES))
    learned = draw(st.booleans())
    given = {
        # A certain one's logarithm, which is the target's gradient, is infinite.
        "input": operands(shape, dtype, Values("doubt" if learned else "probability")),
        "target": operands(shape, dtype, Values("probability")),
    }
    if draw(st.booleans()):
        given["weight"] = operands(draw(narrower(shape)), dtype, Values("positive"))
    return draw(recipes(given, {"reduction": REDUCTIONS}, ("input", "target") if learned else ("input",)))


LOSSES = {
    "binary_cross_entropy_with_logits": Loss(
        gk.binary_cross_entropy_with_logits,
        oracles.binary_cross_entropy_with_logits,
        _of_logits,
        ("input", "target", "weight", "pos_weight"),
    ),
    "binary_cross_entropy": Loss(gk.binary_cross_entropy, F.binary_cross_entropy, _of_probabilities, ("input",)),
}


@WIDTHS
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(name: str, wide: bool, hold: Callable[..., None]) -> None:
    hold(name, LOSSES[name], wide=wide, share=2)
