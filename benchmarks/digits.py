"""What the training scripts on handwritten digits share: the data, and the comparison of the runs."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from curves import check_curves, device_name, loss_table, save_json, save_plot, speed_table, verdict
from matplotlib.figure import Figure
from runs import Run, call_here, call_in_new_process, measure
from torch import Tensor

# The pictures of scikit-learn are 8 pixels wide.
SIZE = 16
COLUMNS = 12


@dataclass(frozen=True)
class Config:
    """What the runs under comparison have in common, beside what a script adds."""

    steps: int
    batch: int
    seed: int
    lr: float
    device: str


@dataclass(frozen=True)
class Outcome:
    """A run, and rows of pictures by title, each (COLUMNS, 1, SIZE, SIZE) in [0, 1]."""

    run: Run
    pictures: dict[str, Tensor]


# Trains with the losses of the given name, from weights that are moved by one ulp if the flag is set.
Train = Callable[[Config, str, bool], Outcome]


def digits() -> Tensor:
    """The 1797 handwritten digits of scikit-learn (UCI ML hand-written digits), (1797, 1, SIZE, SIZE) in [0, 1]."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16.0
    return F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False).clamp(0.0, 1.0)


def batches(images: Tensor, config: Config) -> Iterator[Tensor]:
    """``config.steps`` batches, drawn anew for each epoch."""
    generator = torch.Generator().manual_seed(config.seed)
    given = 0
    while True:
        for rows in torch.randperm(len(images), generator=generator).split(config.batch):
            if given == config.steps:
                return
            if len(rows) == config.batch:
                given += 1
                yield images[rows].to(config.device)


def trained(step: Callable[[int, Tensor], float], images: Tensor, config: Config) -> Run:
    """``step(number, batch)`` for each batch, measured."""
    steps = (partial(step, number, batch) for number, batch in enumerate(batches(images, config)))
    return measure(steps, config.batch, "pictures", torch.device(config.device))


def noise(config: Config, *shape: int, seed: int) -> Tensor:
    """The same for all runs and on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(config.seed + seed)).to(config.device)


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--steps", type=int, default=defaults["steps"], help="optimizer steps of each run")
    made.add_argument("--batch", type=int, default=defaults["batch"], help="pictures per step")
    made.add_argument("--lr", type=float, default=defaults["lr"], help="Adam learning rate")
    made.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the noise")
    made.add_argument("--out", type=Path, default=Path("build") / defaults["name"], help="folder for results")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of PyTorch")
    return made


def compare(name: str, label: str, train: Train, config: Config, out: Path, isolate: bool) -> int:
    """Run torch, genloss_kernels and the control; report and save; return the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    call = call_in_new_process if isolate else call_here
    print(f"device  {device_name(config.device)}", flush=True)
    variants = {"torch": ("torch", False), "genloss_kernels": ("genloss_kernels", False), "control": ("torch", True)}
    outcomes: dict[str, Outcome] = {
        variant: call(train, config, losses, perturb) for variant, (losses, perturb) in variants.items()
    }
    runs = {variant: outcome.run for variant, outcome in outcomes.items()}
    check = check_curves(*(run.losses for run in runs.values()))
    save_plot(out / f"{name}.png", runs, check, label)
    save_pictures(out / f"{name}_pictures.png", {n: outcomes[n].pictures for n in ("torch", "genloss_kernels")})
    save_json(out / f"{name}.json", config.device, runs, check, config=asdict(config))
    print(f"\n{speed_table(runs, config.device)}\n\n{loss_table(runs)}\n\n{verdict(check)}")
    return 0 if check.passed else 1


def save_pictures(path: Path, pictures: dict[str, dict[str, Tensor]]) -> None:
    rows = [(f"{run}: {title}", images) for run, titled in pictures.items() for title, images in titled.items()]
    figure = Figure(figsize=(COLUMNS * 0.7, len(rows) * 0.95), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        axes.imshow(torch.cat([*images.squeeze(1)], 1).numpy(), cmap="gray", vmin=0.0, vmax=1.0)
        axes.set_title(title, fontsize=8, loc="left")
        axes.axis("off")
    figure.savefig(path, dpi=120)


def spread_over(images: Tensor) -> Tensor:
    """COLUMNS pictures of a set, evenly spaced."""
    places = torch.linspace(0, len(images) - 1, COLUMNS).long()
    return images[places]


def last_words(argv: Sequence[str] | None, made: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, of which numbers must be positive."""
    args = made.parse_args(argv)
    for name in ("steps", "batch"):
        if getattr(args, name) < 1:
            made.error(f"--{name} must be at least 1")
    return args
