"""The public adversarial losses and penalties: check, choose the path, reduce."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core import autograd, backend, checks, elementwise_op, pair_op
from ...core.pair import Sum, Term
from ...core.reduction import Reduction, loss_dtype
from .eager import NAME
from .op import Penalty, composed, reduce
from .reference import (
    BOTH,
    FAKE,
    GAMES,
    HINGE,
    LINEAR,
    LOGISTIC,
    RELATIVISTIC,
    SATURATING,
    SQUARES,
    of_norms,
    roots,
)

# Below this many scores on a CPU plain operators with autograd cost less than our operators' bookkeeping.
PLAIN_BELOW = 2**19

# Below this many elements on a CPU norms with autograd cost less than the penalties' own function.
NORMS_BELOW = 2**15

_DISCRIMINATOR = {
    "minimax": LOGISTIC,
    "non_saturating": LOGISTIC,
    "lsgan": SQUARES,
    "hinge": HINGE,
    "wasserstein": LINEAR,
    "relativistic": RELATIVISTIC,
}

# The generator's loss of a fake sample is the discriminator's of a real one, save where it is the other's negative.
_GENERATOR = _DISCRIMINATOR | {"minimax": SATURATING, "hinge": LINEAR}

_REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


def gan_discriminator_loss(real: Tensor, fake: Tensor, kind: str = "non_saturating", *, reduction: str = "mean") -> Tensor:
    r"""The discriminator's loss from its scores of real and of generated samples, before any sigmoid.

    ================== =====================================================================
    kind               loss of scores r and f
    ================== =====================================================================
    ``minimax``        softplus(-r) + softplus(f), binary cross entropy with labels 1 and 0
    ``non_saturating`` the same
    ``lsgan``          ((r - 1)^2 + f^2) / 2
    ``hinge``          max(1 - r, 0) + max(1 + f, 0)
    ``wasserstein``    f - r
    ``relativistic``   softplus(-(r - f)), sample by sample
    ================== =====================================================================

    Args:
        real: scores of real samples, any shape; fp32, fp16, bf16 or fp64.
        fake: scores of generated samples; of another shape if need be, unless ``kind`` is ``"relativistic"`` or
            ``reduction`` is ``"none"``. Made from samples that were detached from the generator.
        kind: one of the table.
        reduction: ``"mean"``: over each side's own elements, then added; ``"sum"``; ``"none"``: element by element.

    Returns:
        0-d tensor for ``mean`` and ``sum``, the shape of ``real`` for ``none``; in the dtype to which the two promote
        (fp32 under autocast). Differentiable in both.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: unknown kind or reduction, or shapes that differ where they must not.
        RuntimeError: devices differ.
        NotImplementedError: scores are not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64; right to the last digits at scores of any size, infinite ones included (where
        they give 0, infinity, or NaN from infinity minus infinity). The gradient of ``hinge`` is 0 at the margin itself.
        An empty side makes the mean NaN.

    Differs from torch:
        Torch has no such loss; ``non_saturating`` is ``binary_cross_entropy_with_logits`` of both sides, without targets.

    Source:
        Goodfellow et al., "Generative Adversarial Nets", 2014, equation 1; Mao et al., "Least Squares Generative
        Adversarial Networks", 2017, equation 9; Lim and Ye, "Geometric GAN", 2017, section 3 (hinge); Arjovsky et al.,
        "Wasserstein GAN", 2017, equation 3; Jolicoeur-Martineau, "The relativistic discriminator", 2018, section 4.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.gan_discriminator_loss(torch.tensor([2.0, 0.5]), torch.tensor([-2.0]), "hinge")
        tensor(0.2500)
    """
    _check(real, fake, "real", kind, reduction)
    game = _DISCRIMINATOR[kind]
    if real.shape != fake.shape and (game == RELATIVISTIC or reduction == "none"):
        raise ValueError(
            f"real and fake must have one shape for kind={kind!r}, reduction={reduction!r}, got {list(real.shape)} and "
            f"{list(fake.shape)}"
        )
    if game == RELATIVISTIC:
        return _elementwise(real, fake, game, reduction)
    if reduction == "none":
        return _elementwise(real, fake, game | BOTH, reduction)
    triton = backend.use_triton(real, fake)
    loss, _, _ = pair_op.apply(
        Term(NAME, real, None, 0.0, game),
        Term(NAME, fake, None, 0.0, game | FAKE),
        Sum(1.0, None, None, _REDUCTIONS[reduction]),
        loss_dtype(torch.promote_types(real.dtype, fake.dtype), real.device),
        triton=triton,
        by_reference=not triton and (_plain_is_best(real, fake, game) or backend.composite(real, fake)),
    )
    return loss


def gan_generator_loss(
    fake: Tensor, kind: str = "non_saturating", *, real: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    r"""The generator's loss from the discriminator's scores of generated samples, before any sigmoid.

    ================== ==================================================
    kind               loss of a score f
    ================== ==================================================
    ``minimax``        -softplus(f), whose gradient vanishes where the discriminator is sure
    ``non_saturating`` softplus(-f)
    ``lsgan``          (f - 1)^2 / 2
    ``hinge``          -f
    ``wasserstein``    -f
    ``relativistic``   softplus(-(f - r)), with r the score of a real sample
    ================== ==================================================

    Args:
        fake: scores of generated samples, any shape; fp32, fp16, bf16 or fp64.
        kind: one of the table.
        real: scores of real samples, in the shape of ``fake``: for ``"relativistic"`` alone.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        0-d tensor for ``mean`` and ``sum``, the shape of ``fake`` for ``none``; in the dtype of the scores (fp32 under
        autocast). Differentiable in ``real``, too.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: unknown kind or reduction; ``real`` missing or of another shape for ``"relativistic"``, or given for
            another kind.
        RuntimeError: devices differ.
        NotImplementedError: scores are not real floating point.

    Numerics:
        As :func:`gan_discriminator_loss`.

    Differs from torch:
        Torch has no such loss.

    Source:
        As :func:`gan_discriminator_loss`; for ``non_saturating`` Goodfellow et al., 2014, section 3.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.gan_generator_loss(torch.tensor([0.0, 3.0]), "lsgan")
        tensor(1.2500)
    """
    _check(fake, fake if real is None else real, "fake", kind, reduction)
    if kind == "relativistic":
        if real is None or real.shape != fake.shape:
            given = "None" if real is None else f"shape {list(real.shape)}"
            raise ValueError(f"real must have the shape {list(fake.shape)} of fake for kind='relativistic', got {given}")
        return _elementwise(fake, real, RELATIVISTIC, reduction)
    if real is not None:
        raise ValueError(f"real is for kind='relativistic' alone, but kind is {kind!r}: leave it out")
    return _elementwise(fake, None, _GENERATOR[kind] | (FAKE if kind == "minimax" else 0), reduction)


def _elementwise(a: Tensor, b: Tensor | None, flags: int, reduction: str) -> Tensor:
    triton = backend.use_triton(a, b)
    dtype = a.dtype if b is None else torch.promote_types(a.dtype, b.dtype)
    return elementwise_op.apply(
        NAME,
        (a, b, None, None),
        None,
        (0.0, 0.0, 0.0),
        flags,
        _REDUCTIONS[reduction],
        loss_dtype(dtype, a.device),
        triton=triton,
        by_reference=not triton and (_plain_is_best(a, b, flags & GAMES) or backend.composite(a, b)),
    )


def _plain_is_best(a: Tensor, b: Tensor | None, game: int) -> bool:
    if torch.compiler.is_compiling() or a.device.type != "cpu":
        return False
    # A sum whose gradient is a constant is all that there is of the linear game.
    return game == LINEAR or a.numel() + (0 if b is None else b.numel()) < PLAIN_BELOW


def _check(first: Any, second: Any, name: str, kind: Any, reduction: Any) -> None:
    checks.floating(name, first)
    other = "fake" if name == "real" else "real"
    checks.floating(other, second)
    checks.same_device(other, second, first)
    checks.one_of("kind", kind, _DISCRIMINATOR)
    checks.one_of("reduction", reduction, _REDUCTIONS)


def gradient_penalty(grad: Tensor, *, target: float = 1.0, reduction: str = "mean") -> Tensor:
    r"""Squared distance of each sample's gradient norm from a target.

    .. math::
        \big( \lVert \nabla_x D(x) \rVert_2 - \text{target} \big)^2

    The gradient comes from ``torch.autograd.grad(D(x).sum(), x, create_graph=True)``; the penalty's backward then flows
    through it into the discriminator's weights.

    Args:
        grad: gradients of the scores at the samples, shape (N, ...); fp32, fp16, bf16 or fp64. The norm is over all but
            dimension 0.
        target: the norm that costs nothing; not negative.
        reduction: over the N samples: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        0-d tensor for ``mean`` and ``sum``, (N,) for ``none``, in the dtype of ``grad`` (fp32 under autocast).

    Raises:
        TypeError: ``grad`` is not a tensor, or ``target`` not a number.
        ValueError: a 0-d ``grad``, a negative ``target``, an unknown reduction.
        NotImplementedError: ``grad`` is not real floating point.

    Numerics:
        Squares and sums in fp64 for every dtype: norms of numbers that square to 0 or infinity in their own come out right.
        On a CPU those of narrower numbers begin in fp32, 128 squares at a time, which is off by a few units in
        fp32's last place, unless a norm is within 1/64 of the target.
        In fp64 itself elements should lie between 1e-150 and 1e150 in size. At a norm of 0, where none exists, all
        derivatives are taken to be 0. No samples: ``sum`` 0, ``mean`` NaN.

    Differs from torch:
        Torch has no such loss; ``grad.norm(2, dim=1)`` needs the flattening, and loses small gradients in fp16.

    Source:
        Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, equation 3, without the factor lambda.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.gradient_penalty(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), reduction="none")
        tensor([16.,  1.])
    """
    checks.number("target", target)
    if not target >= 0.0:
        raise ValueError(f"target must not be negative, got {target}: it is a norm")
    return _penalty(grad, float(target), None, reduction)


def r1_penalty(grad: Tensor, *, gamma: float = 10.0, reduction: str = "mean") -> Tensor:
    r"""Squared norm of each sample's gradient, times half of gamma.

    .. math::
        \frac{\gamma}{2} \lVert \nabla_x D(x) \rVert_2^2

    Args:
        grad: gradients of the scores at real samples, shape (N, ...), from ``create_graph=True``; fp32, fp16, bf16 or fp64.
        gamma: the penalty's weight; not negative.
        reduction: over the N samples: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        0-d tensor for ``mean`` and ``sum``, (N,) for ``none``, in the dtype of ``grad`` (fp32 under autocast).

    Raises:
        TypeError: ``grad`` is not a tensor, or ``gamma`` not a number.
        ValueError: a 0-d ``grad``, a negative ``gamma``, an unknown reduction.
        NotImplementedError: ``grad`` is not real floating point.

    Numerics:
        As :func:`gradient_penalty`, and smooth at 0.

    Differs from torch:
        Torch has no such loss.

    Source:
        Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018, equation 9.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.r1_penalty(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), gamma=2.0)
        tensor(12.5000)
    """
    checks.number("gamma", gamma)
    if not gamma >= 0.0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    return _penalty(grad, 0.0, float(gamma), reduction)


def _norms_are_best(grad: Tensor) -> bool:
    return (
        grad.device.type == "cpu"
        and grad.dim() > 1
        and 0 < grad.numel() < NORMS_BELOW
        and grad.dtype != torch.float64  # whose own digits the norm's few lanes would lose
        and backend.plain(grad)
    )


def _penalty(grad: Any, target: float, gamma: float | None, reduction: Any) -> Tensor:
    checks.floating("grad", grad)
    checks.one_of("reduction", reduction, _REDUCTIONS)
    if grad.dim() == 0:
        raise ValueError("grad must have samples along dimension 0, got a 0-d tensor: use .unsqueeze(0) for one sample")
    triton = backend.use_triton(grad)
    dtype = loss_dtype(grad.dtype, grad.device)
    if not triton and backend.composite(grad):
        return composed(grad, target, gamma, _REDUCTIONS[reduction]).to(dtype)
    if not triton and _norms_are_best(grad):
        found = roots(grad)
        # At 0 and at infinity their derivatives are not what the penalty documents.
        if float(found.detach().min()) > 0.0 and float(found.detach().max()) < math.inf:
            return reduce(of_norms(found, target, gamma), _REDUCTIONS[reduction]).to(dtype)
    loss, _ = autograd.apply(Penalty, grad, target, gamma, int(_REDUCTIONS[reduction]), dtype, triton)
    return loss
