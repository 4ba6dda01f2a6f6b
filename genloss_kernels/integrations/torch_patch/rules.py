"""One rule for each of torch's losses, of its name and signature: why torch's own code takes the call, or None for ours.

Ours gets what is known to give torch's numbers and dtype. All else is torch's, shapes, dtypes and options that it refuses
too. Values that it refuses, as a class index out of range, ours refuses by errors of torch's types.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.reduction import autocasting
from .tensors import LABELS, SHAPES, learned, mixed, narrow_autocast, shapes_differ, unfit

ODD = "an option out of the ordinary"

_REDUCTIONS = ("none", "mean", "sum")
_LinearCrossEntropyOptions: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)


def _legacy(size_average: Any, reduce: Any) -> str | None:
    return None if size_average is None and reduce is None else "the deprecated size_average or reduce"


def _options(reduction: Any, *numbers: Any, reductions: tuple[str, ...] = _REDUCTIONS) -> str | None:
    """Options that ours may refuse or read differently."""
    if type(reduction) is not str or reduction not in reductions:
        return ODD
    for number in numbers:
        # By comparisons, which a compiler traces.
        if type(number) not in (int, float) or not -math.inf < number < math.inf:
            return ODD
    return None


def _labels(input: Tensor, target: Tensor) -> str | None:
    """Class indices (N, d1, ...) for (N, C, d1, ...), or () for (C), with at least one class."""
    if target.dtype not in LABELS:
        return "labels of another dtype than int64 and uint8"
    shape = tuple(input.shape)
    if not shape or not shape[min(1, len(shape) - 1)]:
        return "no classes"
    if target.dtype == torch.uint8 and len(shape) > 2:
        return "labels of uint8 in several dimensions"
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    return None if tuple(target.shape) == rows else SHAPES


def _class_weight(input: Tensor, weight: Tensor | None) -> str | None:
    if weight is None:
        return None
    fits = weight.dim() == 1 and input.dim() > 0 and weight.size(0) == input.size(min(1, input.dim() - 1))
    return learned(weight) if fits else SHAPES


def _element_weight(input: Tensor, weight: Tensor | None) -> str | None:
    """A weight that broadcasts to the input without enlarging it."""
    if weight is None:
        return None
    own, whole = weight.shape, input.shape
    fits = len(own) <= len(whole) and all(a in (1, b) for a, b in zip(reversed(own), reversed(whole), strict=False))
    return learned(weight) if fits else SHAPES


def cross_entropy(
    input: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: Any = -100, reduce: Any = None,
    reduction: Any = "mean", label_smoothing: Any = 0.0,
) -> str | None:  # fmt: skip
    reason = (
        unfit(input, target, optional=(weight,))
        or _legacy(size_average, reduce)
        or _options(reduction, ignore_index, label_smoothing)
    )
    if reason is not None:
        return reason
    if type(ignore_index) is not int or not 0.0 <= label_smoothing <= 1.0:
        return ODD
    probabilities = target.is_floating_point()
    if probabilities and (input.dim() == 0 or ignore_index >= 0):
        return ODD
    if probabilities and not input.size(min(1, input.dim() - 1)):
        return "no classes"
    return (
        mixed(input, target if probabilities else None, weight)
        or (shapes_differ(input, target) if probabilities else _labels(input, target))
        or _class_weight(input, weight)
    )


def nll_loss(
    input: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: Any = -100, reduce: Any = None,
    reduction: Any = "mean",
) -> str | None:  # fmt: skip
    reason = (
        unfit(input, target, optional=(weight,))
        or _legacy(size_average, reduce)
        or _options(reduction, ignore_index)
        or mixed(input, weight)
        or _labels(input, target)
        or _class_weight(input, weight)
    )
    return reason or (None if type(ignore_index) is int else ODD)


def linear_cross_entropy(
    input: Any, linear_weight: Any, target: Any, *, linear_bias: Any = None, weight: Any = None, reduction: Any = "mean",
    ignore_index: Any = None, label_smoothing: Any = 0.0, options: Any = None,
) -> str | None:  # fmt: skip
    reason = unfit(input, linear_weight, target, optional=(linear_bias, weight))
    if reason is not None:
        return reason
    if target.dtype == torch.uint8:
        return "labels of uint8"
    if linear_weight.dim() != 2 or not linear_weight.numel() or input.dim() not in (1, 2):
        return "a K-dimensional or empty layer, or an input of other dimensions"
    if input.size(-1) != linear_weight.size(1) or (linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]):
        return SHAPES
    probabilities = target.is_floating_point()
    if probabilities and ignore_index is not None:
        return ODD
    # The rest is as for the logits, which are known by their shape.
    logits = input[..., :1].expand(*input.shape[:-1], linear_weight.size(0))
    return (
        mixed(input, linear_weight, linear_bias)
        or _chunks(target, label_smoothing, options)
        or cross_entropy(
            logits,
            target,
            weight,
            ignore_index=-100 if ignore_index is None else ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    )


def _chunks(target: Tensor, label_smoothing: Any, options: Any) -> str | None:
    """torch's chunks take fewer options than ours, and warn where they are not used."""
    if options is None:
        return None
    known = type(options) is _LinearCrossEntropyOptions and options.acc_dtype is None and not autocasting(target.device)
    return None if known and not label_smoothing and target.dtype == torch.int64 else "options of torch's own chunks"


