"""Losses of autoencoders, of adversarial games with their penalties, and of energies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.cases.adversarial import GAN_KINDS

from . import oracles
from .judging import WIDTHS, Loss, Recipe, recipes
from .operands import DTYPES, Values, normal, operands
from .shapes import Among, dtypes, shapes
from .test_gaussian import LOGVARS, MEANS
from .test_gaussian import edges as edges_of_divergence

REDUCTIONS = st.sampled_from(("mean", "sum", "none"))


@st.composite
def _autoencoder(draw: st.DrawFn, wide: bool, kind: str, among: Among = None) -> Recipe:
    pixels, kinds = draw(shapes(wide=wide, least=1)), draw(dtypes(4, among))
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
    return Loss(gk.vae_loss, oracles.vae_loss, lambda wide, **rest: _autoencoder(wide, kind, **rest), typed, edges=_edges)


@st.composite
def _sides(
    draw: st.DrawFn,
    wide: bool,
    names: tuple[str, str],
    options: dict[str, st.SearchStrategy[Any]],
    alike: bool,
    among: Among = None,
    values: Callable[[], st.SearchStrategy[Values]] = normal,
) -> Recipe:
    """Scores of two sides, of one shape where that is asked for or none is reduced."""
    reduction, kinds = draw(REDUCTIONS), draw(dtypes(2, among))
    first = draw(shapes(wide=wide))
    second = first if alike or reduction == "none" else draw(shapes(wide=wide))
    given = {
        name: operands(shape, kind, draw(values())) for name, shape, kind in zip(names, (first, second), kinds, strict=True)
    }
    return draw(recipes(given, {"reduction": st.just(reduction)} | options, names))


def _discriminator(kind: str) -> Loss:
    names, options = ("real", "fake"), {"kind": st.just(kind)}
    function, oracle, alike = gk.gan_discriminator_loss, oracles.gan_discriminator_loss, kind == "relativistic"
    return Loss(
        function,
        oracle,
        lambda wide, **rest: _sides(wide, names, options, alike, **rest),
        names,
        # A difference of two means.
        products=kind == "wasserstein",
    )


@st.composite
def _one_side(draw: st.DrawFn, wide: bool, options: dict[str, st.SearchStrategy[Any]], among: Among = None) -> Recipe:
    given = {"fake": operands(draw(shapes(wide=wide)), draw(dtypes(1, among))[0])}
    return draw(recipes(given, {"reduction": REDUCTIONS} | options, ("fake",)))


def _generator(kind: str) -> Loss:
    names, options = ("fake", "real"), {"kind": st.just(kind)}
    function, oracle = gk.gan_generator_loss, oracles.gan_generator_loss
    if kind == "relativistic":
        return Loss(function, oracle, lambda wide, **rest: _sides(wide, names, options, True, **rest), names)
    return Loss(function, oracle, lambda wide, **rest: _one_side(wide, options, **rest), names)


@st.composite
def _penalised(draw: st.DrawFn, wide: bool, options: dict[str, st.SearchStrategy[Any]], among: Among = None) -> Recipe:
    values = Values(scale=draw(st.sampled_from((1.0, 2.0**-7, 8.0))))
    given = {"grad": operands(draw(shapes(wide=wide, least=1)), draw(dtypes(1, among))[0], values)}
    return draw(recipes(given, {"reduction": REDUCTIONS} | options, ("grad",)))


def _penalty(function: Callable[..., Any], oracle: Callable[..., Any], **options: Any) -> Loss:
    return Loss(function, oracle, lambda wide, **rest: _penalised(wide, options, **rest), ("grad",), blocks=False)


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
        gk.contrastive_divergence_loss, oracles.contrastive_divergence_loss, _energies, ENERGIES, products=True
    ),
}  # fmt: skip


@WIDTHS
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(name: str, wide: bool, hold: Callable[..., None]) -> None:
    hold(name, LOSSES[name], wide=wide)


def _of_parts(
    recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, recon_loss: str, reduction: str, beta: float | Tensor,
    **bits: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Reconstruction and divergence as losses of their own."""
    function = {
        "mse": gk.mse_loss,
        "l1": gk.l1_loss,
        "bce": gk.binary_cross_entropy,
        "bce_with_logits": gk.binary_cross_entropy_with_logits,
    }[recon_loss]
    if reduction == "none":
        values = function(recon, target, reduction="none")
        part = values.reshape(values.size(0), -1).sum(1) if values.numel() else values.sum(tuple(range(1, values.dim())))
        found = gk.gaussian_kl(mu, logvar, reduction="none", **bits)
        kl = found if bits["capacity"] is not None or found.dim() < 2 else found.sum(tuple(range(1, found.dim())))
    else:
        batch = reduction == "batchmean"
        part = function(recon, target, reduction="sum" if batch else reduction) / (recon.size(0) if batch else 1)
        kl = gk.gaussian_kl(mu, logvar, reduction=reduction, **bits)
    beta = beta.to(kl.dtype) if isinstance(beta, Tensor) else beta
    return {"loss": part + beta * kl, "recon": part, "kl": kl}


