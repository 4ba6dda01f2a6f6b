"""Cases of contrastive divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .case import BENCH, BYTES, DOCTOR, Call, Case, table
from .draws import FLOAT32, scores


def contrastive_divergence_loss_oracle(
    positive_energy: Tensor, negative_energy: Tensor, l2: float = 0.0, reduction: str = "mean"
) -> Tensor:
    if reduction == "none":
        return positive_energy - negative_energy + l2 * (positive_energy.square() + negative_energy.square())
    reduced = torch.mean if reduction == "mean" else torch.sum
    squares = reduced(positive_energy.square()) + reduced(negative_energy.square())
    return reduced(positive_energy) - reduced(negative_energy) + l2 * squares


_case = table(contrastive_divergence_loss=contrastive_divergence_loss_oracle)


def energy() -> Iterator[Case]:
    loss, names = "contrastive_divergence_loss", ("positive_energy", "negative_energy")

    def sides(*shapes: tuple[int, ...], **options: Any) -> Callable[..., Call]:
        return scores(options, **dict(zip(names, shapes, strict=True)))

    yield _case(loss, "energies 2**18 and 2**17", sides((2**18,), (2**17,), l2=0.1), BYTES)
    yield _case(loss, "energies 1003 and 517", sides((1003,), (517,), l2=0.1), DOCTOR)
    yield _case(loss, "per element", sides((37, 31), (37, 31), l2=0.1, reduction="none"), DOCTOR)
    yield _case(loss, "energies", sides((2**20,), (2**20,), l2=0.1), BENCH, dtypes=FLOAT32)
