"""Hugging Face transformers: the loss of causal language models, and a patch that puts it into one model."""

from .loss import causal_lm_loss
from .patching import PatchHandle, patch

__all__ = ["PatchHandle", "causal_lm_loss", "patch"]
