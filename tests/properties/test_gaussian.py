"""Gaussian divergence and negative log-likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import genloss_kernels as gk

from . import oracles
from .judging import WIDTHS, Loss, Recipe, recipes
from .operands import DTYPES, Values, operands
from .shapes import dtypes, narrower, shapes

NAMES = ("mu_q", "logvar_q", "mu_p", "logvar_p")

# Of log-variances, whose exponentials stay within the range of float16.
LOGVARS = st.builds(Values, st.just("normal"), st.sampled_from((1.0, 0.0, 2.0**-10, 2.0)))
MEANS = st.builds(Values, st.just("normal"), st.sampled_from((1.0, 0.0, 4.0)), st.sampled_from((0.0, 8.0)))


@st.composite
def _divergence(
    draw: st.DrawFn, wide: bool, general: bool, among: tuple[torch.dtype, ...] | None = None, **fixed: Any
) -> Recipe:
    shape = draw(shapes(wide=wide, least=1))
    kinds = draw(dtypes(4)) if among is None else (draw(st.sampled_from(among)),) * 4
    whole = draw(st.sampled_from(NAMES[:2]))
    given = {}
    for name, dtype in list(zip(NAMES, kinds, strict=True))[: 4 if general else 2]:
        if name in NAMES[2:] and draw(st.integers(0, 3)) == 3:
            continue
        own = shape if name == whole or draw(st.integers(0, 3)) else draw(narrower(shape))
        given[name] = operands(own, dtype, draw(MEANS if name.startswith("mu") else LOGVARS))
    options: dict[str, st.SearchStrategy[Any]] = {
        "reduction": st.sampled_from(("batchmean", "mean", "sum", "none")),
        "free_bits": st.sampled_from((None, None, 0.375)),
        "capacity": st.sampled_from((None, None, 2.5)),
        "logvar_clamp": st.sampled_from((None, None, (-1.0, 0.5))),
    }
    return draw(recipes(given, options | fixed, NAMES))


def _standard(wide: bool, **fixed: Any) -> st.SearchStrategy[Recipe]:
    return _divergence(wide, False, **fixed)


def _general(wide: bool, **fixed: Any) -> st.SearchStrategy[Recipe]:
    return _divergence(wide, True, **fixed)


def edges(
    free_bits: float | None = None, capacity: float | None = None, reduction: str = "", **rest: Any
) -> Iterator[Tensor]:
    """Where free bits hold a divergence, and where it meets the capacity."""
    kl = oracles.gaussian_kl(**rest, reduction="none")
    if free_bits is not None:
        yield kl - free_bits
        kl = kl.clamp(min=free_bits)
    if capacity is not None:
        yield (kl.sum(tuple(range(1, kl.dim()))) if kl.dim() > 1 else kl) - capacity


@st.composite
def _likelihood(draw: st.DrawFn, wide: bool) -> Recipe:
    shape = draw(shapes(wide=wide))
    kinds = draw(dtypes(3))
    given = {
        "input": operands(shape, kinds[0]),
        "target": operands(shape if draw(st.integers(0, 3)) else draw(narrower(shape)), kinds[1], draw(MEANS)),
    }
    options: dict[str, st.SearchStrategy[Any]] = {
        "full": st.booleans(),
        "eps": st.sampled_from((2.0**-20, 0.5)),
        "reduction": st.sampled_from(("mean", "sum", "none")),
    }
    if draw(st.integers(0, 5)) == 5:
        options["var"] = st.sampled_from((0.25, 2.0))
    else:
        sizes = [shape]
        if shape:
            place = draw(st.integers(0, len(shape) - 1))
            sizes += [shape[:-1], (*shape[:place], 1, *shape[place + 1 :])]
        given["var"] = operands(draw(st.sampled_from(sizes)), kinds[2], Values("positive"))
    return draw(recipes(given, options, ("input", "target", "var")))


LOSSES = {
    "gaussian_kl standard": Loss(gk.gaussian_kl, oracles.gaussian_kl, _standard, NAMES, edges=edges),
    "gaussian_kl general": Loss(gk.gaussian_kl, oracles.gaussian_kl, _general, NAMES, edges=edges),
    "gaussian_nll_loss": Loss(gk.gaussian_nll_loss, F.gaussian_nll_loss, _likelihood, ("input", "target", "var")),
}


@WIDTHS
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(name: str, wide: bool, hold: Callable[..., None]) -> None:
    hold(name, LOSSES[name], wide=wide, share=2)
