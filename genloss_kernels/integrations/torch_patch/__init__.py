"""A process-wide, revertible patch under which torch's losses run this library's."""

from .handle import TorchPatch, patch_torch

__all__ = ["TorchPatch", "patch_torch"]
