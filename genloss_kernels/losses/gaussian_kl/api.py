"""The public Gaussian KL divergence: check, choose the path, reduce."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import backend, checks, elementwise_op
from ...core.elementwise import divisor_of
from ...core.layout import broadcast_shape
from ...core.reduction import Reduction, accumulator, loss_dtype
from .reference import CLAMPED, FREE_BITS, GENERAL, NAME, plain_sum

# Below this many elements on a CPU plain operators with autograd cost less than our operators' bookkeeping.
PLAIN_BELOW = 2**15

_REDUCTIONS = {
    "none": Reduction.NONE,
    "mean": Reduction.MEAN,
    "sum": Reduction.SUM,
    "batchmean": Reduction.BATCHMEAN,
}
_SUMS = (Reduction.SUM, Reduction.MEAN, Reduction.BATCHMEAN)


def gaussian_kl(
    mu_q: Tensor,
    logvar_q: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    free_bits: float | None = None,
    capacity: float | None = None,
    logvar_clamp: tuple[float, float] | None = None,
) -> Tensor:
    r"""KL divergence KL(q || p) between diagonal Gaussians, in nats.

    .. math::
        \mathrm{kl} = \tfrac12 \Big[ e^{v} - 1 - v + (\mu_q - \mu_p)^2 e^{-\log\sigma_p^2} \Big], \qquad
        v = \log\sigma_q^2 - \log\sigma_p^2

    Args:
        mu_q: means of q, shape (N, ...); fp32, fp16, bf16 or fp64.
        logvar_q: log-variances of q; broadcasts with the others.
        mu_p: means of p; left out, 0.
        logvar_p: log-variances of p; left out, 0, so that p is the standard normal.
        reduction: ``"none"``: per element; ``"batchmean"``: summed over all but dimension 0 and averaged over dimension 0,
            as in the evidence lower bound; ``"sum"`` and ``"mean"``: over elements. Dimension 0 is that of the broadcast
            shape.
        free_bits: each element's divergence counts at least this many nats, and takes no gradient below; not negative.
        capacity: replaces a sample's divergence by its distance from this many nats, ``abs(sum_d kl - capacity)``, not
            negative. Then ``none`` gives (N,), ``mean`` and ``batchmean`` average over N, and ``sum`` adds. Papers that
            average over the batch before taking the distance (Burgess et al.) let samples above and below the capacity
            cancel; here each sample is held to it.
        logvar_clamp: bounds of both log-variances, clamped as ``torch.clamp`` does, with gradient 1 on the bounds.

    Returns:
        0-d tensor for ``batchmean``, ``sum`` and ``mean``; the broadcast shape for ``none``. In the dtype to which the
        operands promote (fp32 under autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: unknown reduction, negative free bits or capacity, bounds out of order, a 0-d input where the
            reduction needs samples.
        RuntimeError: shapes that do not broadcast, or devices that differ.
        NotImplementedError: an operand is not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64; the difference ``exp(v) - 1 - v`` keeps all its digits at small v (on the CPU down
        to 1e-9), where the plain form has none. A log-variance above 88 (fp32) gives inf, as exp does. Empty: ``sum`` 0,
        means NaN.

    Differs from torch:
        ``torch.distributions.kl_divergence`` takes scales and has no reduction; the values agree.

    Source:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, appendix B; Kingma et al., "Improved Variational
        Inference with Inverse Autoregressive Flow", 2016, appendix C.8 (free bits); Burgess et al., "Understanding
        disentangling in beta-VAE", 2018, equation 8 (capacity).

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.gaussian_kl(torch.ones(2, 3), torch.zeros(2, 3))
        tensor(1.5000)
    """
    tensors = (mu_q, logvar_q, mu_p, logvar_p)
    shape = _check(tensors, reduction, free_bits, capacity, logvar_clamp)
    triton = backend.use_triton(mu_q, logvar_q, mu_p, logvar_p)
    flags = GENERAL if mu_p is not None or logvar_p is not None else 0
    if flags:
        tensors = (
            mu_q,
            logvar_q,
            mu_q.new_zeros(()) if mu_p is None else mu_p,
            logvar_q.new_zeros(()) if logvar_p is None else logvar_p,
        )
    low, high = 0.0, 0.0
    if logvar_clamp is not None:
        flags |= CLAMPED
        low, high = map(float, logvar_clamp)
        if logvar_p is None or logvar_p.dtype == logvar_q.dtype:
            # Log-variances that were clamped to them before lie on the bounds.
            low, high = _held(low, logvar_q.dtype), _held(high, logvar_q.dtype)
    if free_bits is not None:
        flags |= FREE_BITS
    dtype = mu_q.dtype
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    result_dtype = loss_dtype(dtype, mu_q.device)
    chosen = Reduction.SAMPLE if capacity is not None else _REDUCTIONS[reduction]
    small = not triton and _plain_is_best(mu_q, shape)
    if small and not flags and chosen in _SUMS and mu_q.shape == logvar_q.shape and dtype != torch.float64:
        return (plain_sum(mu_q, logvar_q) / divisor_of(chosen, shape)).to(result_dtype)
    scalars = (0.0 if free_bits is None else float(free_bits), low, high)
    result = elementwise_op.apply(
        NAME,
        tensors,
        None,
        scalars,
        flags,
        chosen,
        result_dtype if capacity is None else accumulator(dtype),
        triton=triton,
        by_reference=small or (not triton and backend.composite(*tensors)),
    )
    if capacity is None:
        return result
    distance = (result - capacity).abs()
    if reduction != "none":
        distance = distance.sum() if reduction == "sum" else distance.mean()
    return distance.to(result_dtype)


def _held(number: float, dtype: torch.dtype) -> float:
    """The number as torch makes one of half precision of it, through fp32."""
    if dtype not in (torch.float16, torch.bfloat16) or abs(number) == math.inf:
        return number
    for info in (torch.finfo(torch.float32), torch.finfo(dtype)):
        step = info.eps * math.ldexp(0.5, math.frexp(max(abs(number), info.smallest_normal))[1])
        number = round(number / step) * step
    return number


def _plain_is_best(mu_q: Tensor, shape: torch.Size) -> bool:
    return not torch.compiler.is_compiling() and mu_q.device.type == "cpu" and shape.numel() < PLAIN_BELOW


def _check(tensors: Sequence[Any], reduction: Any, free_bits: Any, capacity: Any, logvar_clamp: Any) -> torch.Size:
    names = ("mu_q", "logvar_q", "mu_p", "logvar_p")
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None or name.endswith("_q"):
            checks.floating(name, tensor)  # pyright: ignore[reportArgumentType]
            checks.same_device(name, tensor, tensors[0])  # pyright: ignore[reportArgumentType]
    checks.one_of("reduction", reduction, _REDUCTIONS)
    for name, value in (("free_bits", free_bits), ("capacity", capacity)):
        if value is not None:
            checks.number(name, value)
            if not value >= 0.0:
                raise ValueError(f"{name} must not be negative, got {value}: it is in nats")
    if logvar_clamp is not None:
        if not isinstance(logvar_clamp, (tuple, list)) or len(logvar_clamp) != 2:
            raise TypeError(f"logvar_clamp must be a pair (low, high), got {logvar_clamp!r}")
        for bound in logvar_clamp:
            checks.number("logvar_clamp", bound)
        if not logvar_clamp[0] <= logvar_clamp[1]:
            raise ValueError(f"logvar_clamp must be (low, high) with low <= high, got {logvar_clamp}")
    try:
        shape = broadcast_shape(tensors)
    except RuntimeError:
        given = zip(names, tensors, strict=True)
        listing = ", ".join(f"{n} {list(t.shape)}" for n, t in given if t is not None)
        raise RuntimeError(f"the shapes do not broadcast together: {listing}") from None
    if len(shape) == 0 and (reduction == "batchmean" or capacity is not None):
        raise ValueError(
            "batchmean and capacity need samples along dimension 0, but the inputs are 0-d: use reduction='sum'"
        )
    return shape
