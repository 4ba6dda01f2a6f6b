"""Train a small energy-based model on handwritten digits with torch's losses and with ours; check that the curves agree.

    python benchmarks/train_energy.py

Three runs share seed, batches and noise: torch (contrastive divergence written out), genloss_kernels
(contrastive_divergence_loss), and a control, torch's loss again from weights that are moved by one unit in the last place,
which shows how far rounding alone drives two runs apart; see train_lm.py for the check. Negative samples are drawn by
Langevin steps that go on from a buffer of earlier ones (Du and Mordatch, "Implicit Generation and Modeling with Energy
Based Models", 2019).

Written to --out: train_energy.json, train_energy.png (curves), train_energy_pictures.png (samples).
"""

import sys
from collections.abc import Callable, Sequence

import torch
from digits import COLUMNS, SIZE, Config, Outcome, compare, digits, last_words, noise, parser, spread_over, trained
from runs import perturb_by_one_ulp
from torch import Tensor, nn

import genloss_kernels as gk

L2, LANGEVIN_STEPS, STEP_SIZE, NOISE = 0.1, 12, 4.0, 0.005

# The loss of the energies of real and of drawn pictures.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch": lambda real, drawn: real.mean() - drawn.mean() + L2 * (real.square().mean() + drawn.square().mean()),
    "genloss_kernels": lambda real, drawn: gk.contrastive_divergence_loss(real, drawn, l2=L2),
}


def _energy() -> nn.Module:
    width = 16
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1), nn.SiLU(),
        nn.Conv2d(width, 2 * width, 4, 2, 1), nn.SiLU(),
        nn.Flatten(), nn.Linear(2 * width * (SIZE // 4) ** 2, 1), nn.Flatten(0),
    )  # fmt: skip


def langevin(model: nn.Module, pictures: Tensor, config: Config, seed: int) -> Tensor:
    """Downhill in energy, with noise."""
    for step in range(LANGEVIN_STEPS):
        pictures = pictures.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(pictures).sum(), pictures)
        moved = pictures.detach() - STEP_SIZE * slope.clamp(-0.03, 0.03)
        pictures = (moved + NOISE * noise(config, *moved.shape, seed=seed + step)).clamp(0.0, 1.0)
    return pictures.detach()


def train(config: Config, losses: str, perturb: bool) -> Outcome:
    torch.manual_seed(config.seed)
    model, images = _energy(), digits()
    if perturb:
        perturb_by_one_ulp(model, config.seed + 1)
    model.to(config.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.0, 0.999))
    drawn = noise(config, config.batch, 1, SIZE, SIZE, seed=-3).sigmoid()

    def step(number: int, real: Tensor) -> float:
        seed = 100 * number
        # A few chains start again from noise, so that not all end in the same valleys.
        fresh = max(1, config.batch // 16)
        drawn[:fresh] = noise(config, fresh, 1, SIZE, SIZE, seed=seed).sigmoid()
        drawn.copy_(langevin(model, drawn, config, seed))
        drawn.copy_(drawn.roll(fresh, 0))
        optimizer.zero_grad()
        loss = LOSSES[losses](model(real), model(drawn))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    run = trained(step, images, config)
    pictures = {"digits": spread_over(images), "samples": drawn[-COLUMNS:].flip(0)}
    return Outcome(run, {title: rows.cpu() for title, rows in pictures.items()})


def main(argv: Sequence[str] | None = None, isolate: bool = True) -> int:
    """Run the comparison and return the exit status; without ``isolate`` all runs share this process."""
    args = last_words(argv, parser((__doc__ or "").partition("\n")[0], name="train_energy", steps=600, batch=64, lr=1e-3))
    config = Config(args.steps, args.batch, args.seed, args.lr, args.device)
    return compare("train_energy", "contrastive divergence", train, config, args.out, isolate)


if __name__ == "__main__":
    sys.exit(main())
