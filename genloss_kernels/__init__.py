"""Fused losses for generative models in PyTorch: Triton kernels on GPUs, PyTorch operators elsewhere."""

from . import distributed, functional, integrations, nn, testing
from .core.backend import backend
from .functional import (
    CrossEntropyStats,
    LinearCrossEntropyOptions,
    binary_cross_entropy_with_logits,
    cross_entropy,
    gaussian_kl,
    linear_cross_entropy,
    mse_loss,
    nll_loss,
)
from .nn import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    FusedLMHead,
    GaussianKLLoss,
    LinearCrossEntropyLoss,
    MSELoss,
    NLLLoss,
)

__version__ = "0.1.0"

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "CrossEntropyStats",
    "FusedLMHead",
    "GaussianKLLoss",
    "LinearCrossEntropyLoss",
    "LinearCrossEntropyOptions",
    "MSELoss",
    "NLLLoss",
    "__version__",
    "backend",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "distributed",
    "functional",
    "gaussian_kl",
    "integrations",
    "linear_cross_entropy",
    "mse_loss",
    "nll_loss",
    "nn",
    "testing",
]
