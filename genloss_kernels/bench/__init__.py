"""``python -m genloss_kernels bench``: our losses against torch's built-ins and the peers that are installed."""

from .cli import add_arguments, main

__all__ = ["add_arguments", "main"]
