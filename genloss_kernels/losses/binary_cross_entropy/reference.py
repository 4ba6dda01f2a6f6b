"""Binary cross entropy in plain PyTorch: reference, and the eager path's formulas on blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.formulas import Formulas, Scalars, register_formulas
from ...core.reduction import Reduction
from ...core.scratch import Scratch

# What torch.nn.functional.binary_cross_entropy calls.
torch_loss_of_logits = torch.binary_cross_entropy_with_logits
torch_loss_of_probabilities = torch._C._nn.binary_cross_entropy  # pyright: ignore[reportAttributeAccessIssue]

NAME, PROBABILITIES = "binary_cross_entropy_with_logits", "binary_cross_entropy"

# Bit of the flags on logits: no weights and no smoothing, so that sum and gradient come from one sigmoid.
PLAIN = 1

# Bit of the flags on probabilities: nobody has looked whether they are. kernels.py reads the same.
UNCHECKED = 1

# 1e-12 in fp32, which torch takes in fp64 too.
_LEAST_VARIANCE = 9.999999960041972e-13


def _coefficients(
    t: Tensor, weight: Tensor | None, pos_weight: Tensor | None, smoothing: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Coefficients of softplus(x) and softplus(-x)."""
    t = t.to(dtype)
    if smoothing:
        t = t * (1.0 - smoothing) + 0.5 * smoothing
    a, b = 1.0 - t, t
    if pos_weight is not None:
        b = b * pos_weight.to(dtype)
    if weight is not None:
        a, b = a * weight.to(dtype), b * weight.to(dtype)
    return a, b


def _dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def reference(
    x: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None, scalars: Scalars, flags: int
) -> Tensor:
    dtype = _dtype(x, t, weight, pos_weight)
    a, b = _coefficients(t, weight, pos_weight, scalars[0], dtype)
    x = x.to(dtype)
    above, below = a * -F.logsigmoid(-x), b * -F.logsigmoid(x)
    # A term with coefficient 0 is 0 at an infinite logit; elsewhere its gradient must flow, so only that product is cut.
    return torch.where((a == 0) & (x == math.inf), 0.0, above) + torch.where((b == 0) & (x == -math.inf), 0.0, below)


# As torch.nn.functional.logsigmoid, with the buffer in which that keeps exp(-abs(x)).
_log_sigmoid = torch.ops.aten.log_sigmoid_forward.output


def value(
    x: Tensor,
    t: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    scalars: Scalars,
    flags: int,
    scratch: Scratch,
) -> Tensor:
    if x.device.type != "cpu":
        return reference(x, t, weight, pos_weight, scalars, flags)
    result = _fast_value(x, t, weight, pos_weight, scalars, scratch)
    return result if math.isfinite(result.sum()) else reference(x, t, weight, pos_weight, scalars, flags)


def total(
    x: Tensor,
    t: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    scalars: Scalars,
    flags: int,
    scratch: Scratch,
    saved: Sequence[Tensor] = (),
) -> Tensor | float:
    if x.device.type == "cpu":
        if saved:
            result = _total_and_gradient(x, t, scratch, saved[0])
            if result > _PRODUCT_ABOVE * x.numel():
                return result
        result = float(_fast_value(x, t, weight, pos_weight, scalars, scratch).sum())
        if math.isfinite(result):
            return result
    return reference(x, t, weight, pos_weight, scalars, flags).sum()


# How many factors between a half and one multiply to what fp32 holds with its digits, and from which mean loss on their
# rounding, 3e-8 a factor and of either sign, does not show.
_FACTORS, _PRODUCT_ABOVE = 64, 0.05


