"""What competes in a case: ours, torch's built-in, that built-in compiled, and peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases import Case
from ..core.torch_losses import TORCH_LOSSES
from . import peers

OURS, BUILTIN, COMPILED, CHUNKED = "genloss_kernels", "torch", "torch.compile", "torch chunked"


@dataclass(frozen=True)
class Candidate:
    """A loss under test; one that ``overwrites`` its input gets a copy for each call."""

    name: str
    function: Callable[..., Tensor]
    overwrites: bool = False


def builtin(case: Case) -> Callable[..., Tensor]:
    """What a user would write with torch: the case's own choice, or torch's function of the same name."""
    return case.builtin or TORCH_LOSSES.get(case.loss, case.oracle)


def torch_chunked(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """Torch's own linear cross entropy, since 2.13, with the options that make it work in chunks."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions")()  # noqa: B009 - torch 2.11 has neither
    return TORCH_LOSSES["linear_cross_entropy"](input, linear_weight, target, options=options)


def candidates(case: Case, device: torch.device, *, compiled: bool) -> list[Candidate]:
    found = [Candidate(OURS, case.function), Candidate(BUILTIN, builtin(case))]
    if compiled:
        # Each case compiles afresh: recompilations count against a limit, beyond which torch falls back to eager.
        torch.compiler.reset()
        found.append(Candidate(COMPILED, torch.compile(builtin(case), dynamic=False)))
    if case.loss == "linear_cross_entropy" and case.loss in TORCH_LOSSES:
        found.append(Candidate(CHUNKED, torch_chunked))
    return found + [Candidate(peer.package, peer, peer.overwrites) for peer in peers.installed(case.loss, device)]
