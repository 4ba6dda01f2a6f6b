"""Train a small DCGAN on handwritten digits with torch's losses and with ours; check that the loss curves agree.

    python benchmarks/train_gan.py
    python benchmarks/train_gan.py --game wgan-gp

Three runs share seed, batches and noise: torch (the losses and the penalty written out), genloss_kernels, and a control,
torch's losses again from weights that are moved by one unit in the last place, which shows how far rounding alone drives
two runs apart; see train_lm.py for the check. The curve is the discriminator's loss plus the generator's.

    non-saturating   logistic losses and an R1 penalty on the real pictures (Mescheder et al., 2018)
    wgan-gp          Wasserstein losses and a gradient penalty between real and fake pictures (Gulrajani et al., 2017)

Written to --out: train_gan.json, train_gan.png (curves), train_gan_pictures.png (samples).
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from digits import COLUMNS, SIZE, Config, Outcome, compare, digits, last_words, noise, parser, spread_over, trained
from runs import perturb_by_one_ulp
from torch import Tensor, nn

import genloss_kernels as gk

LATENTS, GAMMA, WEIGHT = 32, 1.0, 10.0


@dataclasses.dataclass(frozen=True)
class GameConfig(Config):
    game: str


class Losses(NamedTuple):
    """Of scores: the discriminator's and the generator's; of a gradient (N, ...): the penalty."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    penalty: Callable[[Tensor], Tensor]


def _generator() -> nn.Module:
    width = 32
    return nn.Sequential(
        nn.Linear(LATENTS, 2 * width * (SIZE // 4) ** 2), nn.Unflatten(1, (2 * width, SIZE // 4, SIZE // 4)),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip


def _discriminator() -> nn.Module:
    width = 24
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(2 * width * (SIZE // 4) ** 2, 1), nn.Flatten(0),
    )  # fmt: skip


def _squared_norms(grad: Tensor) -> Tensor:
    return grad.flatten(1).square().sum(1)


LOSSES: dict[str, dict[str, Losses]] = {
    "non-saturating": {
        "torch": Losses(
            lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
            lambda fake: F.softplus(-fake).mean(),
            lambda grad: 0.5 * GAMMA * _squared_norms(grad).mean(),
        ),
        "genloss_kernels": Losses(
            gk.gan_discriminator_loss, gk.gan_generator_loss, lambda grad: gk.r1_penalty(grad, gamma=GAMMA)
        ),
    },
    "wgan-gp": {
        "torch": Losses(
            lambda real, fake: fake.mean() - real.mean(),
            lambda fake: -fake.mean(),
            lambda grad: WEIGHT * (_squared_norms(grad).sqrt() - 1.0).square().mean(),
        ),
        "genloss_kernels": Losses(
            lambda real, fake: gk.gan_discriminator_loss(real, fake, "wasserstein"),
            lambda fake: gk.gan_generator_loss(fake, "wasserstein"),
            lambda grad: WEIGHT * gk.gradient_penalty(grad),
        ),
    },
}


def train(config: GameConfig, losses: str, perturb: bool) -> Outcome:
    torch.manual_seed(config.seed)
    generator, discriminator, images = _generator(), _discriminator(), digits()
    if perturb:
        perturb_by_one_ulp(generator, config.seed + 1)
        perturb_by_one_ulp(discriminator, config.seed + 2)
    players = [player.to(config.device) for player in (generator, discriminator)]
    optimizers = [torch.optim.Adam(player.parameters(), lr=config.lr, betas=(0.5, 0.99)) for player in players]
    chosen = LOSSES[config.game][losses]

    def discriminate(real: Tensor, seed: int) -> float:
        fake = generator(noise(config, len(real), LATENTS, seed=seed)).detach()
        shares = noise(config, len(real), 1, 1, 1, seed=seed).sigmoid()
        place = real if config.game == "non-saturating" else fake + shares * (real - fake)
        place = place.detach().requires_grad_()
        score = discriminator(place)
        (slope,) = torch.autograd.grad(score.sum(), place, create_graph=True)
        # Of the R1 penalty the scores of the real pictures are at hand.
        of_real = score if config.game == "non-saturating" else discriminator(real)
        loss = chosen.discriminator(of_real, discriminator(fake)) + chosen.penalty(slope)
        return _learn(optimizers[1], loss)

    def generate(n: int, seed: int) -> float:
        return _learn(optimizers[0], chosen.generator(discriminator(generator(noise(config, n, LATENTS, seed=seed)))))

    def step(number: int, real: Tensor) -> float:
        return discriminate(real, 2 * number) + generate(len(real), 2 * number + 1)

    run = trained(step, images, config)
    with torch.no_grad():
        samples = [generator(noise(config, COLUMNS, LATENTS, seed=-place)) for place in (1, 2)]
    pictures = {"digits": spread_over(images), "samples": samples[0], "more samples": samples[1]}
    return Outcome(run, {title: rows.cpu() for title, rows in pictures.items()})


def _learn(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def main(argv: Sequence[str] | None = None, isolate: bool = True) -> int:
    """Run the comparison and return the exit status; without ``isolate`` all runs share this process."""
    made = parser((__doc__ or "").partition("\n")[0], name="train_gan", steps=800, batch=64, lr=4e-4)
    made.add_argument("--game", choices=LOSSES, default="non-saturating", help="losses and penalty")
    args = last_words(argv, made)
    config = GameConfig(args.steps, args.batch, args.seed, args.lr, args.device, args.game)
    return compare("train_gan", "losses of both players", train, config, args.out, isolate)


if __name__ == "__main__":
    sys.exit(main())
