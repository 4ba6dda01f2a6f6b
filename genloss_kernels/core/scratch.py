"""Buffers that one block after another uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Uninitialised buffers by name, kept for as long as this object lives.

    A buffer freed after each block may go back to the system, and getting it again then costs a page fault for each 4 KiB,
    more than the arithmetic on it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (name, tuple(shape), dtype)
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = torch.empty(shape, dtype=dtype, device=device)
        return buffer

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """``tensor`` itself if it has the dtype, else a copy of it in the buffer."""
        if tensor.dtype == dtype:
            return tensor
        return self.take(name, tensor.shape, dtype, tensor.device).copy_(tensor)
