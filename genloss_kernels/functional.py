"""The public functions, named as in ``torch.nn.functional``."""

from .losses.adversarial.api import gan_discriminator_loss, gan_generator_loss, gradient_penalty, r1_penalty
from .losses.binary_cross_entropy.api import binary_cross_entropy, binary_cross_entropy_with_logits
from .losses.cosine.api import cosine_embedding_loss
from .losses.cross_entropy.api import CrossEntropyStats, cross_entropy
from .losses.divergence.api import categorical_entropy, js_div_with_logits, kl_div_with_logits
from .losses.energy.api import contrastive_divergence_loss
from .losses.gaussian_kl.api import gaussian_kl
from .losses.gaussian_nll.api import gaussian_nll_loss
from .losses.kl_div.api import kl_div
from .losses.linear_cross_entropy.api import linear_cross_entropy
from .losses.linear_cross_entropy.options import LinearCrossEntropyOptions
from .losses.nll_loss.api import nll_loss
from .losses.regression.api import huber_loss, l1_loss, mse_loss, smooth_l1_loss
from .losses.vae.api import VAELossOutput, vae_loss

__all__ = [
    "CrossEntropyStats",
    "LinearCrossEntropyOptions",
    "VAELossOutput",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "categorical_entropy",
    "contrastive_divergence_loss",
    "cosine_embedding_loss",
    "cross_entropy",
    "gan_discriminator_loss",
    "gan_generator_loss",
    "gaussian_kl",
    "gaussian_nll_loss",
    "gradient_penalty",
    "huber_loss",
    "js_div_with_logits",
    "kl_div",
    "kl_div_with_logits",
    "l1_loss",
    "linear_cross_entropy",
    "mse_loss",
    "nll_loss",
    "r1_penalty",
    "smooth_l1_loss",
    "vae_loss",
]
