"""The losses and their gradients as curves, drawn by the losses themselves. ``python docs/figures.py folder`` saves them."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

import genloss_kernels as gk

# Legible on a light page and on a dark one.
_INK = "#808080"
_STYLE = {
    "font.size": 9, "svg.fonttype": "none", "savefig.transparent": True, "lines.linewidth": 1.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}  # fmt: skip


class Panel(NamedTuple):
    """Curves over one variable, from a tensor of its values to the loss of each."""

    variable: str
    limits: tuple[float, float]
    curves: Mapping[str, Callable[[Tensor], Tensor]]


def _class(logit: Tensor, others: int) -> tuple[Tensor, Tensor]:
    """Rows of logits, all 0 but that of the label, and the labels."""
    return torch.nn.functional.pad(logit[:, None], (0, others)), logit.new_zeros(len(logit), dtype=torch.int64)


def _label(**options: float) -> Callable[[Tensor], Tensor]:
    return lambda x: gk.cross_entropy(*_class(x, 9), reduction="none", **options)


def _towards(target: float, **options: float) -> Callable[[Tensor], Tensor]:
    extra = {"pos_weight": torch.tensor(options.pop("pos_weight"))} if "pos_weight" in options else {}
    return lambda x: gk.binary_cross_entropy_with_logits(x, torch.full_like(x, target), reduction="none", **options, **extra)


def _gaussian(mean: bool, **options: float) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        mu, logvar = (x, x * 0) if mean else (x * 0, x)
        return gk.gaussian_kl(mu[:, None], logvar[:, None], reduction="none", **options).flatten()

    return loss


def _against_teacher(divergence: Callable[..., Tensor], **options: object) -> Callable[[Tensor], Tensor]:
    return lambda x: divergence(_class(x, 1)[0], _class(torch.full_like(x, 2.0), 1)[0], reduction="none", **options)


def _autoencoder(**options: float) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        error = x.new_ones(len(x), 1)
        return gk.vae_loss(error, error * 0, x[:, None], error * 0, reduction="none", **options).loss

    return loss


def _discriminator(kind: str) -> Callable[[Tensor], Tensor]:
    return lambda x: gk.gan_discriminator_loss(x, torch.zeros_like(x), kind, reduction="none")


def _generator(kind: str) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        real = torch.zeros_like(x) if kind == "relativistic" else None
        return gk.gan_generator_loss(x, kind, real=real, reduction="none")

    return loss


def _to_zero(loss: Callable[..., Tensor], **options: float) -> Callable[[Tensor], Tensor]:
    return lambda x: loss(x, torch.zeros_like(x), reduction="none", **options)


def _reconstruction(loss: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: loss(x, torch.full_like(x, 0.25), reduction="none")


def _likelihood(error: float) -> Callable[[Tensor], Tensor]:
    return lambda x: gk.gaussian_nll_loss(torch.full_like(x, error), torch.zeros_like(x), x, reduction="none")


def _cosine(label: int, margin: float = 0.0) -> Callable[[Tensor], Tensor]:
    def loss(angle: Tensor) -> Tensor:
        turned = torch.stack([angle.cos(), angle.sin()], 1)
        fixed = torch.tensor([1.0, 0.0]).expand_as(turned)
        return gk.cosine_embedding_loss(turned, fixed, torch.full((len(angle),), label), margin, reduction="none")

    return loss


FIGURES = {
    "cross_entropy": [
        Panel("logit of the label, beside nine of 0", (-6, 12), {
            "plain": _label(),
            "label_smoothing=0.2": _label(label_smoothing=0.2),
            "softcap=5": _label(softcap=5.0),
            "z_loss=0.02": _label(z_loss=0.02),
        }),
    ],
    "binary_cross_entropy": [
        Panel("logit", (-6, 6), {
            "target 1": _towards(1.0),
            "target 0": _towards(0.0),
            "target 1, pos_weight=2": _towards(1.0, pos_weight=2.0),
            "target 1, label_smoothing=0.2": _towards(1.0, label_smoothing=0.2),
        }),
        Panel("probability", (0.05, 0.95), {
            f"target {t:g}": lambda x, t=t: gk.binary_cross_entropy(x, torch.full_like(x, t), reduction="none")
            for t in (1.0, 0.0, 0.5)
        }),
    ],
    "gaussian_kl": [
        Panel("mean, at log-variance 0", (-3, 3), {
            "plain": _gaussian(True),
            "free_bits=0.5": _gaussian(True, free_bits=0.5),
            "capacity=2": _gaussian(True, capacity=2.0),
        }),
        Panel("log-variance, at mean 0", (-3, 3), {
            "plain": _gaussian(False),
            "free_bits=0.5": _gaussian(False, free_bits=0.5),
            "logvar_clamp=(-2, 2)": _gaussian(False, logvar_clamp=(-2.0, 2.0)),
        }),
    ],
    "divergences": [
        Panel("student's log-odds, the teacher's being 2", (-4, 8), {
            "kl_div_with_logits, forward": _against_teacher(gk.kl_div_with_logits),
            "kl_div_with_logits, reverse": _against_teacher(gk.kl_div_with_logits, direction="reverse"),
            "js_div_with_logits": _against_teacher(gk.js_div_with_logits),
        }),
        Panel("log-odds of two classes", (-6, 6), {
            "categorical_entropy": lambda x: gk.categorical_entropy(_class(x, 1)[0]),
        }),
    ],
    "vae": [
        Panel("reconstruction of 0.25", (0.05, 0.95), {
            "mse": _reconstruction(gk.mse_loss),
            "l1": _reconstruction(gk.l1_loss),
            "bce": _reconstruction(gk.binary_cross_entropy),
        }),
        Panel("posterior mean of one latent, at squared error 1", (-3, 3), {
            "beta=1": _autoencoder(),
            "beta=0.25": _autoencoder(beta=0.25),
            "free_bits=1": _autoencoder(free_bits=1.0),
            "capacity=2": _autoencoder(capacity=2.0),
        }),
    ],
    "adversarial": [
        Panel("discriminator: score of a real sample", (-4, 4), {
            kind: _discriminator(kind) for kind in ("non_saturating", "lsgan", "hinge", "wasserstein")
        }),
        Panel("generator: score of a generated sample", (-4, 4), {
            kind: _generator(kind) for kind in ("non_saturating", "minimax", "lsgan", "hinge")
        }),
        Panel("norm of a sample's gradient", (0.02, 3), {
            "gradient_penalty": lambda x: gk.gradient_penalty(x[:, None], reduction="none"),
            "r1_penalty, gamma=1": lambda x: gk.r1_penalty(x[:, None], gamma=1.0, reduction="none"),
        }),
    ],
    "energy": [
        Panel("energy of data, that of the sample being 0", (-3, 3), {
            f"l2={l2:g}": _to_zero(gk.contrastive_divergence_loss, l2=l2) for l2 in (0.0, 0.1, 0.5)
        }),
    ],
    "regression": [
        Panel("error", (-3, 3), {
            "mse_loss": _to_zero(gk.mse_loss),
            "l1_loss": _to_zero(gk.l1_loss),
            "smooth_l1_loss, beta=1": _to_zero(gk.smooth_l1_loss),
            "huber_loss, delta=2": _to_zero(gk.huber_loss, delta=2.0),
        }),
        Panel("gaussian_nll_loss: variance", (0.3, 4), {
            f"error {error:g}": _likelihood(error) for error in (0.5, 1.0, 1.5)
        }),
    ],
    "cosine": [
        Panel("angle between the vectors", (0, math.pi), {
            "target 1": _cosine(1),
            "target -1": _cosine(-1),
            "target -1, margin=0.5": _cosine(-1, 0.5),
        }),
    ],
}  # fmt: skip


def draw(name: str) -> bytes:
    """A figure as SVG: each panel's losses on the left, their derivatives in its variable on the right."""
    panels = FIGURES[name]
    with matplotlib.rc_context(_STYLE):
        figure = Figure((8, 2.6 * len(panels)), layout="constrained")
        for (left, right), panel in zip(figure.subplots(len(panels), 2, squeeze=False), panels, strict=True):
            x = torch.linspace(*panel.limits, 241, requires_grad=True)
            for label, curve in panel.curves.items():
                loss = curve(x)
                (gradient,) = torch.autograd.grad(loss.sum(), x)
                left.plot(x.detach(), loss.detach(), label=label)
                right.plot(x.detach(), gradient)
            left.set(xlabel=panel.variable, ylabel="loss")
            right.set(xlabel=panel.variable, ylabel="gradient")
            left.legend(frameon=False)
            for axes in (left, right):
                axes.grid(alpha=0.3)
        file = io.BytesIO()
        figure.savefig(file, format="svg")
    return file.getvalue()


if __name__ == "__main__":
    for figure_name in FIGURES:
        Path(sys.argv[1], f"{figure_name}.svg").write_bytes(draw(figure_name))