def _total_and_gradient(x: Tensor, t: Tensor, scratch: Scratch, gradient: Tensor) -> float:
    """Sum of the loss, NaN where that is not to be had so, and sigmoid(x) - t.

    log(1 + exp(-abs(x))) = -log(max(p, 1 - p)) with p = sigmoid(x): one exponential for loss and gradient, and one logarithm
    for as many elements as can be multiplied first.
    """
    x, t = scratch.cast("x", x, torch.float32), scratch.cast("t", t, torch.float32)
    torch.sigmoid(x, out=gradient)
    part = scratch.take("part", x.shape, x.dtype, x.device)
    linear = torch.clamp(x, min=0.0, out=part).addcmul_(x, t, value=-1.0).sum().item()
    factors = torch.sub(gradient, 0.5, out=part).abs_().add_(0.5).view(-1)
    gradient.sub_(t)
    groups = factors.numel() // _FACTORS
    products, rest = factors[: groups * _FACTORS], factors[groups * _FACTORS :]
    logarithm = products.view(_FACTORS, groups).prod(0).log_().sum().item() + rest.log().sum().item()
    return linear - logarithm if math.isfinite(linear) else math.nan


def _fast_value(
    x: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None, scalars: Scalars, scratch: Scratch
) -> Tensor:
    """The loss where it is finite, in a buffer: NaN where an infinite logit meets a coefficient of 0."""
    dtype = _dtype(x, t, weight, pos_weight)
    x = scratch.cast("x", x, dtype)
    result, part, minus_log = (scratch.take(name, x.shape, dtype, x.device) for name in ("result", "part", "log"))
    # softplus(x) = max(x, 0) + l and softplus(-x) = max(-x, 0) + l, with l = log(1 + exp(-abs(x))) = -logsigmoid(abs(x)).
    _log_sigmoid(torch.abs(x, out=part), output=minus_log, buffer=result)
    torch.clamp(x, min=0.0, out=part)
    if not scalars[0] and pos_weight is None:
        part.addcmul_(x, scratch.cast("t", t, dtype), value=-1.0).sub_(minus_log)
        return part if weight is None else part.mul_(weight)
    a, b = _coefficients(t, weight, pos_weight, scalars[0], dtype)
    torch.mul(a, part, out=result).addcmul_(b, torch.clamp(x, max=0.0, out=part), value=-1.0)
    return result.addcmul_(torch.add(a, b, out=part), minus_log, value=-1.0)


def gradient(
    x: Tensor,
    t: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    scalars: Scalars,
    flags: int,
    scratch: Scratch,
    grad: Tensor | float,
    outputs: Sequence[Tensor | None],
    saved: Sequence[Tensor] = (),
) -> None:
    dtype = _dtype(x, t, weight, pos_weight)
    dx, dt, _, _ = outputs
    if dx is not None and saved:
        torch.mul(saved[0], grad, out=dx)
        dx = None
    if dx is None and dt is None:
        return
    x = scratch.cast("x", x, dtype)
    if dx is not None:
        # a * sigmoid(x) - b * sigmoid(-x), with half the exponentials.
        torch.sigmoid(x, out=dx)
        if not scalars[0] and pos_weight is None:
            dx.sub_(t).mul_(grad)
            if weight is not None:
                dx.mul_(weight)
        else:
            a, b = _coefficients(t, weight, pos_weight, scalars[0], dtype)
            dx.mul_(a.add_(b)).sub_(b).mul_(grad)
    if dt is not None:
        # pos_weight * softplus(-x) - softplus(x) less the logarithm that both have in common: its rounding would stay.
        if pos_weight is None:
            torch.neg(x, out=dt)
        else:
            positive = pos_weight.to(dtype)
            torch.clamp(-x, min=0.0, out=dt).mul_(positive).sub_(x.clamp(min=0.0))
            dt.addcmul_(positive - 1.0, F.logsigmoid(x.abs()), value=-1.0)
        dt.mul_(1.0 - scalars[0]).mul_(grad)
        if weight is not None:
            dt.mul_(weight.to(dtype))


def _kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.binary_cross_entropy_value, kernels.binary_cross_entropy_gradient


def _saves(flags: int) -> int:
    return 1 if flags & PLAIN else 0


