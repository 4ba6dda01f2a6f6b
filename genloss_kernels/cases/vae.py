"""Cases of the loss of a variational autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .case import BENCH, BYTES, DOCTOR, Call, Case, table, torchs
from .draws import FLOAT32, logits
from .gaussian import gaussian_kl_oracle, gaussian_kl_usual


def vae_loss_oracle(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    recon_loss: str = "mse",
    beta: float | Tensor = 1.0,
    reduction: str = "batchmean",
    free_bits: float | None = None,
    capacity: float | None = None,
) -> Tensor:
    """Torch's loss of the pixels and the divergence by ``torch.distributions``."""
    pixels = VAE_RECONSTRUCTION[recon_loss](recon, target, reduction="none")
    kl = gaussian_kl_oracle(mu, logvar, reduction="none", free_bits=free_bits)
    terms = [term.flatten(1).sum(1) if term.dim() > 1 else term for term in (pixels, kl)]
    if capacity is not None:
        terms[1] = (terms[1] - capacity).abs()
    if reduction == "mean":
        return pixels.mean() + beta * (kl.mean() if capacity is None else terms[1].mean())
    loss = terms[0] + beta * terms[1]
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / mu.size(0)


VAE_RECONSTRUCTION = {
    "mse": torchs.mse_loss,
    "l1": torchs.l1_loss,
    "bce": torchs.binary_cross_entropy,
    "bce_with_logits": torchs.binary_cross_entropy_with_logits,
}


def vae_loss_usual(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, recon_loss: str = "mse") -> Tensor:
    """What most training scripts do."""
    pixels = VAE_RECONSTRUCTION[recon_loss](recon, target, reduction="sum")
    return pixels / recon.size(0) + gaussian_kl_usual(mu, logvar)


def _autoencoder(*shape: int, latents: int, recon_loss: str, annealed: float | None = None, **options: Any) -> Any:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        def uniform() -> Tensor:
            return torch.rand(shape, generator=generator, device=device).to(dtype)

        arguments = {
            "recon": uniform() if recon_loss == "bce" else logits(generator, device, dtype, *shape),
            "target": uniform(),
            "mu": torch.randn(shape[0], latents, generator=generator, device=device).to(dtype),
            "logvar": torch.randn(shape[0], latents, generator=generator, device=device).to(dtype),
        }
        if annealed is not None:
            arguments["beta"] = torch.tensor(annealed, device=device, dtype=dtype)
        return Call(arguments | {"recon_loss": recon_loss} | options, ("recon", "mu", "logvar"))

    return make


_case = table(vae_loss=vae_loss_oracle)


def vae_loss() -> Iterator[Case]:
    loss, logits = "vae_loss", "bce_with_logits"
    yield _case(loss, "logits (8, 3, 64, 64) and 128", _autoencoder(8, 3, 64, 64, latents=128, recon_loss=logits), BYTES)
    yield _case(loss, "logits 37 x 784 and 20", _autoencoder(37, 784, latents=20, recon_loss=logits), DOCTOR)
    yield _case(loss, "squares, ragged 61 x 5003 and 1021", _autoencoder(61, 5003, latents=1021, recon_loss="mse"), BYTES)
    yield _case(loss, "squares 7 x 1001 and 33", _autoencoder(7, 1001, latents=33, recon_loss="mse", beta=4.0), DOCTOR)
    yield _case(loss, "distances", _autoencoder(7, 3, 9, 11, latents=33, recon_loss="l1", reduction="mean"), DOCTOR)
    yield _case(loss, "probabilities", _autoencoder(7, 3, 9, 11, latents=33, recon_loss="bce", reduction="sum"), DOCTOR)
    yield _case(
        loss, "free bits, capacity, annealed beta",
        _autoencoder(17, 501, latents=101, recon_loss=logits, free_bits=0.5, capacity=120.0, annealed=0.75), DOCTOR,
    )  # fmt: skip
    yield _case(
        loss, "capacity (8, 3, 64, 64) and 4096",
        _autoencoder(8, 3, 64, 64, latents=4096, recon_loss="mse", capacity=4000.0), BYTES,
    )  # fmt: skip
    yield _case(
        loss, "per sample", _autoencoder(17, 501, latents=33, recon_loss="mse", reduction="none", capacity=40.0), DOCTOR
    )  # fmt: skip
    for name, shape, latents in (("digits 128 x 784 and 20", (128, 784), 20), ("pictures", (128, 3, 64, 64), 128)):
        make = _autoencoder(*shape, latents=latents, recon_loss=logits)
        yield _case(loss, name, make, BENCH, builtin=vae_loss_usual, dtypes=FLOAT32)
