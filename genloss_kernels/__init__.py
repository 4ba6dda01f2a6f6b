"""Fused losses for generative models in PyTorch: Triton kernels on GPUs, PyTorch operators elsewhere."""

from . import functional, nn, testing
from .core.backend import backend
from .functional import (
    CrossEntropyStats,
    LinearCrossEntropyOptions,
    binary_cross_entropy_with_logits,
    categorical_entropy,
    cross_entropy,
    gaussian_kl,
    js_div_with_logits,
    kl_div_with_logits,
    linear_cross_entropy,
    mse_loss,
    nll_loss,
)
from .nn import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    FusedLMHead,
    GaussianKLLoss,
    JSDivWithLogitsLoss,
    KLDivWithLogitsLoss,
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
    "JSDivWithLogitsLoss",
    "KLDivWithLogitsLoss",
    "LinearCrossEntropyLoss",
    "LinearCrossEntropyOptions",
    "MSELoss",
    "NLLLoss",
    "__version__",
    "backend",
    "binary_cross_entropy_with_logits",
    "categorical_entropy",
    "cross_entropy",
    "functional",
    "gaussian_kl",
    "js_div_with_logits",
    "kl_div_with_logits",
    "linear_cross_entropy",
    "mse_loss",
    "nll_loss",
    "nn",
    "testing",
]
