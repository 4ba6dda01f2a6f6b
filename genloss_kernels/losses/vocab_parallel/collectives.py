"""The two collectives that vocabulary-parallel losses need, by the name of their group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(tensor: Tensor, ranks: int, group: str) -> Tensor:
    """``tensor`` of every rank, stacked in the order of the ranks; nothing is sent where there is nothing to send."""
    gathered = tensor.new_empty((ranks, *tensor.shape))
    if tensor.numel():
        # Torch 2.13 renames it, and warns of the old name.
        run = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        run(gathered.view(-1), tensor.reshape(-1), group=_resolve(group))
    return gathered


def all_reduce(tensor: Tensor, group: str) -> Tensor:
    """Replace ``tensor``, which must be contiguous, by its sum over the ranks."""
    if tensor.numel():
        dist.all_reduce(tensor, group=_resolve(group))
    return tensor


def _resolve(group: str) -> dist.ProcessGroup:
    return torch.distributed.distributed_c10d._resolve_process_group(group)  # pyright: ignore[reportArgumentType]
