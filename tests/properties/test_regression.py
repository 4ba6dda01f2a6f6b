"""Squared, absolute and rounded-off errors, and the cosine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import genloss_kernels as gk

from . import blocks
from .judging import WIDTHS, Loss, Recipe, recipes
from .operands import Values, operands
from .shapes import dtypes, narrower, shapes

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")

REDUCTIONS = st.sampled_from(("mean", "sum", "none"))
OPERANDS = ("input", "target", "weight")


@st.composite
def _errors(
    draw: st.DrawFn,
    wide: bool,
    options: dict[str, st.SearchStrategy[Any]],
    weighted: bool = True,
    among: tuple[torch.dtype, ...] | None = None,
) -> Recipe:
    shape = draw(shapes(wide=wide))
    kinds = draw(dtypes(3)) if among is None else (draw(st.sampled_from(among)),) * 3
    own = shape if draw(st.integers(0, 3)) else draw(narrower(shape))
    given = {"input": operands(shape, kinds[0]), "target": operands(own, kinds[1])}
    if weighted and draw(st.booleans()):
        given["weight"] = operands(shape, kinds[2], Values("positive"))
    return draw(recipes(given, {"reduction": REDUCTIONS} | options, OPERANDS))


def _loss(function: Callable[..., Any], oracle: Callable[..., Any], *, weighted: bool = True, **options: Any) -> Loss:
    return Loss(function, oracle, lambda wide, **rest: _errors(wide, options, weighted, **rest), OPERANDS)


@st.composite
def _pairs(draw: st.DrawFn, wide: bool, among: tuple[torch.dtype, ...] | None = None) -> Recipe:
    """Rows (N, D) or vectors (D), either of which may stand beside several of the other."""
    kinds = draw(dtypes(2)) if among is None else (draw(st.sampled_from(among)),) * 2
    n_cols = draw(st.sampled_from((3, 1, 2, 8, 17, 33, 65)))
    n_rows = draw(st.integers(1, 4)) + (2 * blocks.ELEMENTS // n_cols if wide else 0)
    rows: tuple[int, ...] = (n_rows,) if wide or draw(st.integers(0, 5)) else ()
    given = {"target": operands(rows, torch.int64, Values("signs"))}
    alone = draw(st.sampled_from((None, None, None, "input1", "input2"))) if rows else None
    scales = st.sampled_from((1.0, 2.0**-10, 64.0))
    for name, dtype in zip(("input1", "input2"), kinds, strict=True):
        own = (1,) if name == alone else rows
        given[name] = operands((*own, n_cols), dtype, Values(scale=draw(scales), offset=draw(st.sampled_from((0.0, 0.0, 1.0)))))
    options = {"margin": st.sampled_from((0.25, -0.5)), "reduction": REDUCTIONS}
    return draw(recipes(given, options, ("input1", "input2")))


def _margin(input1: Tensor, input2: Tensor, target: Tensor, margin: float, **_: Any) -> Iterator[Tensor]:
    yield F.cosine_similarity(input1, input2, -1) - margin


LOSSES = {
    "mse_loss": _loss(gk.mse_loss, F.mse_loss),
    "l1_loss": _loss(gk.l1_loss, F.l1_loss),
    "smooth_l1_loss": _loss(gk.smooth_l1_loss, F.smooth_l1_loss, weighted=False, beta=st.sampled_from((1.0, 0.25, 0.0))),
    "huber_loss": _loss(gk.huber_loss, F.huber_loss, delta=st.sampled_from((1.0, 0.25, 8.0))),
    "cosine_embedding_loss": Loss(
        gk.cosine_embedding_loss, F.cosine_embedding_loss, _pairs, ("input1", "input2"), edges=_margin
    ),
}


@WIDTHS
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(name: str, wide: bool, hold: Callable[..., None]) -> None:
    hold(name, LOSSES[name], wide=wide, share=2)
