"""The case table: inputs, oracle and built-in of each loss, which tests, doctor, meters and bench share."""

from __future__ import annotations

from . import (
    adversarial,
    binary_cross_entropy,
    cross_entropy,
    divergence,
    energy,
    gaussian,
    linear_cross_entropy,
    regression,
    vae,
)
from .case import BENCH, BYTES, DOCTOR, Call, Case, floor_bytes, floor_flops

__all__ = ["BENCH", "BYTES", "CASES", "DOCTOR", "Call", "Case", "floor_bytes", "floor_flops", "select"]

CASES: tuple[Case, ...] = (
    *cross_entropy.cross_entropy(),
    *linear_cross_entropy.linear_cross_entropy(),
    *cross_entropy.nll_loss(),
    *binary_cross_entropy.binary_cross_entropy(),
    *binary_cross_entropy.binary_cross_entropy_of_probabilities(),
    *gaussian.gaussian_kl(),
    *regression.regressions(),
    *gaussian.gaussian_nll_loss(),
    *divergence.divergences(),
    *vae.vae_loss(),
    *adversarial.adversarial(),
    *energy.energy(),
    *divergence.kl_div(),
    *regression.cosine_embedding_loss(),
)


def select(use: str, losses: tuple[str, ...] = ()) -> list[Case]:
    """Cases for one use, of the given losses or of all."""
    return [c for c in CASES if use in c.uses and (not losses or c.loss in losses)]
