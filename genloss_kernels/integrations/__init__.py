"""The losses inside other libraries; none of these is imported before it is needed."""

from . import transformers

__all__ = ["transformers"]
