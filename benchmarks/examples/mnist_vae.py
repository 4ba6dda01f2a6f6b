"""A variational autoencoder (Kingma and Welling, 2013) on handwritten digits.

    python benchmarks/examples/mnist_vae.py --steps 300

The digits are those that come with scikit-learn, enlarged to the 28 x 28 pixels of MNIST.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


class VAE(nn.Module):
    def __init__(self, pixels, hidden=400, latents=20):
        super().__init__()
        self.encode = nn.Linear(pixels, hidden)
        self.mu = nn.Linear(hidden, latents)
        self.logvar = nn.Linear(hidden, latents)
        self.decode = nn.Sequential(nn.Linear(latents, hidden), nn.ReLU(), nn.Linear(hidden, pixels), nn.Sigmoid())

    def forward(self, x):
        hidden = F.relu(self.encode(x))
        mu, logvar = self.mu(hidden), self.logvar(hidden)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decode(z), mu, logvar


def loss_function(recon, x, mu, logvar):
    bce = F.binary_cross_entropy(recon, x, reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce + kld


def digits():
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16.0
    return F.interpolate(images, size=(28, 28), mode="bilinear").flatten(1)


def main(argv=None):
    parser = argparse.ArgumentParser(description="variational autoencoder on handwritten digits")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = digits()
    model = VAE(images.size(1)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

    losses = []
    while len(losses) < args.steps:
        for batch in images[torch.randperm(len(images))].split(args.batch_size)[: args.steps - len(losses)]:
            x = batch.to(device)
            optimizer.zero_grad()
            recon, mu, logvar = model(x)
            loss = loss_function(recon, x, mu, logvar)
            loss.backward()
            optimizer.step()
            losses.append(loss.item() / len(x))
            if len(losses) % 10 == 0:
                print(f"step {len(losses):4d}  loss {losses[-1]:9.4f}")
    return losses


if __name__ == "__main__":
    main()
