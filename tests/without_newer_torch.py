"""A plugin, ``pytest -p tests.without_newer_torch``, that takes from torch what 2.11, the oldest one supported, lacks."""

from __future__ import annotations

from operator import attrgetter

import torch
import torch.distributed

NEWER = (
    "distributed.all_gather_single",
    "nn.functional.linear_cross_entropy",
    "nn.LinearCrossEntropyLoss",
    "nn.LinearCrossEntropyOptions",
)

for _name in NEWER:
    _path, _, _last = f"torch.{_name}".rpartition(".")
    _owner = attrgetter(_path.partition(".")[2])(torch)
    if hasattr(_owner, _last):
        delattr(_owner, _last)
