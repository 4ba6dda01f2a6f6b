"""Which output layers can be part of the loss, and the linear map that each of them is."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LinearMap(NamedTuple):
    """``input @ weight.T + bias``."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None


def leaf(head: Any) -> Any:
    """The layer that does the product, where PEFT wraps it to train a copy (``modules_to_save``)."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(head, peft.utils.ModulesToSaveWrapper):
        return head
    if head.disable_adapters or not head.active_adapters:
        return head.original_module
    return head.modules_to_save[head.active_adapters[0]]


def obstacle(head: Any) -> str | None:
    """Why the loss cannot be computed inside ``head``, or None."""
    if _is_linear(head):
        return None
    if not _is_lora(head):
        return f"its output layer is {type(head).__module__}.{type(head).__qualname__}, not a linear layer or LoRA on one"
    if not _is_linear(head.base_layer):
        return f"LoRA on its output layer is on {type(head.base_layer).__qualname__}, not on a plain linear layer"
    variants = [name for name in _adapters(head) if name in head.lora_variant]
    return f"adapter {variants[0]!r} on its output layer is a variant of LoRA, such as DoRA" if variants else None


def linear_map(head: Any, input: Tensor) -> LinearMap:
    """What ``head`` computes from ``input``, to be called inside its forward, when its parameters are gathered."""
    if _is_linear(head):
        return _whole(LinearMap(input, head.weight, head.bias))
    base = head.base_layer
    inputs, weights, bias = [input], [base.weight], base.bias
    for name in _adapters(head):
        # Columns of its own beside the frozen weight's: dropout is on the adapter's input alone, so that the sum W + B A is
        # not what training computes.
        down, up, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
        dropped = head.lora_dropout[name](input.to(down.weight.dtype))
        inputs.append((down(dropped) * scaling).to(input.dtype))
        weights.append(up.weight.to(base.weight.dtype))
        if up.bias is not None:
            added = (up.bias * scaling).to(base.weight.dtype)
            bias = added if bias is None else bias + added
    _whole(LinearMap(input, base.weight, base.bias))
    return LinearMap(torch.cat(inputs, -1), torch.cat(weights, -1), bias)


def _adapters(head: Any) -> list[str]:
    if head.disable_adapters or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _is_linear(head: Any) -> bool:
    """Also of a subclass, as FSDP makes one, that computes what its base does."""
    return isinstance(head, torch.nn.Linear) and type(head).forward is torch.nn.Linear.forward


def _is_lora(head: Any) -> bool:
    peft = sys.modules.get("peft")
    return peft is not None and type(head).forward is peft.tuners.lora.Linear.forward


def _whole(parts: LinearMap) -> LinearMap:
    # A DTensor; an empty weight is refused by the loss itself.
    if hasattr(parts.weight, "full_tensor"):
        raise RuntimeError(
            "the output layer's weight is sharded where the loss needs it whole: shard the model after it is patched, and "
            "call the model, whose hooks gather the weight; a tensor-parallel head needs mode='logits'"
        )
    return parts
