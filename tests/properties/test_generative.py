"""Losses of autoencoders, of adversarial games with their penalties, and of energies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import strategies as st
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.cases import GAN_KINDS

from . import oracles
from .judging import WIDTHS, Loss, Recipe, recipes
from .operands import DTYPES, Values, operands
from .shapes import dtypes, shapes
from .test_gaussian import LOGVARS, MEANS
from .test_gaussian import edges as edges_of_divergence

REDUCTIONS = st.sampled_from(("mean", "sum", "none"))


@st.composite
def _autoencoder(draw: st.DrawFn, wide: bool, kind: str) -> Recipe:
    pixels, kinds = draw(shapes(wide=wide, least=1)), draw(dtypes(4))
    latents = (pixels[0], *draw(shapes(wide=False, most=2)))
    numbers = Values("doubt") if kind == "bce" else Values(scale=draw(st.sampled_from((1.0, 16.0))))
    given = {
        "recon": operands(pixels, kinds[0], numbers),
        "target": operands(pixels, kinds[1], Values("probability")),
        "mu": operands(latents, kinds[2], draw(MEANS)),
        "logvar": operands(latents, kinds[3], draw(LOGVARS)),
    }
    options: dict[str, st.SearchStrategy[Any]] = {
        "recon_loss": st.just(kind),
        "reduction": st.sampled_from(("batchmean", "mean", "sum", "none")),
        "free_bits": st.sampled_from((None, None, 0.375)),
        "capacity": st.sampled_from((None, None, 2.5)),
    }
    if draw(st.booleans()):
        given["beta"] = operands((), draw(st.sampled_from(DTYPES)), Values("positive", 4.0))
    else:
        options["beta"] = st.sampled_from((1.0, 0.0, 4.0))
    return draw(recipes(given, options, ("recon", "target", "mu", "logvar")))


def _edges(
    mu: Tensor, logvar: Tensor, free_bits: float | None = None, capacity: float | None = None, **_: Any
) -> Iterator[Tensor]:
    return edges_of_divergence(free_bits, capacity, mu_q=mu, logvar_q=logvar)


def _of_vae(kind: str) -> Loss:
    typed = ("recon", "target", "mu", "logvar")
    return Loss(gk.vae_loss, oracles.vae_loss, lambda wide: _autoencoder(wide, kind), typed, edges=_edges)


@st.composite
def _sides(
    draw: st.DrawFn,
    wide: bool,
    names: tuple[str, str],
    options: dict[str, st.SearchStrategy[Any]],
    alike: bool,
) -> Recipe:
    """Scores of two sides, of one shape where that is asked for or none is reduced."""
    reduction, kinds = draw(REDUCTIONS), draw(dtypes(2))
    first = draw(shapes(wide=wide))
    second = first if alike or reduction == "none" else draw(shapes(wide=wide))
    given = {name: operands(shape, kind) for name, shape, kind in zip(names, (first, second), kinds, strict=True)}
    return draw(recipes(given, {"reduction": st.just(reduction)} | options, names))


def _discriminator(kind: str) -> Loss:
    names, options = ("real", "fake"), {"kind": st.just(kind)}
    function, oracle, alike = gk.gan_discriminator_loss, oracles.gan_discriminator_loss, kind == "relativistic"
    return Loss(function, oracle, lambda wide: _sides(wide, names, options, alike), names)


@st.composite
def _one_side(draw: st.DrawFn, wide: bool, options: dict[str, st.SearchStrategy[Any]]) -> Recipe:
    given = {"fake": operands(draw(shapes(wide=wide)), draw(st.sampled_from(DTYPES)))}
    return draw(recipes(given, {"reduction": REDUCTIONS} | options, ("fake",)))


def _generator(kind: str) -> Loss:
    names, options = ("fake", "real"), {"kind": st.just(kind)}
    function, oracle = gk.gan_generator_loss, oracles.gan_generator_loss
    if kind == "relativistic":
        return Loss(function, oracle, lambda wide: _sides(wide, names, options, True), names)
    return Loss(function, oracle, lambda wide: _one_side(wide, options), names)


@st.composite
def _penalised(draw: st.DrawFn, wide: bool, options: dict[str, st.SearchStrategy[Any]]) -> Recipe:
    values = Values(scale=draw(st.sampled_from((1.0, 2.0**-7, 8.0))))
    given = {"grad": operands(draw(shapes(wide=wide, least=1)), draw(st.sampled_from(DTYPES)), values)}
    return draw(recipes(given, {"reduction": REDUCTIONS} | options, ("grad",)))


def _penalty(function: Callable[..., Any], oracle: Callable[..., Any], **options: Any) -> Loss:
    return Loss(function, oracle, lambda wide: _penalised(wide, options), ("grad",), blocks=False)


ENERGIES = ("positive_energy", "negative_energy")


def _energies(wide: bool) -> st.SearchStrategy[Recipe]:
    return _sides(wide, ENERGIES, {"l2": st.sampled_from((0.0, 0.125))}, False)


LOSSES = {
    **{f"vae_loss {kind}": _of_vae(kind) for kind in ("mse", "l1", "bce", "bce_with_logits")},
    **{f"gan_discriminator_loss {kind}": _discriminator(kind) for kind in GAN_KINDS},
    **{f"gan_generator_loss {kind}": _generator(kind) for kind in GAN_KINDS},
    "gradient_penalty": _penalty(
        gk.gradient_penalty, oracles.gradient_penalty, target=st.sampled_from((1.0, 0.0, 4.0))
    ),
    "r1_penalty": _penalty(gk.r1_penalty, oracles.r1_penalty, gamma=st.sampled_from((10.0, 0.0, 2.0))),
    "contrastive_divergence_loss": Loss(
        gk.contrastive_divergence_loss, oracles.contrastive_divergence_loss, _energies, ENERGIES
    ),
}  # fmt: skip


@WIDTHS
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(name: str, wide: bool, hold: Callable[..., None]) -> None:
    hold(name, LOSSES[name], wide=wide, share=2)
