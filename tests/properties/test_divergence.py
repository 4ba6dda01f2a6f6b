"""Divergences of distributions and of logits, and entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.testing import tolerance

from . import oracles
from .judging import WIDTHS, Loss, Recipe, recipes, vanish
from .operands import GRID_SCALES, UNEVEN_SCALES, Values, normal, operands
from .shapes import Among, dtypes, narrower, row_shapes, shapes

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
    if own != shape:
        kind = "normal" if log_target else "doubt"
    given = {
        "input": operands(shape, kinds[0], Values("logarithms", scale, dim=place)),
        "target": operands(own, kinds[1], Values(kind, dim=place)),
    }
    options = {"reduction": REDUCTIONS, "log_target": st.just(log_target)}
    return draw(recipes(given, options | fixed, BOTH))


@st.composite
def of_logits(
    draw: st.DrawFn,
    wide: bool,
    options: dict[str, st.SearchStrategy[Any]],
    names: tuple[str, ...] = BOTH,
    among: Among = None,
    kind: str = "normal",
) -> Recipe:
    shape = draw(row_shapes(wide=wide))
    kinds = draw(dtypes(len(names), among))
    # Of even odds on both sides the results are 0, and all that there is to compare is rounding.
    uneven, scales = range(len(shape) - 1), GRID_SCALES if kind == "grid" else UNEVEN_SCALES
    given = {
        name: operands(shape, dtype, draw(normal(kind, scales)), expandable=uneven)
        for name, dtype in zip(names, kinds, strict=True)
    }
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
    hold(name, LOSSES[name], wide=wide)


def _exchanged(input: Tensor, target: Tensor, beta: float, **rest: Any) -> Tensor:
    return gk.js_div_with_logits(target, input, beta=1.0 - beta, **rest)


def _the_other_direction(input: Tensor, target: Tensor, direction: str, **rest: Any) -> Tensor:
    return gk.kl_div_with_logits(target, input, direction="reverse" if direction == "forward" else "forward", **rest)


def _of_log_softmax(input: Tensor, target: Tensor, direction: str, temperature: float, reduction: str) -> Tensor:
    """``kl_div`` of what the logits say; it has no mean over rows."""
    student, teacher = (torch.log_softmax(x / temperature, -1) for x in (input, target))
    if direction == "reverse":
        student, teacher = teacher, student
    rows = temperature**2 * gk.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    if reduction == "none":
        return rows
    return rows.sum() / {"sum": 1, "batchmean": input.size(0), "mean": rows.numel()}[reduction]


def _statistic(logits: Tensor, reduction: str) -> Tensor:
    """The entropy that cross entropy finds on its way; labels matter no more than its loss."""
    rows = logits.reshape(-1, logits.size(-1))
    labels = torch.zeros(rows.size(0), dtype=torch.int64, device=logits.device)
    found = gk.cross_entropy(rows, labels, return_stats=True).entropy.view(logits.shape[:-1])
    if reduction == "none":
        return found
    return found.sum() / {"sum": 1, "batchmean": logits.size(0), "mean": found.numel()}[reduction]


def _shifted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By a number for each row, which these logits take exactly."""

    def shift(x: Tensor, step: int) -> Tensor:
        rows = x.shape[:-1]
        return x + (torch.arange(rows.numel(), device=x.device).view(*rows, 1) * step % 64 - 32).to(x)

    def variant(input: Tensor, target: Tensor, **rest: Any) -> Tensor:
        return function(shift(input, 1), shift(target, 3), **rest)

    def alone(logits: Tensor, **rest: Any) -> Tensor:
        return function(shift(logits, 1), **rest)

    return alone if function is gk.categorical_entropy else variant


def _classes_permuted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def variant(**arguments: Any) -> Tensor:
        size = arguments.get("input", arguments.get("logits")).size(-1)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
        given = {n: t.index_select(-1, order.to(t.device)) if isinstance(t, Tensor) else t for n, t in arguments.items()}
        return function(**given)

    return variant


