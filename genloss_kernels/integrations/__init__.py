"""The losses inside other libraries; none of these is imported before it is needed."""

from . import torch_patch, transformers

__all__ = ["torch_patch", "transformers"]
