"""Small calls of every loss with its options, as functions of their differentiable tensors alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk

# Small inputs go to torch's own operators on the eager path, where they do not need the loss's own in blocks.
ROUTES = [
    pytest.param("eager", "as is", id="eager"),
    pytest.param("eager", "blocks", id="blocks"),
    pytest.param("triton", "as is", id="triton", marks=pytest.mark.interpreter),
]

every_route = pytest.mark.parametrize(("path", "small"), ROUTES, indirect=True)


def route(path: str, small: str) -> str:
    """What a report calls it."""
    return path if small == "as is" else f"{path}, {small}"


# A function and the tensors that it takes.
Problem = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


class Draw:
    """Random tensors of one dtype on one device, the same for the same seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device, dtype=self.dtype) + 0.5

    def probabilities(self, *shape: int) -> Tensor:
        return torch.softmax(self.normal(*shape), 1)

    def labels(self, n_classes: int, *shape: int) -> Tensor:
        """Every third one ignored."""
        found = torch.randint(n_classes, shape, generator=self.generator, device=self.device)
        found.view(-1)[1::3] = -100
        return found


class Example(NamedTuple):
    name: str
    loss: str
    make: Callable[[Draw, int], Problem]

    def problem(self, device: torch.device, dtype: torch.dtype = torch.float64, rows: int = 4) -> Problem:
        """The function, and leaves that require a gradient; ``rows`` is the batch size."""
        function, tensors = self.make(Draw(device, dtype), rows)
        return function, tuple(t.detach().requires_grad_() for t in tensors)

    def __str__(self) -> str:
        return f"{self.loss}-{self.name}".replace(" ", "_")


def _labelled(n_classes: int, *inner: int, weighted: bool = False, **options: Any) -> Callable[[Draw, int], Problem]:
    def make(draw: Draw, rows: int) -> Problem:
        target = draw.labels(n_classes, rows, *inner)
        weight = draw.positive(n_classes) if weighted else None
        logits = draw.normal(rows, n_classes, *inner)
        return lambda x: gk.cross_entropy(x, target, weight, **options), (logits,)

    return make


def _every_option(draw: Draw, rows: int) -> Problem:
    target, weight = draw.labels(5, rows), draw.positive(5)

    def loss(logits: Tensor, row_weight: Tensor, divisor: Tensor) -> Tensor:
        return gk.cross_entropy(
            logits, target, weight, label_smoothing=0.1, softcap=3.0, logit_scale=0.7, z_loss=0.01,
            row_weight=row_weight, divisor=divisor,
        )  # fmt: skip

    return loss, (draw.normal(rows, 5), draw.positive(rows), draw.positive())


def _fixed_row_weight(draw: Draw, rows: int) -> Problem:
    target, row_weight = draw.labels(5, rows), draw.positive(rows)
    return lambda x: gk.cross_entropy(x, target, row_weight=row_weight, divisor=7.0), (draw.normal(rows, 5),)


def _soft_targets(draw: Draw, rows: int) -> Problem:
    weight = draw.positive(5)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return gk.cross_entropy(logits, target, weight, label_smoothing=0.2, softcap=4.0, reduction="sum")

    return loss, (draw.normal(rows, 5), draw.probabilities(rows, 5))


def _statistics(draw: Draw, rows: int) -> Problem:
    target = draw.labels(5, rows)

    def loss(logits: Tensor) -> Tensor:
        stats = gk.cross_entropy(logits, target, return_stats=True)
        return stats.loss + 0.1 * stats.lse.sum() + 0.2 * stats.log_prob.square().sum() - 0.3 * stats.entropy.sum()

    return loss, (draw.normal(rows, 5),)


def _head(draw: Draw, rows: int, **options: Any) -> Problem:
    target = draw.labels(5, rows)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return gk.linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options)

    return loss, (draw.normal(rows, 3), draw.normal(5, 3), draw.normal(5))


def _head_statistics(draw: Draw, rows: int) -> Problem:
    target = draw.labels(5, rows)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        stats = gk.linear_cross_entropy(hidden, weight, target, return_stats=True)
        return stats.loss + 0.1 * stats.lse.sum() + 0.2 * stats.log_prob.square().sum() - 0.3 * stats.entropy.sum()

    return loss, (draw.normal(rows, 3), draw.normal(5, 3))


