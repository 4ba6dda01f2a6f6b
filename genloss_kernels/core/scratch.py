"""Buffers that one block after another uses, and one call after another where they are small."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import unwatched

# Bytes of a buffer up to which it outlives its call, and of all that do, on each thread.
POOLED_BUFFER = 2**20
POOLED = 2**24

_Key = tuple[int, torch.dtype]


class _Pool(threading.local):
    """Buffers on the CPU that nobody uses, those used last at the end."""

    def __init__(self) -> None:
        self.bytes = 0
        self._buffers: OrderedDict[_Key, list[Tensor]] = OrderedDict()

    def take(self, key: _Key) -> Tensor | None:
        buffers = self._buffers.get(key)
        if buffers is None:
            return None
        buffer = buffers.pop()
        self.bytes -= buffer.nbytes
        if not buffers:
            del self._buffers[key]
        return buffer

    def give(self, buffer: Tensor) -> None:
        key = buffer.numel(), buffer.dtype
        self._buffers.setdefault(key, []).append(buffer)
        self._buffers.move_to_end(key)
        self.bytes += buffer.nbytes
        while self.bytes > POOLED:
            self.take(next(iter(self._buffers)))


_pool = _Pool()


class Scratch:
    """Uninitialised buffers by name, kept for as long as this object lives; no result may share their memory.

    A buffer freed may go back to the system, and getting it again then costs a page fault for each 4 KiB, more than the
    arithmetic on it.
    """

    # Of one that a compiler makes without calling the next.
    _pooled = False

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}
        self._pooled = unwatched(()) and not torch.is_inference_mode_enabled()

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (name, tuple(shape), dtype)
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = self._make(torch.Size(shape), dtype, device)
        return buffer

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """``tensor`` itself if it has the dtype, else a copy of it in the buffer."""
        if tensor.dtype == dtype:
            return tensor
        return self.take(name, tensor.shape, dtype, tensor.device).copy_(tensor)

    def _make(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._pooled and device.type == "cpu" and shape.numel() * dtype.itemsize <= POOLED_BUFFER:
            buffer = _pool.take((shape.numel(), dtype))
            if buffer is not None:
                return buffer.view(shape)
        return torch.empty(shape, dtype=dtype, device=device)

    def __del__(self) -> None:
        if self._pooled:
            for buffer in self._buffers.values():
                if buffer.device.type == "cpu" and buffer.nbytes <= POOLED_BUFFER and buffer.numel():
                    _pool.give(buffer.detach())