def _by_the_other_reductions(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The means by the sum, and the sum by the rows."""

    def variant(reduction: str, **arguments: Any) -> Tensor:
        shape = arguments.get("input", arguments.get("logits")).shape
        if reduction in ("none", "sum"):
            rows = function(**arguments, reduction="none")
            return rows.sum() if reduction == "sum" else rows
        return function(**arguments, reduction="sum") / (shape[0] if reduction == "batchmean" else shape[:-1].numel())

    return variant


def _with(name: str, **fixed: Any) -> Loss:
    loss = LOSSES[name]
    return replace(loss, recipes=lambda wide: loss.recipes(wide, **fixed))


PRECISE = (torch.float32, torch.float64)
_OF_LOGITS = [name for name in LOSSES if name != "kl_div"]
_ENTROPY = "categorical_entropy"

# Ways to the same numbers.
INVARIANTS: dict[str, tuple[str, Loss, Callable[..., Tensor]]] = {
    "js exchanged": ("js_div_with_logits", LOSSES["js_div_with_logits"], _exchanged),
    "entropy of cross entropy": (_ENTROPY, _with(_ENTROPY, among=PRECISE), _statistic),
}
for _name in _OF_LOGITS:
    _loss_of_name = LOSSES[_name]
    _function = _loss_of_name.function
    INVARIANTS |= {
        f"{_name}, shifted": (_name, _with(_name, among=PRECISE, kind="grid"), _shifted(_function)),
        f"{_name}, permuted": (_name, _loss_of_name, _classes_permuted(_function)),
        f"{_name}, reductions": (_name, _with(_name, among=PRECISE), _by_the_other_reductions(_function)),
    }
    if _name.startswith("kl_div"):
        INVARIANTS |= {
            f"{_name}, exchanged": (_name, _loss_of_name, _the_other_direction),
            f"{_name}, kl_div": (_name, _with(_name, among=PRECISE), _of_log_softmax),
        }


@pytest.mark.parametrize("name", INVARIANTS)
def test_invariant(name: str, hold: Callable[..., None]) -> None:
    loss_name, loss, variant = INVARIANTS[name]
    hold(loss_name, loss, wide=True, variant=variant)


@pytest.mark.parametrize("name", _OF_LOGITS)
def test_bounds(name: str, explore: Callable[..., None]) -> None:
    """No divergence is negative; an entropy is at most that of even odds, a Jensen-Shannon divergence that of beta.

    Of two certain distributions the rounding of 1 may be more than the divergence; it is computed in float64.
    """
    loss = LOSSES[name]

    def check(arguments: dict[str, Any]) -> bool:
        found = loss.function(**arguments | {"reduction": "none"})
        most = math.inf
        if name == _ENTROPY:
            most = math.log(arguments["logits"].size(-1))
        elif name.startswith("js"):
            beta, temperature = arguments["beta"], arguments["temperature"]
            most = -(temperature**2) * (beta * math.log(beta) + (1.0 - beta) * math.log1p(-beta))
        row, least = (
            tolerance(found.dtype),
            -4 * tolerance(torch.float64).arithmetic * arguments.get("temperature", 1.0) ** 2,
        )
        return bool(((found >= least) & (found.double() <= most * (1.0 + row.storage + 4 * row.arithmetic))).all())

    explore(name, loss, check)


@pytest.mark.parametrize("name", [name for name in _OF_LOGITS if name != _ENTROPY])
def test_divergence_from_itself_is_0(name: str, explore: Callable[..., None]) -> None:
    loss = LOSSES[name]

    def check(arguments: dict[str, Any]) -> bool:
        x = arguments["input"].requires_grad_()
        return not loss.function(**arguments | {"target": x.detach(), "reduction": "none"}).any()

    explore(name, loss, check)


@pytest.mark.parametrize("name", _OF_LOGITS)
def test_gradients_of_rows_sum_to_0(name: str, explore: Callable[..., None]) -> None:
    loss = LOSSES[name]

    def check(arguments: dict[str, Any]) -> bool:
        leaves = [arguments[operand].requires_grad_() for operand in loss.typed]
        temperature = arguments.get("temperature", 1.0)
        # Probabilities times differences of logarithms, as large as those of the logits.
        size = temperature + 2.0 * sum(x.detach().double().abs().max().item() if x.numel() else 0.0 for x in leaves)
        gradients = torch.autograd.grad(loss.function(**arguments | {"reduction": "none"}).sum(), leaves)
        return all(vanish(gradient, temperature * size) for gradient in gradients)

    explore(name, loss, check)