def _negative_log_likelihood(draw: Draw, rows: int, **options: Any) -> Problem:
    target, weight = draw.labels(5, rows), draw.positive(5)
    return lambda x: gk.nll_loss(x, target, weight, **options), (torch.log_softmax(draw.normal(rows, 5), 1),)


def _binary(draw: Draw, rows: int) -> Problem:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return gk.binary_cross_entropy_with_logits(logits, target)

    return loss, (draw.normal(rows, 5), draw.positive(rows, 5) - 0.4)


def _binary_options(draw: Draw, rows: int) -> Problem:
    weight, pos_weight = draw.positive(rows, 1), draw.positive(5)
    mask = draw.positive(rows, 5) > 0.7

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return gk.binary_cross_entropy_with_logits(
            logits, target, weight, pos_weight=pos_weight, label_smoothing=0.1, mask=mask
        )

    return loss, (draw.normal(rows, 5), draw.positive(rows, 5) - 0.4)


def _binary_rows(draw: Draw, rows: int) -> Problem:
    pos_weight, target = draw.positive(5), draw.positive(rows, 5) - 0.4

    def loss(logits: Tensor) -> Tensor:
        return gk.binary_cross_entropy_with_logits(logits, target, pos_weight=pos_weight, reduction="none")

    return loss, (draw.normal(rows, 5),)


def _gaussians(prior: bool, **options: Any) -> Callable[[Draw, int], Problem]:
    def make(draw: Draw, rows: int) -> Problem:
        shapes = [(rows, 5), (rows, 5), *([(5,), (5,)] if prior else [])]
        return lambda *tensors: gk.gaussian_kl(*tensors, **options), tuple(draw.normal(*s) for s in shapes)

    return make


def _regression(loss: Callable[..., Tensor], weighted: bool = False, **options: Any) -> Callable[[Draw, int], Problem]:
    def make(draw: Draw, rows: int) -> Problem:
        fixed = {"weight": draw.positive(rows, 5)} if weighted else {}
        return lambda x, t: loss(x, t, **fixed, **options), (draw.normal(rows, 5), draw.normal(rows, 5))

    return make


def _likelihood(draw: Draw, rows: int, *shared: int, **options: Any) -> Problem:
    # By log-variances, so that no step away from them makes a variance negative.
    tensors = draw.normal(rows, 5), draw.normal(rows, 5), draw.normal(*shared or (rows, 5))
    return lambda x, t, logvar: gk.gaussian_nll_loss(x, t, logvar.exp(), **options), tensors


def _students(loss: Callable[..., Tensor], **options: Any) -> Callable[[Draw, int], Problem]:
    def make(draw: Draw, rows: int) -> Problem:
        return lambda x, y: loss(x, y, **options), (draw.normal(rows, 5), draw.normal(rows, 5))

    return make


def _entropy(draw: Draw, rows: int, **options: Any) -> Problem:
    return lambda x: gk.categorical_entropy(x, **options), (draw.normal(rows, 5),)


