"""The public divergences and entropy of logits: check, choose the path, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import autograd, backend, checks
from ...core.reduction import loss_dtype
from . import reference
from .op import Divergence
from .reference import Kind, Options

# Below this many elements on a CPU plain operators with autograd cost less than our operator's bookkeeping.
PLAIN_BELOW = 2**13

_DIRECTIONS = {"forward": Kind.FORWARD_KL, "reverse": Kind.REVERSE_KL}

_REDUCTIONS = ("none", "mean", "batchmean", "sum")


def kl_div_with_logits(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    reduction: str = "batchmean",
) -> Tensor:
    r"""KL divergence between the distributions that student and teacher logits give, in nats, for distillation.

    With :math:`q = \operatorname{softmax}(x / T)` of the student and :math:`p = \operatorname{softmax}(y / T)` of the
    teacher, the loss of a row is

    .. math::
        \ell = T^2 \sum_c p_c \, (\log p_c - \log q_c) \quad \text{(forward)}, \qquad
        \ell = T^2 \sum_c q_c \, (\log q_c - \log p_c) \quad \text{(reverse)}

    Args:
        input: logits of the student, shape (V) or (N, ..., V), classes last, in any memory layout; fp32, fp16, bf16 or fp64.
        target: logits of the teacher, in the shape of the input. Differentiable too.
        temperature: T, positive. The factor T^2 keeps the size of the gradients.
        direction: ``"forward"``, KL(teacher || student), or ``"reverse"``, KL(student || teacher).
        reduction: ``"none"``: per row; ``"mean"``: over rows; ``"batchmean"``: their sum over ``input.size(0)``; ``"sum"``.

    Returns:
        0-d tensor for ``mean``, ``batchmean`` and ``sum``; for ``none`` the shape of the input without its last dimension.
        In the dtype to which the operands promote (fp32 under autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: unknown direction or reduction, or a temperature that is not positive and finite.
        RuntimeError: a 0-d input, shapes or devices that differ.
        NotImplementedError: an operand is not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64, relative to the rows' maxima. Equal logits give 0, and small divergences keep
        their digits: a row below 2**-10 (before the factor T^2) is looked at once more. What rounding the logits relative to
        the maxima does to their differences remains: of a divergence of logits 1e-8 apart in fp64, or 1e-4 in fp32 kernels,
        about 1e-7 and 1e-4. Terms with probability 0 are 0, at logits of -inf as well; where the second distribution has no
        mass and the first has, the divergence is inf. Logits more than 1e30 below the maximum of their row (over T) count
        as -inf there. A row that is -inf throughout, or holds NaN or inf, gives NaN. Empty: ``sum`` 0, means NaN. Each row
        is one program's work in the forward, however few there are.

    Differs from torch:
        ``torch.nn.functional.kl_div`` takes log-probabilities, has no temperature, and its ``mean`` is over elements.

    Source:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2 (temperature and T^2).

    Example:
        >>> import torch, genloss_kernels as gk
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> round(gk.kl_div_with_logits(student, teacher).item(), 4)
        0.3278
    """
    _check(input, target, reduction)
    checks.one_of("direction", direction, _DIRECTIONS)
    _check_temperature(temperature)
    return _divergence(input, target, Options(_DIRECTIONS[direction], float(temperature)), reduction)


def js_div_with_logits(
    input: Tensor,
    target: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
) -> Tensor:
    r"""Generalized Jensen-Shannon divergence between student and teacher logits, in nats.

    With :math:`q = \operatorname{softmax}(x / T)` of the student and :math:`p = \operatorname{softmax}(y / T)` of the
    teacher, the loss of a row is

    .. math::
        \ell = T^2 \, \big[ \beta \, \mathrm{KL}(p \,\|\, m) + (1 - \beta) \, \mathrm{KL}(q \,\|\, m) \big], \qquad
        m = \beta \, p + (1 - \beta) \, q

    Args:
        input: logits of the student, shape (V) or (N, ..., V), classes last, in any memory layout; fp32, fp16, bf16 or fp64.
        target: logits of the teacher, in the shape of the input. Differentiable too.
        beta: the teacher's weight, between 0 and 1 and neither of them. At 0.5 the divergence is symmetric.
        temperature: T, positive.
        reduction: ``"none"``: per row; ``"mean"``: over rows; ``"batchmean"``: their sum over ``input.size(0)``; ``"sum"``.

    Returns:
        0-d tensor for ``mean``, ``batchmean`` and ``sum``; for ``none`` the shape of the input without its last dimension.
        In the dtype to which the operands promote (fp32 under autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: unknown reduction, a beta outside (0, 1), or a temperature that is not positive and finite.
        RuntimeError: a 0-d input, shapes or devices that differ.
        NotImplementedError: an operand is not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64, in terms of the second order, so that equal logits give 0 and close ones keep
        their digits, as in :func:`kl_div_with_logits`. Finite whatever is -inf on one side or on both, as long as each row
        has a finite logit on either side; otherwise, and with NaN or inf, NaN. A row longer than the kernels can hold (8192
        classes, 2048 in fp64) is read twice in the forward. Empty: ``sum`` 0, means NaN.

    Differs from torch:
        torch has no such function.

    Source:
        Lin, "Divergence Measures Based on the Shannon Entropy", 1991, section 4; Agarwal et al., "On-Policy Distillation of
        Language Models", 2024, equation 1.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> round(gk.js_div_with_logits(student, teacher).item(), 4)
        0.0895
    """
    _check(input, target, reduction)
    checks.number("beta", beta)
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must be between 0 and 1 and neither of them, got {beta}: at its ends use kl_div_with_logits")
    _check_temperature(temperature)
    return _divergence(input, target, Options(Kind.JS, float(temperature), float(beta)), reduction)


def categorical_entropy(logits: Tensor, *, reduction: str = "none") -> Tensor:
    r"""Entropy of the distributions that logits give, in nats.

    .. math::
        H = -\sum_c p_c \log p_c, \qquad p = \operatorname{softmax}(x)

    Args:
        logits: shape (V) or (N, ..., V), classes last, in any memory layout; fp32, fp16, bf16 or fp64.
        reduction: ``"none"``: per row; ``"mean"``: over rows; ``"batchmean"``: their sum over ``logits.size(0)``; ``"sum"``.

    Returns:
        For ``none`` the shape of the logits without their last dimension, a 0-d tensor otherwise. In the logits' dtype (fp32
        under autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: unknown reduction.
        RuntimeError: 0-d logits.
        NotImplementedError: the logits are not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64, relative to the rows' maxima. Classes at -inf add 0; a row that is -inf
        throughout, or holds NaN or inf, gives NaN. Empty: ``sum`` 0, means NaN.

    Differs from torch:
        ``torch.distributions.Categorical.entropy`` has no reduction, and refuses -inf; the values agree.

    Source:
        Shannon, "A Mathematical Theory of Communication", 1948, section 6.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.categorical_entropy(torch.zeros(2, 4))
        tensor([1.3863, 1.3863])
    """
    _check_logits("logits", logits, reduction)
    return _divergence(logits, None, Options(Kind.ENTROPY), reduction)


def _divergence(input: Tensor, target: Tensor | None, options: Options, reduction: str) -> Tensor:
    triton = backend.use_triton(input, target)
    dtype = loss_dtype(input.dtype if target is None else torch.promote_types(input.dtype, target.dtype), input.device)
    shape, divisor = input.shape[:-1], 1
    if reduction == "mean":
        for size in shape:
            divisor = divisor * size
    elif reduction == "batchmean":
        divisor = input.size(0)
    options = options._replace(kind=int(options.kind), divisor=None if reduction == "none" else divisor)
    small = not triton and _plain_is_best(input)
    if small and input.numel() and backend.plain(input, target):
        rows = reference.plain(input, target, options)
        if rows is not None:
            return reference.reduce(rows, options).to(dtype)
    if small or (not triton and backend.composite(input, target)):
        return reference.divergence(input, target, options).to(dtype)
    single = input.dim() == 1
    if single:
        input, target = input.unsqueeze(0), None if target is None else target.unsqueeze(0)
    needed = sum(t is not None and t.requires_grad and 1 << bit for bit, t in enumerate((input, target)))
    if not torch.is_grad_enabled():
        needed = 0
    loss = autograd.apply(Divergence, input, target, *options, needed, dtype, triton)[0]
    return loss.squeeze(0) if single and reduction == "none" else loss


def _plain_is_best(input: Tensor) -> bool:
    return not torch.compiler.is_compiling() and input.device.type == "cpu" and input.numel() < PLAIN_BELOW


def _check(input: Any, target: Any, reduction: Any) -> None:
    _check_logits("input", input, reduction)
    checks.floating("target", target)
    checks.same_device("target", target, input)
    if target.shape != input.shape:
        raise RuntimeError(
            f"target must have the shape {list(input.shape)} of the input, got {list(target.shape)}: expand it first"
        )


def _check_logits(name: str, logits: Any, reduction: Any) -> None:
    checks.floating(name, logits)
    checks.one_of("reduction", reduction, _REDUCTIONS)
    if logits.dim() == 0:
        raise RuntimeError(f"{name} must have shape (V) or (N, ..., V) with the classes last, got a 0-d tensor")


def _check_temperature(temperature: Any) -> None:
    checks.number("temperature", temperature)
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