register_formulas(NAME, Formulas(_kernels, reference, value, total, gradient, _saves))


def _outside(p: Tensor, t: Tensor) -> Tensor:
    return ~((p >= 0.0) & (p <= 1.0) & (t >= 0.0) & (t <= 1.0))


def probability_reference(p: Tensor, t: Tensor, weight: Tensor | None, _: None, scalars: Scalars, flags: int) -> Tensor:
    """torch's own, whose derivatives of any order follow the first as torch bounds it near 0 and 1."""
    dtype = _dtype(p, t, weight)
    weight = None if weight is None else weight.to(dtype).expand_as(p)
    p, t = p.to(dtype), t.to(dtype)
    if not flags & UNCHECKED:
        return torch_loss_of_probabilities(p, t, weight, int(Reduction.NONE))
    # On a GPU the built-in ends the context where a probability is none: it sees a half instead, and the result is NaN.
    outside = _outside(p, t)
    p, t, marks = torch.where(outside, 0.5, p), torch.where(outside, 0.5, t), torch.where(outside, p + t, 0.0)
    marks = marks * torch.where(outside, math.nan, 0.0)
    return torch_loss_of_probabilities(p, t, weight, int(Reduction.NONE)) + marks


def _mark(result: Tensor, p: Tensor, t: Tensor, flags: int) -> Tensor:
    return result.masked_fill_(_outside(p, t), math.nan) if flags & UNCHECKED else result


def _probability_value(
    p: Tensor, t: Tensor, weight: Tensor | None, _: None, scalars: Scalars, flags: int, scratch: Scratch
) -> Tensor:
    """As the built-in, whose logarithms are computed one by one, in a fifth of its time."""
    dtype = _dtype(p, t, weight)
    p, t = scratch.cast("p", p, dtype), scratch.cast("t", t, dtype)
    result, log = (scratch.take(name, p.shape, dtype, p.device) for name in ("result", "log"))
    torch.log1p(torch.neg(p, out=log), out=log).clamp_(min=-100.0)
    torch.sub(t, 1.0, out=result).mul_(log)
    result.addcmul_(torch.log(p, out=log).clamp_(min=-100.0), t, value=-1.0)
    return _mark(result if weight is None else result.mul_(weight), p, t, flags)


def _probability_total(
    p: Tensor, t: Tensor, weight: Tensor | None, _: None, scalars: Scalars, flags: int, scratch: Scratch,
    saved: Sequence[Tensor] = (),
) -> Tensor:  # fmt: skip
    return _probability_value(p, t, weight, None, scalars, flags, scratch).sum()


def _probability_gradient(
    p: Tensor, t: Tensor, weight: Tensor | None, _: Tensor | None, scalars: Scalars, flags: int, scratch: Scratch,
    grad: Tensor | float, outputs: Sequence[Tensor | None], saved: Sequence[Tensor] = (),
) -> None:  # fmt: skip
    dtype = _dtype(p, t, weight)
    p, t = scratch.cast("p", p, dtype), scratch.cast("t", t, dtype)
    dp, dt, _, _ = outputs
    part = scratch.take("log", p.shape, dtype, p.device)
    if dp is not None:
        variance = torch.neg(p, out=part).add_(1.0).mul_(p).clamp_(min=_LEAST_VARIANCE)
        torch.sub(p, t, out=dp).div_(variance)
    if dt is not None:
        torch.neg(p, out=dt).log1p_().sub_(torch.log(p, out=part))
    for output in (dp, dt):
        if output is not None:
            output.mul_(grad)
            _mark(output if weight is None else output.mul_(weight), p, t, flags)


def _probability_kernels() -> tuple[object, object]:
    from . import kernels

    return kernels.probability_value, kernels.probability_gradient


register_formulas(
    PROBABILITIES,
    Formulas(_probability_kernels, probability_reference, _probability_value, _probability_total, _probability_gradient),
)
