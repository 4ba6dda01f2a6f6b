"""Binary cross entropy of logits and of probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from .shapes import Among, dtypes, narrower, shapes

PRECISE = (torch.float32, torch.float64)
REDUCTIONS = st.sampled_from(("mean", "sum", "none"))


@st.composite
def _of_logits(
    draw: st.DrawFn,
    wide: bool,
    among: Among = None,
    extras: bool = True,
    target: str = "probability",
    **fixed: Any,
) -> Recipe:
    shape = draw(shapes(wide=wide))
    kinds = draw(dtypes(4, among))
    given = {
        "input": operands(shape, kinds[0]),
        "target": operands(shape, kinds[1], Values(target)),
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
    hold(name, LOSSES[name], wide=wide)


def _mirrored(input: Tensor, target: Tensor, weight: Tensor | None = None, **rest: Any) -> Tensor:
    """The other class's view of targets 0 and 1."""
    return gk.binary_cross_entropy_with_logits(-input, 1.0 - target, weight, **rest)


def _selected(input: Tensor, target: Tensor, mask: Tensor, **rest: Any) -> Tensor:
    """The mask's elements alone."""
    if rest["reduction"] == "none":
        return gk.binary_cross_entropy_with_logits(input, target, mask=mask, **rest)
    return gk.binary_cross_entropy_with_logits(input[mask], target[mask], **rest)


def _permuted(input: Tensor, target: Tensor, **rest: Any) -> Tensor:
    order = torch.randperm(input.numel(), generator=torch.Generator().manual_seed(input.numel())).to(input.device)
    found = gk.binary_cross_entropy_with_logits(input.reshape(-1)[order], target.reshape(-1)[order], **rest)
    return found[order.argsort()].view(input.shape) if rest["reduction"] == "none" else found


def _by_the_other_reductions(input: Tensor, target: Tensor, **rest: Any) -> Tensor:
    """The mean by the sum, and the sum by the elements."""
    reduction = rest.pop("reduction")
    if reduction == "mean":
        return gk.binary_cross_entropy_with_logits(input, target, **rest, reduction="sum") / input.numel()
    found = gk.binary_cross_entropy_with_logits(input, target, **rest, reduction="none")
    return found.sum() if reduction == "sum" else found


def _with(**fixed: Any) -> Loss:
    loss = LOSSES["binary_cross_entropy_with_logits"]
    return replace(loss, recipes=lambda wide: loss.recipes(wide, **fixed))


@st.composite
def _masked(draw: st.DrawFn, wide: bool) -> Recipe:
    shape, dtype = draw(shapes(wide=wide)), draw(st.sampled_from(DTYPES))
    given = {
        "input": operands(shape, dtype),
        "target": operands(shape, dtype, Values("probability")),
        "mask": operands(shape, torch.bool, Values("bits")),
    }
    return draw(recipes(given, {"reduction": REDUCTIONS}, ("input", "target")))


# Ways to the same numbers.
INVARIANTS: dict[str, tuple[Loss, Callable[..., Tensor]]] = {
    "exchanged classes": (_with(extras=False, target="bits"), _mirrored),
    "mask": (replace(_with(), recipes=_masked), _selected),
    "permuted elements": (_with(extras=False), _permuted),
    "reductions": (_with(extras=False, among=PRECISE), _by_the_other_reductions),
}


@pytest.mark.parametrize("name", INVARIANTS)
def test_invariant(name: str, hold: Callable[..., None]) -> None:
    loss, variant = INVARIANTS[name]
    hold("binary_cross_entropy_with_logits", loss, wide=True, variant=variant)
