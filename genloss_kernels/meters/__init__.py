"""Performance seen without a GPU: bytes, machine code, launches and synchronisations, exact to the digit."""

from .command import METERS, add_arguments, main, report

__all__ = ["METERS", "add_arguments", "main", "report"]
