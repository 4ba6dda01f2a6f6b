"""The public functions, named as in ``torch.nn.functional``."""

from .losses.binary_cross_entropy.api import binary_cross_entropy_with_logits
from .losses.cross_entropy.api import CrossEntropyStats, cross_entropy
from .losses.divergence.api import categorical_entropy, js_div_with_logits, kl_div_with_logits
from .losses.gaussian_kl.api import gaussian_kl
from .losses.gaussian_nll.api import gaussian_nll_loss
from .losses.linear_cross_entropy.api import linear_cross_entropy
from .losses.linear_cross_entropy.options import LinearCrossEntropyOptions
from .losses.nll_loss.api import nll_loss
from .losses.regression.api import huber_loss, l1_loss, mse_loss, smooth_l1_loss

__all__ = [
    "CrossEntropyStats",
    "LinearCrossEntropyOptions",
    "binary_cross_entropy_with_logits",
    "categorical_entropy",
    "cross_entropy",
    "gaussian_kl",
    "gaussian_nll_loss",
    "huber_loss",
    "js_div_with_logits",
    "kl_div_with_logits",
    "l1_loss",
    "linear_cross_entropy",
    "mse_loss",
    "nll_loss",
    "smooth_l1_loss",
]