def _autoencoder(recon_loss: str, **options: Any) -> Callable[[Draw, int], Problem]:
    def make(draw: Draw, rows: int) -> Problem:
        def loss(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
            if recon_loss == "bce":
                recon, target = recon.sigmoid(), target.sigmoid()
            found = gk.vae_loss(recon, target, mu, logvar, recon_loss=recon_loss, **options)
            return found.loss + 0.25 * found.recon - 0.5 * found.kl

        shapes = (rows, 3, 2), (rows, 3, 2), (rows, 5), (rows, 5)
        return loss, tuple(draw.normal(*shape) for shape in shapes)

    return make


def _annealed(draw: Draw, rows: int) -> Problem:
    beta = draw.positive()

    def loss(recon: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return gk.vae_loss(recon, torch.zeros_like(recon), mu, logvar, beta=beta).loss

    return loss, (draw.normal(rows, 6), draw.normal(rows, 5), draw.normal(rows, 5))


def _discriminator(kind: str, extra: int = 1, **options: Any) -> Callable[[Draw, int], Problem]:
    def make(draw: Draw, rows: int) -> Problem:
        # Away from the margins of the hinge.
        scores = draw.normal(rows, 3) * 0.2, draw.normal(rows, 2 + extra) * 0.2
        return lambda real, fake: gk.gan_discriminator_loss(real, fake, kind, **options), scores

    return make


def _generator(draw: Draw, rows: int) -> Problem:
    return lambda fake: gk.gan_generator_loss(fake, "minimax"), (draw.normal(rows, 3),)


def _relativistic(draw: Draw, rows: int) -> Problem:
    scores = draw.normal(rows, 3), draw.normal(rows, 3)
    return lambda fake, real: gk.gan_generator_loss(fake, "relativistic", real=real, reduction="none"), scores


def _gradient_penalty(draw: Draw, rows: int) -> Problem:
    return lambda grad: gk.gradient_penalty(grad, target=0.5), (draw.normal(rows, 3, 2),)


def _r1_penalty(draw: Draw, rows: int) -> Problem:
    return lambda grad: gk.r1_penalty(grad, gamma=3.0, reduction="none"), (draw.normal(rows, 3, 2),)


def _energies(reduction: str) -> Callable[[Draw, int], Problem]:
    def make(draw: Draw, rows: int) -> Problem:
        sides = draw.normal(rows, 3), draw.normal(rows, 3)
        return lambda a, b: gk.contrastive_divergence_loss(a, b, l2=0.3, reduction=reduction), sides

    return make


def _probabilities(draw: Draw, rows: int) -> Problem:
    weight = draw.positive(rows, 1)

    # Probabilities that stay within however they are moved.
    def loss(x: Tensor, t: Tensor) -> Tensor:
        return gk.binary_cross_entropy(x.sigmoid(), t.sigmoid(), weight)

    return loss, (draw.normal(rows, 5), draw.normal(rows, 5))


def _divergence(draw: Draw, rows: int) -> Problem:
    # A target that stays positive however it is moved.
    def loss(x: Tensor, t: Tensor) -> Tensor:
        return gk.kl_div(x, t.sigmoid(), reduction="batchmean")

    return loss, (draw.normal(rows, 5), draw.normal(rows, 5))


def _divergence_of_logarithms(draw: Draw, rows: int) -> Problem:
    def loss(x: Tensor, t: Tensor) -> Tensor:
        return gk.kl_div(x, t, reduction="none", log_target=True)

    return loss, (draw.normal(rows, 5), draw.normal(5))


def _cosines(draw: Draw, rows: int) -> Problem:
    labels = torch.tensor([1, -1, 0, -1], device=draw.device).repeat(rows)[:rows]

    # Cosines that stay above the margin.
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return gk.cosine_embedding_loss(x, y, labels, margin=-1.0)

    return loss, (draw.normal(rows, 5), draw.normal(rows, 5))


def _cosines_with_one(draw: Draw, rows: int) -> Problem:
    labels = torch.ones(rows, device=draw.device, dtype=torch.int64)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return gk.cosine_embedding_loss(x, y, labels, reduction="none")

    return loss, (draw.normal(rows, 5), draw.normal(1, 5))


def _examples() -> Iterator[Example]:
    loss = "cross_entropy"
    yield Example("ignored rows", loss, _labelled(5))
    yield Example("per row weighted smoothed", loss, _labelled(5, 3, weighted=True, label_smoothing=0.1, reduction="none"))
    yield Example("softcap and z-loss", loss, _labelled(5, softcap=2.0, z_loss=0.05, logit_scale=1.5, reduction="sum"))
    yield Example("row weight and fixed divisor", loss, _fixed_row_weight)
    yield Example("weights and divisor differentiable", loss, _every_option)
    yield Example("soft targets", loss, _soft_targets)
    yield Example("statistics", loss, _statistics)
    loss = "linear_cross_entropy"
    yield Example("mean", loss, _head)
    yield Example("per row smoothed", loss, lambda draw, rows: _head(draw, rows, label_smoothing=0.1, reduction="none"))
    yield Example(
        "softcap and z-loss", loss, lambda draw, rows: _head(draw, rows, softcap=2.0, z_loss=0.05, reduction="sum")
    )
    yield Example("statistics", loss, _head_statistics)
    loss = "nll_loss"
    yield Example("weighted mean", loss, _negative_log_likelihood)
    yield Example("per row", loss, lambda draw, rows: _negative_log_likelihood(draw, rows, reduction="none"))
    yield Example("weighted", "binary_cross_entropy", _probabilities)
    loss = "binary_cross_entropy_with_logits"
    yield Example("plain", loss, _binary)
    yield Example("weighted smoothed masked", loss, _binary_options)
    yield Example("per element", loss, _binary_rows)
    loss = "gaussian_kl"
    yield Example("standard", loss, _gaussians(False))
    yield Example("learned prior", loss, _gaussians(True, reduction="none"))
    # The bounds lie away from every element, sample and log-variance that is drawn.
    yield Example("free bits, clamp", loss, _gaussians(True, free_bits=0.3, logvar_clamp=(-1.0, 1.0), reduction="sum"))
    yield Example("capacity", loss, _gaussians(True, capacity=9.0, reduction="mean"))
    yield Example("batchmean", "kl_div", _divergence)
    yield Example("shared logarithms", "kl_div", _divergence_of_logarithms)
    yield Example("labels", "cosine_embedding_loss", _cosines)
    yield Example("one row for all", "cosine_embedding_loss", _cosines_with_one)
    loss = "gaussian_nll_loss"
    yield Example("with the constant", loss, lambda draw, rows: _likelihood(draw, rows, full=True))
    yield Example("one variance a row", loss, lambda draw, rows: _likelihood(draw, rows, rows, 1, reduction="none"))
    yield Example("weighted mean", "mse_loss", _regression(gk.mse_loss, weighted=True))
    yield Example("weighted mean", "l1_loss", _regression(gk.l1_loss, weighted=True))
    yield Example("per element", "smooth_l1_loss", _regression(gk.smooth_l1_loss, beta=1.5, reduction="none"))
    yield Example("weighted mean", "huber_loss", _regression(gk.huber_loss, weighted=True, delta=0.7))
    yield Example("forward", "kl_div_with_logits", _students(gk.kl_div_with_logits, temperature=1.5))
    reverse = _students(gk.kl_div_with_logits, direction="reverse", reduction="none")
    yield Example("reverse per row", "kl_div_with_logits", reverse)
    mixed = _students(gk.js_div_with_logits, beta=0.3, temperature=2.0, reduction="mean")
    yield Example("mean", "js_div_with_logits", mixed)
    yield Example("per row", "categorical_entropy", _entropy)
    yield Example("sum", "categorical_entropy", lambda draw, rows: _entropy(draw, rows, reduction="sum"))
    loss = "vae_loss"
    yield Example("logits", loss, _autoencoder("bce_with_logits", beta=2.0))
    yield Example("probabilities, free bits", loss, _autoencoder("bce", free_bits=0.3, reduction="mean"))
    yield Example("distances, capacity", loss, _autoencoder("l1", capacity=9.0, reduction="sum"))
    yield Example("squares per sample", loss, _autoencoder("mse", capacity=9.0, reduction="none"))
    yield Example("annealed beta", loss, _annealed)
    loss = "gan_discriminator_loss"
    yield Example("logistic", loss, _discriminator("non_saturating"))
    yield Example("least squares", loss, _discriminator("lsgan", 2, reduction="sum"))
    yield Example("hinge per element", loss, _discriminator("hinge", reduction="none"))
    yield Example("saturating", "gan_generator_loss", _generator)
    yield Example("relativistic", "gan_generator_loss", _relativistic)
    yield Example("squared distance", "gradient_penalty", _gradient_penalty)
    yield Example("per sample", "r1_penalty", _r1_penalty)
    yield Example("mean", "contrastive_divergence_loss", _energies("mean"))
    yield Example("per element", "contrastive_divergence_loss", _energies("none"))


EXAMPLES = tuple(_examples())


def select(*losses: str) -> list[Example]:
    """Examples of the given losses, or of all."""
    return [e for e in EXAMPLES if not losses or e.loss in losses]
