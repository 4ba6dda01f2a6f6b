"""A DCGAN (Radford, Metz and Chintala, 2015) on handwritten digits.

    python benchmarks/examples/dcgan.py --steps 200

The digits are those that come with scikit-learn, enlarged to 16 x 16 pixels.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

LATENTS = 64


def generator(width=32):
    return nn.Sequential(
        nn.ConvTranspose2d(LATENTS, 2 * width, 4, 1, 0, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(True),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(True),
        nn.ConvTranspose2d(width, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def discriminator(width=32):
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(2 * width, 1, 4, 1, 0, bias=False),
        nn.Flatten(0),
        nn.Sigmoid(),
    )


def weights_init(module):
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def digits():
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16.0
    return 2.0 * F.interpolate(images, size=(16, 16), mode="bilinear") - 1.0


def main(argv=None):
    parser = argparse.ArgumentParser(description="DCGAN on handwritten digits")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = digits()
    net_g, net_d = (net.to(device).apply(weights_init) for net in (generator(), discriminator()))
    optimizer_g, optimizer_d = (torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.5, 0.999)) for net in (net_g, net_d))
    criterion = nn.BCELoss()

    losses = []
    while len(losses) < args.steps:
        for batch in images[torch.randperm(len(images))].split(args.batch_size)[: args.steps - len(losses)]:
            real = batch.to(device)
            ones, zeros = torch.ones(len(real), device=device), torch.zeros(len(real), device=device)
            fake = net_g(torch.randn(len(real), LATENTS, 1, 1, device=device))

            net_d.zero_grad()
            loss_d = criterion(net_d(real), ones) + criterion(net_d(fake.detach()), zeros)
            loss_d.backward()
            optimizer_d.step()

            net_g.zero_grad()
            loss_g = criterion(net_d(fake), ones)
            loss_g.backward()
            optimizer_g.step()

            losses.append(loss_d.item() + loss_g.item())
            if len(losses) % 10 == 0:
                print(f"step {len(losses):4d}  loss of D {loss_d.item():.4f}  loss of G {loss_g.item():.4f}")
    return losses


if __name__ == "__main__":
    main()
