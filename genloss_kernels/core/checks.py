"""Validation before launch: what torch raises, with the argument named, what it got and what it accepts."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .backend import reads_values
from .layout import broadcast_shape


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, not {type(value).__name__}")


def is_dtensor(value: Any) -> bool:
    """Whether this is a DTensor, asked without importing them."""
    return type(value) not in (Tensor, torch.nn.Parameter) and any(c.__name__ == "DTensor" for c in type(value).__mro__)


def floating(name: str, value: Tensor) -> None:
    tensor(name, value)
    if not value.is_floating_point() or value.dtype.itemsize == 1:
        raise NotImplementedError(
            f"{name} must be a real floating point tensor of at least 16 bits, got {value.dtype}: convert it with .float()"
        )


def one_of(name: str, value: Any, accepted: Collection[str]) -> None:
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{value} is not a valid value for {name}: it must be one of {', '.join(accepted)}")


def number(name: str, value: Any) -> None:
    known = isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
    # NumPy's scalars are registered; asked for last, since compilers trace the others.
    if isinstance(value, bool) or not (known or isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")


def finite(name: str, value: Any) -> None:
    number(name, value)
    # By comparisons, which a compiler traces.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be int, not {type(value).__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be bool, not {type(value).__name__}")


def label_smoothing(value: Any) -> None:
    number("label_smoothing", value)
    if not 0.0 <= value <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {value}")


def same_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise RuntimeError(f"{name} must be on the input's device, {like.device}, but is on {value.device}")


def no_gradient(name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"the loss is not differentiable with respect to {name}, which has requires_grad=True: pass {name}.detach()"
        )


def broadcastable(name: str, value: Tensor, shape: torch.Size) -> None:
    """``value`` must broadcast to ``shape`` without enlarging it."""
    fits = value.dim() <= len(shape) and all(
        size in (1, whole) for size, whole in zip(reversed(value.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise RuntimeError(f"{name} of shape {list(value.shape)} does not broadcast to the shape {list(shape)} of the input")


def together(input: Tensor, target: Tensor) -> torch.Size:
    """The shape to which both broadcast."""
    if input.shape == target.shape:
        return input.shape
    try:
        return broadcast_shape((input, target))
    except RuntimeError:
        raise RuntimeError(
            f"input and target must broadcast together, got input {list(input.shape)}, target {list(target.shape)}"
        ) from None


def not_negative(name: str, value: Tensor) -> None:
    """ValueError for a negative element, where values may be read."""
    if value.numel() == 0 or not reads_values(value):
        return
    lowest = value.detach().amin()
    # NaN, which is no error, hides the others.
    if lowest < 0.0 or (lowest.isnan() and (value < 0.0).any()):
        raise ValueError(f"{name} has a negative entry: it must not be negative")


def probabilities(name: str, value: Tensor, fix: str = "") -> None:
    """RuntimeError for an element outside [0, 1], NaN included, where values may be read; ``fix`` ends its message."""
    if value.numel() == 0 or not reads_values(value):
        return
    low, high = (bound.item() for bound in value.detach().aminmax())
    if not (low >= 0.0 and high <= 1.0):
        raise RuntimeError(f"all elements of {name} should be between 0 and 1, got a range of {low:.9g} to {high:.9g}{fix}")


def class_indices(target: Tensor, n_classes: int, ignore_index: int) -> None:
    """IndexError for a class index out of range, where values may be read."""
    if target.numel() == 0 or not reads_values(target):
        return
    low, high = target.aminmax()
    if int(low) >= 0 and int(high) < n_classes:
        return
    counted = target[target != ignore_index].long()
    bad = counted[(counted < 0) | (counted >= n_classes)]
    if bad.numel():
        raise IndexError(
            f"Target {int(bad[0])} is out of bounds: target must hold class indices from 0 to {n_classes - 1}, or "
            f"ignore_index ({ignore_index})"
        )
