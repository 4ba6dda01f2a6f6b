"""Fused losses for generative models in PyTorch: Triton kernels on GPUs, PyTorch operators elsewhere."""

from . import distributed, functional, integrations, nn, testing
from .core.backend import backend
from .functional import (
    CrossEntropyStats,
    LinearCrossEntropyOptions,
    binary_cross_entropy_with_logits,
    cross_entropy,
    gaussian_kl,
    gaussian_nll_loss,
    huber_loss,
    l1_loss,
    linear_cross_entropy,
    mse_loss,
    nll_loss,
    smooth_l1_loss,
)
from .nn import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    FusedLMHead,
    GaussianKLLoss,
    GaussianNLLLoss,
    HuberLoss,
    L1Loss,
    LinearCrossEntropyLoss,
    MSELoss,
    NLLLoss,
    SmoothL1Loss,
)

__version__ = "0.1.0"

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "FusedLMHead",
    "GaussianKLLoss",
    "GaussianNLLLoss",
    "HuberLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "LinearCrossEntropyOptions",
    "MSELoss",
    "NLLLoss",
    "SmoothL1Loss",
    "__version__",
    "backend",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "distributed",
    "functional",
    "gaussian_kl",
    "gaussian_nll_loss",
    "huber_loss",
    "integrations",
    "l1_loss",
    "linear_cross_entropy",
    "mse_loss",
    "nll_loss",
    "nn",
    "smooth_l1_loss",
    "testing",
]
