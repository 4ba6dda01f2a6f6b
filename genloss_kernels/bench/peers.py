"""Other libraries' losses, used where they are installed. To add one, add its row to the table."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """A library's function; ``overwrites`` says that its gradient replaces the input, ``names`` what it calls arguments."""

    package: str
    loss: str
    module: str
    name: str
    overwrites: bool = False
    names: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def _function(self) -> Callable[..., Tensor]:
        return getattr(importlib.import_module(self.module), self.name)

    def __call__(self, **arguments: Any) -> Tensor:
        return self._function(**{self.names.get(name, name): value for name, value in arguments.items()})


# Signatures of Liger-Kernel 0.8.5, cut-cross-entropy 25.1.1 and quack-kernels 0.6.5.
PEERS = (
    Peer("liger_kernel", "cross_entropy", "liger_kernel.transformers.functional", "liger_cross_entropy", overwrites=True),
    Peer(
        "liger_kernel",
        "linear_cross_entropy",
        "liger_kernel.transformers.functional",
        "liger_fused_linear_cross_entropy",
        names={"linear_weight": "weight"},
    ),
    Peer(
        "cut_cross_entropy",
        "linear_cross_entropy",
        "cut_cross_entropy",
        "linear_cross_entropy",
        names={"input": "e", "linear_weight": "c", "target": "targets"},
    ),
    Peer("quack", "cross_entropy", "quack.cross_entropy", "cross_entropy", names={"input": "x"}),
    Peer(
        "quack",
        "linear_cross_entropy",
        "quack.linear_cross_entropy",
        "chunked_linear_cross_entropy",
        names={"input": "x", "linear_weight": "weight"},
    ),
)


def installed(loss: str, device: torch.device) -> list[Peer]:
    """The peers of a loss that are installed. They are GPU libraries, so there are none on a CPU."""
    if device.type != "cuda":
        return []
    return [peer for peer in PEERS if peer.loss == loss and importlib.util.find_spec(peer.package) is not None]
