"""The public binary cross entropy: check, choose the path, reduce."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core import backend, checks, elementwise_op
from ...core.reduction import Reduction, autocasting, loss_dtype, parse_reduction
from ...core.widening import few, narrow, wide
from .reference import NAME, PLAIN, PROBABILITIES, UNCHECKED, torch_loss_of_logits, torch_loss_of_probabilities

# What torch.nn.functional's calls, without its Python.

# Below this many elements on a CPU the built-in's few calls cost less than ours over blocks, which save memory traffic.
BUILTIN_BELOW = 2**18

# The same on probabilities, where the built-in computes logarithms one by one.
PROBABILITIES_BUILTIN_BELOW = 2**15

_REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Binary cross entropy between logits and probabilities.

    .. math::
        \ell = w \big[ p \, t' \operatorname{softplus}(-x) + (1 - t') \operatorname{softplus}(x) \big], \qquad
        t' = (1 - \epsilon) \, t + \epsilon / 2

    with w ``weight``, p ``pos_weight`` and epsilon the label smoothing.

    Args:
        input: logits of any shape; fp32, fp16, bf16 or fp64.
        target: probabilities in the shape of the input, floating point; not checked to lie in [0, 1].
        weight: factor of each element's loss, broadcastable to the input. Takes no gradient.
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        pos_weight: factor of the positive term, broadcastable to the input, usually (C). Takes no gradient.
        label_smoothing: how far targets move towards 1/2, in [0, 1].
        mask: bool, broadcastable to the input. Where False, loss and gradient are 0 whatever the element holds, and
            ``mean`` divides by the number of True elements.

    Returns:
        0-d tensor for ``mean`` and ``sum``, the input's shape for ``none``; in the dtype to which input and target promote
        (fp32 under autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: target and input differ in shape, or the reduction is unknown.
        RuntimeError: a weight or mask that does not broadcast, a weight that requires a gradient, dtypes or devices that do
            not fit, ``label_smoothing`` outside [0, 1].
        NotImplementedError: the input is not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64, to the last digits at large logits; on the CPU the gradient is, as torch's, exact
        only in absolute terms there. A term with coefficient 0 is 0 at an infinite
        logit. ``mean`` over no element is NaN and ``sum`` 0. The same input gives the same bits.

    Differs from torch:
        An infinite logit gives 0 or inf, where torch gives NaN. Label smoothing and mask are added.

    Source:
        Bishop, "Pattern Recognition and Machine Learning", 2006, equation 4.90; Szegedy et al., "Rethinking the Inception
        Architecture", 2016, section 7.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> loss = gk.binary_cross_entropy_with_logits(torch.tensor([0.0, 20.0]), torch.tensor([1.0, 0.0]))
        >>> round(loss.item(), 4)
        10.3466
    """
    reduction = parse_reduction(reduction, size_average, reduce)
    _check(input, target, weight, pos_weight, mask, reduction, label_smoothing)
    # Torch takes weights of integers.
    weight, pos_weight = (w if w is None or w.is_floating_point() else w.to(input.dtype) for w in (weight, pos_weight))
    tensors = (input, target, weight, pos_weight)
    dtype = input.dtype
    for tensor in (target, weight, pos_weight):
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    triton = backend.use_triton(input, target, weight, pos_weight)
    if not triton and mask is None and not label_smoothing and _builtin_is_best(input, target, BUILTIN_BELOW):
        loss = torch_loss_of_logits(wide(input), wide(target), wide(weight), wide(pos_weight), int(_REDUCTIONS[reduction]))
        # An infinite logit may have made NaN of a term that counts for nothing.
        if math.isfinite(loss.detach() if loss.dim() == 0 else loss.detach().sum()):
            return narrow(loss, dtype)
    return elementwise_op.apply(
        NAME,
        tensors,
        mask,
        (float(label_smoothing), 0.0, 0.0),
        PLAIN if not triton and weight is None and pos_weight is None and not label_smoothing else 0,
        _REDUCTIONS[reduction],
        loss_dtype(dtype, input.device),
        triton=triton,
        by_reference=not triton and backend.composite(*tensors, mask),
    )


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Binary cross entropy between two probabilities, in nats.

    .. math::
        \ell = -w \big[ t \log x + (1 - t) \log(1 - x) \big], \qquad \text{logarithms at least } -100

    :func:`binary_cross_entropy_with_logits` takes what the sigmoid takes, and keeps the digits that are lost here.

    Args:
        input: probabilities of any shape; fp32, fp16, bf16 or fp64.
        target: probabilities in the shape and dtype of the input.
        weight: factor of each element's loss, broadcastable to the input. Takes no gradient.
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        0-d tensor for ``mean`` and ``sum``, the input's shape for ``none``; in the input's dtype (fp32 under autocast).

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: target and input differ in shape, or the reduction is unknown.
        RuntimeError: probabilities outside [0, 1] or NaN, on the CPU, or on a GPU under ``GENLOSS_DEBUG=1``; without that a
            GPU gives such an element a loss and gradients of NaN. A weight that does not broadcast or requires a gradient;
            dtypes (but under autocast) or devices that differ; a GPU's autocast, as in torch.
        NotImplementedError: the input is not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64. The gradient is ``(x - t) / max(x (1 - x), 1e-12)``, as torch's: a wrong certainty
        has a large, finite one, also where the loss is clamped. The target's is that of the unclamped loss. ``mean`` over no
        element is NaN and ``sum`` 0.

    Differs from torch:
        On a GPU a probability outside [0, 1] does not end the context.

    Source:
        Bishop, "Pattern Recognition and Machine Learning", 2006, equation 4.90.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> loss = gk.binary_cross_entropy(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.0]))
        >>> round(loss.item(), 4)
        50.3466
    """
    reduction = parse_reduction(reduction, size_average, reduce)
    _check_probabilities(input, target, weight, reduction)
    weight = weight if weight is None or weight.is_floating_point() else weight.to(input.dtype)
    tensors = (input, target, weight, None)
    triton = backend.use_triton(input, target, weight)
    if not triton and _builtin_is_best(input, target, PROBABILITIES_BUILTIN_BELOW):
        try:
            expanded = None if weight is None else wide(weight).expand_as(input)
            loss = torch_loss_of_probabilities(wide(input), wide(target), expanded, int(_REDUCTIONS[reduction]))
            return narrow(loss, input.dtype)
        except RuntimeError:
            # torch's message says that values are bad; ours, which.
            checks.probabilities("input", input)
            checks.probabilities("target", target)
            raise
    checks.probabilities("input", input)
    checks.probabilities("target", target)
    return elementwise_op.apply(
        PROBABILITIES,
        tensors,
        None,
        (0.0, 0.0, 0.0),
        0 if backend.reads_values(input) and backend.reads_values(target) else UNCHECKED,
        _REDUCTIONS[reduction],
        loss_dtype(input.dtype, input.device),
        triton=triton,
        by_reference=not triton and backend.composite(*tensors),
    )


def _builtin_is_best(input: Tensor, target: Tensor, limit: int) -> bool:
    return few(input, limit) and input.dtype == target.dtype and backend.plain(input, target)


def _check(input: Any, target: Any, weight: Any, pos_weight: Any, mask: Any, reduction: str, label_smoothing: Any) -> None:
    _check_pair(input, target, reduction)
    checks.label_smoothing(label_smoothing)
    if not target.is_floating_point():
        raise RuntimeError(f"target must be floating point probabilities, got {target.dtype}: convert it with .to(input)")
    checks.same_device("target", target, input)
    _check_weight("weight", weight, input)
    _check_weight("pos_weight", pos_weight, input)
    if mask is not None:
        checks.tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, True where an element counts, got {mask.dtype}")
        checks.same_device("mask", mask, input)
        checks.broadcastable("mask", mask, input.shape)


def _check_probabilities(input: Any, target: Any, weight: Any, reduction: str) -> None:
    _check_pair(input, target, reduction)
    autocast = autocasting(input.device)
    if autocast and input.device.type != "cpu":
        raise RuntimeError(
            "binary_cross_entropy is unsafe to autocast: use binary_cross_entropy_with_logits, which is not, or leave "
            "autocast for it with torch.autocast(..., enabled=False)"
        )
    if not target.is_floating_point() or (target.dtype != input.dtype and not autocast):
        raise RuntimeError(
            f"target must have the dtype of the input, {input.dtype}, got {target.dtype}: convert it with .to(input)"
        )
    checks.same_device("target", target, input)
    _check_weight("weight", weight, input)


def _check_pair(input: Any, target: Any, reduction: Any) -> None:
    checks.floating("input", input)
    checks.tensor("target", target)
    checks.one_of("reduction", reduction, _REDUCTIONS)
    if target.shape != input.shape:
        raise ValueError(f"Target size ({target.shape}) must be the same as input size ({input.shape})")


def _check_weight(name: str, weight: Any, input: Tensor) -> None:
    if weight is None:
        return
    checks.tensor(name, weight)
    if weight.is_complex():
        checks.floating(name, weight)
    checks.same_device(name, weight, input)
    checks.broadcastable(name, weight, input.shape)
    checks.no_gradient(name, weight)
