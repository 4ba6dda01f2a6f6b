"""Gaussian divergence and negative log-likelihood."""

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

from . import oracles
from .judging import WIDTHS, Loss, Recipe, recipes
from .operands import Values, operands
from .shapes import Among, dtypes, narrower, shapes

NAMES = ("mu_q", "logvar_q", "mu_p", "logvar_p")

# Of log-variances, whose exponentials stay within the range of float16.
LOGVARS = st.builds(Values, st.just("normal"), st.sampled_from((1.0, 0.0, 2.0**-10, 2.0)))
MEANS = st.builds(Values, st.just("normal"), st.sampled_from((1.0, 0.0, 4.0)), st.sampled_from((0.0, 8.0)))


@st.composite
def _divergence(draw: st.DrawFn, wide: bool, general: bool, among: Among = None, **fixed: Any) -> Recipe:
    shape = draw(shapes(wide=wide, least=1))
    kinds = draw(dtypes(4, among))
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
    hold(name, LOSSES[name], wide=wide)


def _mirrored(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor | None = None, **rest: Any) -> Tensor:
    return gk.gaussian_kl(-mu_q, logvar_q, None if mu_p is None else -mu_p, **rest)


def _against_zeros(mu_q: Tensor, logvar_q: Tensor, **rest: Any) -> Tensor:
    """The standard normal, spelled out."""
    return gk.gaussian_kl(mu_q, logvar_q, torch.zeros_like(mu_q), torch.zeros_like(logvar_q), **rest)


def _by_sample(mu_q: Tensor, logvar_q: Tensor, **rest: Any) -> Tensor:
    """No divergence is below a capacity of 0."""
    if rest["capacity"] is not None or rest["reduction"] in ("none", "mean"):
        return gk.gaussian_kl(mu_q, logvar_q, **rest)
    return gk.gaussian_kl(mu_q, logvar_q, **rest | {"capacity": 0.0})


def _samples_permuted(mu_q: Tensor, logvar_q: Tensor, **rest: Any) -> Tensor:
    mu_q, logvar_q = torch.broadcast_tensors(mu_q, logvar_q)
    order = torch.randperm(mu_q.size(0), generator=torch.Generator().manual_seed(mu_q.size(0))).to(mu_q.device)
    found = gk.gaussian_kl(mu_q[order], logvar_q[order], **rest)
    return found[order.argsort()] if rest["reduction"] == "none" else found


def _by_the_other_reductions(mu_q: Tensor, logvar_q: Tensor, **rest: Any) -> Tensor:
    """The means by the sum, and the sum by the elements."""
    reduction, shape = rest.pop("reduction"), torch.broadcast_shapes(mu_q.shape, logvar_q.shape)
    if reduction in ("none", "sum"):
        found = gk.gaussian_kl(mu_q, logvar_q, **rest, reduction="none")
        return found.sum() if reduction == "sum" else found
    samples = reduction == "batchmean" or rest["capacity"] is not None
    return gk.gaussian_kl(mu_q, logvar_q, **rest, reduction="sum") / (shape[0] if samples else shape.numel())


def _likelihood_mirrored(input: Tensor, target: Tensor, var: Tensor | float, **rest: Any) -> Tensor:
    return gk.gaussian_nll_loss(-input, -target, var, **rest)


def _with(name: str, **fixed: Any) -> Loss:
    loss = LOSSES[name]
    return replace(loss, recipes=lambda wide: loss.recipes(wide, **fixed))


_STANDARD, _GENERAL, _LIKELIHOOD = LOSSES

# Ways to the same numbers.
INVARIANTS: dict[str, tuple[str, Loss, Callable[..., Tensor]]] = {
    "mirrored means": (_GENERAL, LOSSES[_GENERAL], _mirrored),
    "standard normal given": (_STANDARD, LOSSES[_STANDARD], _against_zeros),
    "no capacity": (_STANDARD, LOSSES[_STANDARD], _by_sample),
    "permuted samples": (_STANDARD, LOSSES[_STANDARD], _samples_permuted),
    "reductions": (_STANDARD, _with(_STANDARD, among=(torch.float32, torch.float64)), _by_the_other_reductions),
    "mirrored sample": (_LIKELIHOOD, LOSSES[_LIKELIHOOD], _likelihood_mirrored),
}


@pytest.mark.parametrize("name", INVARIANTS)
def test_invariant(name: str, hold: Callable[..., None]) -> None:
    loss_name, loss, variant = INVARIANTS[name]
    hold(loss_name, loss, wide=True, variant=variant)


_EACH = {"reduction": st.just("none"), "free_bits": st.none(), "capacity": st.none(), "logvar_clamp": st.none()}


@pytest.mark.parametrize("name", [_STANDARD, _GENERAL])
def test_no_divergence_is_negative(name: str, explore: Callable[..., None]) -> None:
    explore(name, _with(name, **_EACH), lambda arguments: bool((gk.gaussian_kl(**arguments) >= 0.0).all()))


def test_divergence_from_itself_is_0(explore: Callable[..., None]) -> None:
    def check(arguments: dict[str, Any]) -> bool:
        q = [arguments[name].requires_grad_() for name in NAMES[:2]]
        kl = gk.gaussian_kl(*q, *(t.detach() for t in q), reduction="none")
        gradients = torch.autograd.grad(kl.sum(), q)
        return not kl.any() and not any(g.any() for g in gradients)

    explore(_STANDARD, _with(_STANDARD, **_EACH), check)
