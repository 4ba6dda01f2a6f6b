"""A row of the case table, and the least that its call must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..core.torch_losses import TORCH_LOSSES

# Themselves, under gk.patch_torch() too.
torchs = SimpleNamespace(**TORCH_LOSSES)

# What a case is for.
DOCTOR, BYTES, BENCH = "doctor", "bytes", "bench"


@dataclass(frozen=True)
class Call:
    """Arguments of one call.

    ``differentiable`` names the tensors that get a gradient, ``gathered`` those of which only an element a row is read.
    """

    arguments: dict[str, Any]
    differentiable: tuple[str, ...]
    gathered: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def fresh(self, dtype: torch.dtype | None = None) -> Call:
        """The same arguments as leaves of a new graph, floating point ones in ``dtype`` if that is given."""
        arguments = dict(self.arguments)
        for name, tensor in self.tensors().items():
            leaf = tensor.detach()
            if dtype is not None and leaf.is_floating_point():
                leaf = leaf.to(dtype)
            arguments[name] = leaf.requires_grad_(name in self.differentiable)
        return Call(arguments, self.differentiable, self.gathered)

    def gradients(self) -> dict[str, Tensor]:
        found = {name: self.arguments[name].grad for name in self.differentiable}
        return {name: grad for name, grad in found.items() if grad is not None}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    ``make`` draws the call for a device and dtype; ``oracle`` computes the loss by plain torch operators from the same
    arguments, in whatever dtype these have; ``builtin`` is what a user would write with torch, and None where that is the
    oracle too. ``products`` says that results are sums of products of tensors that are stored in the call's dtype, and
    ``cancels`` that they are differences which may nearly cancel: an error is then that of its terms.
    """

    loss: str
    name: str
    make: Callable[[torch.Generator, torch.device, torch.dtype], Call]
    oracle: Callable[..., Tensor]
    builtin: Callable[..., Tensor] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    uses: frozenset[str] = field(default_factory=frozenset)
    autocast: bool = False
    products: bool = False
    cancels: bool = False

    @property
    def function(self) -> Callable[..., Tensor]:
        """The public function; of one with several results the loss alone."""
        return partial(loss_of, getattr(functional, self.loss))

    def call(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
        device = torch.device(device)
        return self.make(torch.Generator(device).manual_seed(seed), device, dtype).fresh()


def loss_of(function: Callable[..., Any], **arguments: Any) -> Tensor:
    result = function(**arguments)
    return result if isinstance(result, Tensor) else result.loss


def floor_bytes(call: Call, loss: Tensor) -> int:
    """Bytes that must move: operands read in forward and backward, gradients and the loss written once."""
    size = {name: _unique_bytes(tensor) for name, tensor in call.tensors().items() if name not in call.gathered}
    for name in call.gathered:
        # Forward only: the gradient of a gather does not need what was gathered.
        size[name] = call.arguments["target"].numel() * call.arguments[name].element_size() // 2
    gradients = sum(call.arguments[name].numel() * call.arguments[name].element_size() for name in call.differentiable)
    return 2 * sum(size.values()) + gradients + loss.numel() * loss.element_size()


def floor_flops(call: Call) -> int:
    """Operations of the matrix products that must be made: a linear layer's logits and the gradients of its operands."""
    if "linear_weight" not in call.arguments:
        return 0
    return 6 * call.arguments["input"].numel() * call.arguments["linear_weight"].size(0)


def _unique_bytes(tensor: Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def table(**oracles: Callable[..., Tensor]) -> Callable[..., Case]:
    """Makes cases of the losses that have these oracles, from loss, name, ``make`` and uses."""

    def case(loss: str, name: str, make: Any, *uses: str, **rest: Any) -> Case:
        return Case(loss, name, make, oracles[loss], uses=frozenset(uses), **rest)

    return case
