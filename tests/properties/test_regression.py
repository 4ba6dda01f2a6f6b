"""Squared, absolute and rounded-off errors, and the cosine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.testing import tolerance

from . import blocks
from .judging import WIDTHS, Loss, Recipe, recipes
from .operands import Values, operands
from .shapes import Among, dtypes, narrower, shapes

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")

REDUCTIONS = st.sampled_from(("mean", "sum", "none"))
VECTORS = st.sampled_from([Values(scale=s, offset=o) for s, o in ((1.0, 0.0), (2.0**-10, 0.0), (64.0, 0.0), (1.0, 1.0))])
OPERANDS = ("input", "target", "weight")


@st.composite
def _errors(
    draw: st.DrawFn,
    wide: bool,
    options: dict[str, st.SearchStrategy[Any]],
    weighted: bool = True,
    among: Among = None,
    alike: bool = False,
) -> Recipe:
    shape = draw(shapes(wide=wide))
    kinds = draw(dtypes(3, among))
    own = shape if alike or draw(st.integers(0, 3)) else draw(narrower(shape))
    given = {"input": operands(shape, kinds[0]), "target": operands(own, kinds[1])}
    if weighted and draw(st.booleans()):
        given["weight"] = operands(shape, kinds[2], Values("positive"))
    return draw(recipes(given, {"reduction": REDUCTIONS} | options, OPERANDS))


def _loss(function: Callable[..., Any], oracle: Callable[..., Any], *, weighted: bool = True, **options: Any) -> Loss:
    def drawn(wide: bool, weighted: bool = weighted, **rest: Any) -> st.SearchStrategy[Recipe]:
        return _errors(wide, options, weighted, **rest)

    return Loss(function, oracle, drawn, OPERANDS)


@st.composite
def _pairs(draw: st.DrawFn, wide: bool, widths: tuple[int, ...] = (3, 2, 8, 17, 33, 65)) -> Recipe:
    """Rows (N, D) or vectors (D), either of which may stand beside several of the other; no two of one direction."""
    kinds = draw(dtypes(2))
    n_cols = draw(st.sampled_from(widths))
    n_rows = draw(st.integers(1, 4)) + (2 * blocks.ELEMENTS // n_cols if wide else 0)
    rows: tuple[int, ...] = (n_rows,) if wide or draw(st.integers(0, 5)) else ()
    given = {"target": operands(rows, torch.int64, Values("signs"))}
    alone = draw(st.sampled_from((None, None, None, "input1", "input2"))) if rows else None
    for name, dtype in zip(("input1", "input2"), kinds, strict=True):
        own = (1,) if name == alone else rows
        given[name] = operands((*own, n_cols), dtype, draw(VECTORS), expandable=range(len(own)))
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
    hold(name, LOSSES[name], wide=wide)


def _mirrored(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, target, **rest: function(-input, -target, **rest)


def _exchanged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, target, **rest: function(target, input, **rest)


def _vectors_mirrored(input1: Tensor, input2: Tensor, target: Tensor, **rest: Any) -> Tensor:
    return gk.cosine_embedding_loss(-input1, -input2, target, **rest)


def _vectors_exchanged(input1: Tensor, input2: Tensor, target: Tensor, **rest: Any) -> Tensor:
    return gk.cosine_embedding_loss(input2, input1, target, **rest)


def _by_the_other_reductions(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The mean by the sum, and the sum by the elements."""

    def variant(input: Tensor, target: Tensor, reduction: str, **rest: Any) -> Tensor:
        if reduction == "mean":
            elements = torch.broadcast_shapes(input.shape, target.shape).numel()
            return function(input, target, reduction="sum", **rest) / elements
        found = function(input, target, reduction="none", **rest)
        return found.sum() if reduction == "sum" else found

    return variant


def _by_huber(input: Tensor, target: Tensor, beta: float, **rest: Any) -> Tensor:
    """Beta times smooth L1 is Huber's."""
    if not beta:
        return gk.l1_loss(input, target, **rest)
    return gk.huber_loss(input, target, delta=beta, **rest) / beta


def _columns_permuted(input1: Tensor, input2: Tensor, target: Tensor, **rest: Any) -> Tensor:
    order = torch.randperm(input1.size(-1), generator=torch.Generator().manual_seed(input1.size(-1))).to(input1.device)
    return gk.cosine_embedding_loss(input1.index_select(-1, order), input2.index_select(-1, order), target, **rest)


def _with(name: str, **fixed: Any) -> Loss:
    loss = LOSSES[name]
    return replace(loss, recipes=lambda wide: loss.recipes(wide, **fixed))


PRECISE = (torch.float32, torch.float64)
_COSINE = "cosine_embedding_loss"

# Ways to the same numbers.
INVARIANTS: dict[str, tuple[str, Loss, Callable[..., Tensor]]] = {
    "smooth_l1_loss by huber_loss": ("smooth_l1_loss", _with("smooth_l1_loss", among=PRECISE), _by_huber),
    "exchanged vectors": (_COSINE, LOSSES[_COSINE], _vectors_exchanged),
    "mirrored vectors": (_COSINE, LOSSES[_COSINE], _vectors_mirrored),
    "permuted columns": (_COSINE, LOSSES[_COSINE], _columns_permuted),
}
for _name in (name for name in LOSSES if name != _COSINE):
    _function = LOSSES[_name].function
    INVARIANTS |= {
        f"{_name}, mirrored": (_name, LOSSES[_name], _mirrored(_function)),
        f"{_name}, exchanged": (_name, _with(_name, alike=True), _exchanged(_function)),
        f"{_name}, reductions": (_name, _with(_name, weighted=False, among=PRECISE), _by_the_other_reductions(_function)),
    }


@pytest.mark.parametrize("name", INVARIANTS)
def test_invariant(name: str, hold: Callable[..., None]) -> None:
    loss_name, loss, variant = INVARIANTS[name]
    hold(loss_name, loss, wide=True, variant=variant)


def test_vectors_of_one_number(explore: Callable[..., None]) -> None:
    """Their cosine is 1 or -1, and its gradient the difference of two that are the inverse of the number."""

    def check(arguments: dict[str, Any]) -> bool:
        vectors = [arguments[name].requires_grad_() for name in ("input1", "input2")]
        found = gk.cosine_embedding_loss(**arguments | {"reduction": "sum", "margin": -2.0})
        for vector, gradient in zip(vectors, torch.autograd.grad(found, vectors), strict=True):
            row, inverse = tolerance(gradient.dtype), 1.0 / vector.detach().double().abs()
            pairs = arguments["target"].numel() // (vector.size(0) if vector.dim() > 1 else 1)
            # What epsilon, 1e-12, adds to a square makes a gradient.
            if (gradient.double().abs() > pairs * (4 * row.arithmetic * inverse + 2e-12 * inverse**3)).any():
                return False
        return True

    explore(_COSINE, _with(_COSINE, widths=(1,)), check)