def _sides_exchanged(real: Tensor, fake: Tensor, **rest: Any) -> Tensor:
    """A real score is a fake one's negative, but for squares."""
    return gk.gan_discriminator_loss(-fake, -real, **rest)


def _relativistic_shifted(real: Tensor, fake: Tensor, **rest: Any) -> Tensor:
    """By a number that these scores take exactly."""
    return gk.gan_discriminator_loss(real + 8.0, fake + 8.0, **rest)


def _of_the_discriminator(fake: Tensor, real: Tensor, **rest: Any) -> Tensor:
    """The relativistic game is the same for both with the roles exchanged."""
    return gk.gan_discriminator_loss(fake, real, **rest)


def _by_the_other_reductions(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The mean of one side by the sum, and the sum by the elements."""

    def variant(first: Tensor, reduction: str, **rest: Any) -> Tensor:
        if reduction == "mean":
            return function(first, reduction="sum", **rest) / first.numel()
        found = function(first, reduction="none", **rest)
        return found.sum() if reduction == "sum" else found

    return lambda **arguments: variant(arguments.pop("fake"), **arguments)


def _entries_permuted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Within each sample and with other signs, which no norm depends on."""

    def variant(grad: Tensor, **rest: Any) -> Tensor:
        flat = -grad.reshape(grad.size(0), math.prod(grad.shape[1:]))
        order = torch.randperm(flat.size(1), generator=torch.Generator().manual_seed(flat.size(1)))
        return function(flat[:, order.to(grad.device)], **rest)

    return variant


def _by_the_penalty(grad: Tensor, gamma: float, **rest: Any) -> Tensor:
    """Half of gamma times the squared distance from a norm of 0."""
    return 0.5 * gamma * gk.gradient_penalty(grad, target=0.0, **rest)


def _energies_exchanged(positive_energy: Tensor, negative_energy: Tensor, **rest: Any) -> Tensor:
    return gk.contrastive_divergence_loss(-negative_energy, -positive_energy, **rest)


_PRECISE = (torch.float32, torch.float64)


def _with(name: str, **fixed: Any) -> Loss:
    loss = LOSSES[name]
    return replace(loss, recipes=lambda wide: loss.recipes(wide, **fixed))


_RELATIVISTIC, _R1 = "gan_discriminator_loss relativistic", "r1_penalty"

# Ways to the same numbers.
INVARIANTS: dict[str, tuple[str, Loss, Callable[..., Any]]] = {
    "relativistic, shifted": (
        _RELATIVISTIC, _with(_RELATIVISTIC, among=_PRECISE, values=lambda: normal("grid")), _relativistic_shifted,
    ),
    "relativistic, both roles": (
        "gan_generator_loss relativistic", LOSSES["gan_generator_loss relativistic"], _of_the_discriminator,
    ),
    "r1_penalty by gradient_penalty": (_R1, _with(_R1, among=_PRECISE), _by_the_penalty),
    "exchanged energies": (
        "contrastive_divergence_loss", LOSSES["contrastive_divergence_loss"], _energies_exchanged,
    ),
}  # fmt: skip
for _kind in ("mse", "l1", "bce", "bce_with_logits"):
    INVARIANTS[f"vae_loss {_kind} of parts"] = (f"vae_loss {_kind}", _with(f"vae_loss {_kind}", among=_PRECISE), _of_parts)
for _kind in ("minimax", "non_saturating", "hinge", "wasserstein", "relativistic"):
    _name = f"gan_discriminator_loss {_kind}"
    INVARIANTS[f"{_name}, exchanged"] = (_name, LOSSES[_name], _sides_exchanged)
for _kind in GAN_KINDS:
    _name = f"gan_generator_loss {_kind}"
    INVARIANTS[f"{_name}, reductions"] = (
        _name,
        _with(_name, among=_PRECISE),
        _by_the_other_reductions(gk.gan_generator_loss),
    )
for _name in ("gradient_penalty", _R1):
    INVARIANTS[f"{_name}, permuted"] = (_name, LOSSES[_name], _entries_permuted(LOSSES[_name].function))


@pytest.mark.parametrize("name", INVARIANTS)
def test_invariant(name: str, hold: Callable[..., None]) -> None:
    loss_name, loss, variant = INVARIANTS[name]
    hold(loss_name, loss, wide=True, variant=variant)
