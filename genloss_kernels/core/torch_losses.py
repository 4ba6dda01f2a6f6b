"""torch's own losses as they are when this package is imported, whatever is patched later; by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMES = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cosine_embedding_loss",
    "cross_entropy",
    "gaussian_nll_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "linear_cross_entropy",
    "mse_loss",
    "nll_loss",
    "smooth_l1_loss",
)

# linear_cross_entropy came after torch 2.11.
TORCH_LOSSES: dict[str, Callable[..., Any]] = {
    name: getattr(torch.nn.functional, name) for name in NAMES if hasattr(torch.nn.functional, name)
}
