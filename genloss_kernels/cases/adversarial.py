"""Cases of adversarial losses and penalties."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import BENCH, BYTES, DOCTOR, Case, table, torchs
from .draws import FLOAT32, scores


def gan_discriminator_loss_oracle(
    real: Tensor, fake: Tensor, kind: str = "non_saturating", reduction: str = "mean"
) -> Tensor:
    """Binary cross entropy and the like against targets of ones and zeros."""
    if kind == "relativistic":
        return torchs.binary_cross_entropy_with_logits(real - fake, torch.ones_like(real), reduction=reduction)
    if kind in ("minimax", "non_saturating"):
        bce = torchs.binary_cross_entropy_with_logits
        sides = (bce(s, torch.full_like(s, t), reduction="none") for s, t in ((real, 1.0), (fake, 0.0)))
    elif kind == "lsgan":
        sides = ((real - 1.0).square() / 2.0, fake.square() / 2.0)
    else:
        sides = (F.relu(1.0 - real), F.relu(1.0 + fake)) if kind == "hinge" else (-real, fake)
    first, second = sides
    if reduction == "none":
        return first + second
    return first.sum() + second.sum() if reduction == "sum" else first.mean() + second.mean()


def gan_generator_loss_oracle(
    fake: Tensor, kind: str = "non_saturating", real: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """The same towards ones."""
    if kind == "minimax":
        loss = -torchs.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake), reduction="none")
    elif kind in ("non_saturating", "relativistic"):
        logits = fake if real is None else fake - real
        loss = torchs.binary_cross_entropy_with_logits(logits, torch.ones_like(fake), reduction="none")
    else:
        loss = (fake - 1.0).square() / 2.0 if kind == "lsgan" else -fake
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def gradient_penalty_oracle(grad: Tensor, target: float = 1.0, reduction: str = "mean") -> Tensor:
    loss = (torch.linalg.vector_norm(grad.flatten(1), dim=1) - target).square()
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def r1_penalty_oracle(grad: Tensor, gamma: float = 10.0, reduction: str = "mean") -> Tensor:
    loss = 0.5 * gamma * grad.flatten(1).square().sum(1)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


GAN_KINDS = ("minimax", "non_saturating", "lsgan", "hinge", "wasserstein", "relativistic")


_case = table(
    gan_discriminator_loss=gan_discriminator_loss_oracle,
    gan_generator_loss=gan_generator_loss_oracle,
    gradient_penalty=gradient_penalty_oracle,
    r1_penalty=r1_penalty_oracle,
)


def adversarial() -> Iterator[Case]:
    loss, few, patches = "gan_discriminator_loss", (16, 1, 128, 128), (64, 1, 128, 128)
    yield _case(loss, "patches (16, 1, 128, 128)", scores({}, real=few, fake=few), BYTES)
    yield _case(loss, "ragged sides", scores({"kind": "lsgan"}, real=(2**18 + 5,), fake=(2**17 + 3,)), BYTES)
    for kind in GAN_KINDS:
        fake = (37, 31) if kind == "relativistic" else (53, 41)
        yield _case(loss, kind, scores({"kind": kind}, real=(37, 31), fake=fake), DOCTOR)
    yield _case(
        loss, "per element", scores({"kind": "hinge", "reduction": "none"}, real=(37, 31), fake=(37, 31)), DOCTOR
    )  # fmt: skip
    yield _case(loss, "patches", scores({}, real=patches, fake=patches), BENCH, dtypes=FLOAT32)
    loss = "gan_generator_loss"
    yield _case(loss, "patches (16, 1, 128, 128)", scores({}, fake=few), BYTES)
    for kind in GAN_KINDS:
        shapes = {"fake": (37, 31)} | ({"real": (37, 31)} if kind == "relativistic" else {})
        yield _case(loss, kind, scores({"kind": kind, "reduction": "sum"}, **shapes), DOCTOR)
    for loss in ("gradient_penalty", "r1_penalty"):
        yield _case(loss, "images (8, 3, 64, 64)", scores({}, grad=(8, 3, 64, 64)), BYTES)
        yield _case(loss, "vectors 37 x 129", scores({}, grad=(37, 129)), DOCTOR)
        yield _case(loss, "per sample", scores({"reduction": "none"}, grad=(5, 3, 33, 31)), DOCTOR)
        yield _case(loss, "images", scores({}, grad=(64, 3, 64, 64)), BENCH, dtypes=FLOAT32)