def binary_cross_entropy_with_logits(
    input: Any, target: Any, weight: Any = None, size_average: Any = None, reduce: Any = None, reduction: Any = "mean",
    pos_weight: Any = None,
) -> str | None:  # fmt: skip
    return (
        unfit(input, target, optional=(weight, pos_weight))
        or _legacy(size_average, reduce)
        or _options(reduction)
        or mixed(input, target, weight, pos_weight)
        or shapes_differ(input, target)
        or _element_weight(input, weight)
        or _element_weight(input, pos_weight)
    )


def binary_cross_entropy(
    input: Any, target: Any, weight: Any = None, size_average: Any = None, reduce: Any = None, reduction: Any = "mean"
) -> str | None:
    return (
        unfit(input, target, optional=(weight,))
        or _legacy(size_average, reduce)
        or _options(reduction)
        or mixed(input, target, weight)
        or shapes_differ(input, target)
        or _element_weight(input, weight)
    )


def kl_div(
    input: Any, target: Any, size_average: Any = None, reduce: Any = None, reduction: Any = "mean", log_target: Any = False
) -> str | None:
    return (
        unfit(input, target)
        or _legacy(size_average, reduce)
        or _options(reduction, reductions=(*_REDUCTIONS, "batchmean"))
        or mixed(input, target)
        or shapes_differ(input, target)
        or (None if type(log_target) is bool else ODD)
    )


def mse_loss(
    input: Any, target: Any, size_average: Any = None, reduce: Any = None, reduction: Any = "mean", weight: Any = None
) -> str | None:
    return _difference(input, target, size_average, reduce, reduction, weight)


def l1_loss(
    input: Any, target: Any, size_average: Any = None, reduce: Any = None, reduction: Any = "mean", weight: Any = None
) -> str | None:
    return _difference(input, target, size_average, reduce, reduction, weight)


def _difference(input: Any, target: Any, size_average: Any, reduce: Any, reduction: Any, weight: Any) -> str | None:
    return (
        unfit(input, target, optional=(weight,))
        or _legacy(size_average, reduce)
        or _options(reduction)
        or mixed(input, target, weight)
        or shapes_differ(input, target, weight)
        or (None if weight is None else learned(weight) or narrow_autocast(input, target, weight))
    )


def smooth_l1_loss(
    input: Any, target: Any, size_average: Any = None, reduce: Any = None, reduction: Any = "mean", beta: Any = 1.0
) -> str | None:
    return (
        unfit(input, target)
        or _legacy(size_average, reduce)
        or _options(reduction, beta)
        or mixed(input, target)
        or shapes_differ(input, target)
        or (None if beta >= 0.0 else ODD)
    )


def huber_loss(input: Any, target: Any, reduction: Any = "mean", delta: Any = 1.0, weight: Any = None) -> str | None:
    return (
        unfit(input, target, optional=(weight,))
        or _options(reduction, delta)
        or mixed(input, target, weight)
        or shapes_differ(input, target, weight)
        or learned(weight)
        or (None if delta > 0.0 else ODD)
    )


def gaussian_nll_loss(
    input: Any, target: Any, var: Any, full: Any = False, eps: Any = 1e-6, reduction: Any = "mean"
) -> str | None:
    number = type(var) is float
    variance: Tensor | None = None if number else var
    reason = (
        unfit(input, target, *(() if number else (var,)))
        or _options(reduction, eps, *((var,) if number else ()))
        or mixed(input, target, variance)
        or shapes_differ(input, target)
        or narrow_autocast(input, target, variance)
    )
    if reason is not None:
        return reason
    if type(full) is not bool or not eps > 0.0 or (number and var < 0.0):
        return ODD
    return None if variance is None else _variance(input, variance)


def _variance(input: Tensor, var: Tensor) -> str | None:
    """torch's shapes; and, as torch does, wait for a GPU to say whether an entry is negative."""
    if var.shape not in (input.shape, input.shape[:-1], (*input.shape[:-1], 1)):
        return SHAPES
    if torch.compiler.is_compiling() or var.device.type == "cpu":
        return None
    return "a negative variance" if bool((var < 0.0).any()) else None


def cosine_embedding_loss(
    input1: Any, input2: Any, target: Any, margin: Any = 0, size_average: Any = None, reduce: Any = None,
    reduction: Any = "mean",
) -> str | None:  # fmt: skip
    reason = (
        unfit(input1, input2, target)
        or _legacy(size_average, reduce)
        or _options(reduction, margin)
        or mixed(input1, input2)
        or shapes_differ(input1, input2)
    )
    if reason is not None:
        return reason
    if target.is_complex() or target.dtype == torch.bool:
        return "labels of another kind than numbers"
    return None if input1.dim() in (1, 2) and input1.shape[:-1] == target.shape else SHAPES
