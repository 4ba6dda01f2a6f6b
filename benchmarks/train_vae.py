"""Train a convolutional VAE on handwritten digits with torch's losses and with ours; check that the loss curves agree.

    python benchmarks/train_vae.py

Three runs share seed, batches and noise: torch (F.binary_cross_entropy_with_logits and the divergence written out),
genloss_kernels (vae_loss), and a control, torch's losses again from weights that are moved by one unit in the last
place, which shows how far rounding alone drives two runs apart; see train_lm.py for the check. Beta grows from 0 to 1
over the first half of the steps; it is a tensor, so that nothing is compiled or launched anew for it.

Written to --out: train_vae.json, train_vae.png (curves), train_vae_pictures.png (reconstructions and samples).
"""

import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from digits import COLUMNS, SIZE, Config, Outcome, compare, digits, last_words, noise, parser, spread_over, trained
from runs import perturb_by_one_ulp
from torch import Tensor, nn

import genloss_kernels as gk

LATENTS = 16

# The loss of logits, pictures, means, log-variances and beta.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Autoencoder(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.SiLU(),
            nn.Flatten(), nn.Linear(2 * width * (SIZE // 4) ** 2, 2 * LATENTS),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, 2 * width * (SIZE // 4) ** 2), nn.Unflatten(1, (2 * width, SIZE // 4, SIZE // 4)), nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
        )  # fmt: skip

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(images).chunk(2, 1)
        return self.decoder(mu + noise * torch.exp(0.5 * logvar)), mu, logvar


def by_torch(logits: Tensor, images: Tensor, mu: Tensor, logvar: Tensor, beta: Tensor) -> Tensor:
    recon = F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)
    kl = -0.5 * torch.sum(1.0 + logvar - mu.square() - logvar.exp()) / len(images)
    return recon + beta * kl


def by_genloss_kernels(logits: Tensor, images: Tensor, mu: Tensor, logvar: Tensor, beta: Tensor) -> Tensor:
    return gk.vae_loss(logits, images, mu, logvar, recon_loss="bce_with_logits", beta=beta).loss


LOSSES: dict[str, Loss] = {"torch": by_torch, "genloss_kernels": by_genloss_kernels}


def train(config: Config, losses: str, perturb: bool) -> Outcome:
    torch.manual_seed(config.seed)
    model, images = Autoencoder(), digits()
    if perturb:
        perturb_by_one_ulp(model, config.seed + 1)
    model.to(config.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    beta = torch.zeros((), device=config.device)

    def step(number: int, batch: Tensor) -> float:
        beta.fill_(min(1.0, 2.0 * number / config.steps))
        optimizer.zero_grad()
        loss = LOSSES[losses](*_operands(model, batch, noise(config, len(batch), LATENTS, seed=number)), beta)
        loss.backward()
        optimizer.step()
        return loss.item()

    run = trained(step, images, config)
    with torch.no_grad():
        originals = spread_over(images).to(config.device)
        mu, _ = model.encoder(originals).chunk(2, 1)
        pictures = {
            "digits": originals,
            "reconstructions": model.decoder(mu).sigmoid(),
            "samples": model.decoder(noise(config, COLUMNS, LATENTS, seed=-1)).sigmoid(),
        }
    return Outcome(run, {title: rows.cpu() for title, rows in pictures.items()})


def _operands(model: Autoencoder, batch: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, mu, logvar = model(batch, noise)
    return logits, batch, mu, logvar


def main(argv: Sequence[str] | None = None, isolate: bool = True) -> int:
    """Run the comparison and return the exit status; without ``isolate`` all runs share this process."""
    args = last_words(argv, parser((__doc__ or "").partition("\n")[0], name="train_vae", steps=1500, batch=64, lr=2e-3))
    config = Config(args.steps, args.batch, args.seed, args.lr, args.device)
    return compare("train_vae", "loss (nats per picture)", train, config, args.out, isolate)


if __name__ == "__main__":
    sys.exit(main())
