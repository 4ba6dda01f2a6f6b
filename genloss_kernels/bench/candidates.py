"""What competes in a case: ours in each of its modes, torch's built-in, that built-in compiled, and peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..cases import Case
from ..cases.case import loss_of
from ..core import backend
from ..core.torch_losses import TORCH_LOSSES
from . import peers

OURS, BUILTIN, COMPILED, CHUNKED = "genloss_kernels", "torch", "torch.compile", "torch chunked"
IN_PLACE, IN_FORWARD, HALF_SUMS = f"{OURS} in place", f"{OURS} in forward", f"{OURS} half sums"


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


def _in_place(input: Tensor, **arguments: Any) -> Tensor:
    # A view of the leaf: what a model hands over is the result of an operation.
    return loss_of(functional.cross_entropy, input=input.view_as(input), inplace_backward=True, **arguments)


def _in_forward(**arguments: Any) -> Tensor:
    with backend.gradient_in_forward():
        return loss_of(functional.cross_entropy, **arguments)


def _half_sums(input: Tensor, **arguments: Any) -> Tensor:
    options = functional.LinearCrossEntropyOptions(acc_dtype=input.dtype)
    return loss_of(functional.linear_cross_entropy, input=input, options=options, **arguments)


def _modes(case: Case, device: torch.device, dtype: torch.dtype) -> list[Candidate]:
    """Ours with the options that trade something for speed or memory, where they make a difference."""
    if case.loss == "cross_entropy" and device.type != "cpu":
        return [Candidate(IN_PLACE, _in_place, overwrites=True), Candidate(IN_FORWARD, _in_forward)]
    if case.loss == "linear_cross_entropy" and dtype.itemsize == 2:
        return [Candidate(HALF_SUMS, _half_sums)]
    return []


def candidates(case: Case, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> list[Candidate]:
    found = [Candidate(OURS, case.function), Candidate(BUILTIN, builtin(case)), *_modes(case, device, dtype)]
    if compiled:
        # Each case compiles afresh: recompilations count against a limit, beyond which torch falls back to eager.
        torch.compiler.reset()
        found.append(Candidate(COMPILED, torch.compile(builtin(case), dynamic=False)))
    if case.loss == "linear_cross_entropy" and case.loss in TORCH_LOSSES:
        found.append(Candidate(CHUNKED, torch_chunked))
    return found + [Candidate(peer.package, peer, peer.overwrites) for peer in peers.installed(case.loss, device)]
