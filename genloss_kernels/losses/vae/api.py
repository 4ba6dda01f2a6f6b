"""The public loss of variational autoencoders: check, choose the path, add two families' losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import backend, checks, made, pair_op
from ...core.elementwise import divisor_of
from ...core.layout import broadcast_shape
from ...core.pair import Sum, Term
from ...core.reduction import Reduction, accumulator, loss_dtype
from ...core.widening import few, narrow, wide
from ..binary_cross_entropy.reference import NAME as BINARY
from ..binary_cross_entropy.reference import PLAIN as PLAIN_BINARY
from ..binary_cross_entropy.reference import PROBABILITIES, torch_loss_of_logits, torch_loss_of_probabilities
from ..gaussian_kl.reference import FREE_BITS, plain_sum
from ..gaussian_kl.reference import NAME as GAUSSIAN
from ..regression.reference import L1, MSE, torch_l1_loss, torch_mse_loss

# Formulas of each reconstruction loss, and their flags.
_RECONSTRUCTION = {
    "mse": (MSE, 0),
    "l1": (L1, 0),
    "bce": (PROBABILITIES, 0),
    "bce_with_logits": (BINARY, PLAIN_BINARY),
}

_SUM = int(Reduction.SUM)
# Torch's sums of them.
_TORCH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda recon, target: torch_mse_loss(recon, target, _SUM),
    "l1": lambda recon, target: torch_l1_loss(recon, target, _SUM),
    "bce": lambda recon, target: torch_loss_of_probabilities(recon, target, None, _SUM),
    "bce_with_logits": lambda recon, target: torch_loss_of_logits(recon, target, None, None, _SUM),
}

# Below this many elements on a CPU torch's operators with autograd cost less than one function of all.
PARTS_BELOW = 2**18

_REDUCTIONS = {
    "none": Reduction.SAMPLE,
    "mean": Reduction.MEAN,
    "sum": Reduction.SUM,
    "batchmean": Reduction.BATCHMEAN,
}


class VAELossOutput(NamedTuple):
    """The loss, ``recon + beta * kl``, and its two terms: differentiable, all of them."""

    loss: Tensor
    recon: Tensor
    kl: Tensor


def vae_loss(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    recon_loss: str = "mse",
    beta: float | Tensor = 1.0,
    reduction: str = "batchmean",
    free_bits: float | None = None,
    capacity: float | None = None,
) -> VAELossOutput:
    r"""The negative evidence lower bound of a variational autoencoder: reconstruction plus beta times divergence, in nats.

    .. math::
        L = \sum_i \ell(\hat x_i, x_i) + \beta \sum_d \mathrm{kl}_d, \qquad
        \mathrm{kl}_d = \tfrac12 \big( e^{\log\sigma_d^2} - 1 - \log\sigma_d^2 + \mu_d^2 \big)

    averaged over the batch.

    Args:
        recon: the decoder's output, shape (N, ...); fp32, fp16, bf16 or fp64. Probabilities for ``"bce"``.
        target: what it should be, in the shape of ``recon``, floating point.
        mu: means of the posterior, shape (N, ...).
        logvar: its log-variances; broadcasts with ``mu``.
        recon_loss: ``"mse"``: the squared error, without a half; ``"l1"``: the absolute error; ``"bce"``: binary cross
            entropy of probabilities, with logarithms and gradient bounded as torch bounds them; ``"bce_with_logits"``: of
            logits.
        beta: weight of the divergence, not negative: a float, or a 0-d tensor on the device. Takes no gradient. Changing it
            from step to step recompiles nothing, but once under ``torch.compile`` for floats, when the first changes.
        reduction: ``"batchmean"``: each term summed over all but dimension 0 and averaged over that, as the bound has it;
            ``"none"``: the same for each sample, without the average; ``"sum"``; ``"mean"``: each term over its own
            elements, which changes what a given beta means by the ratio of pixels to latents.
        free_bits: each latent's divergence counts at least this many nats, and takes no gradient below; not negative.
        capacity: replaces a sample's divergence by its distance from this many nats, ``abs(sum_d kl - capacity)``, not
            negative; ``mean`` and ``batchmean`` then average it over N. Papers that average over the batch before taking the
            distance let samples above and below cancel.

    Returns:
        ``VAELossOutput(loss, recon, kl)``: 0-d tensors, or (N,) for ``none``, in the dtype to which the operands promote
        (fp32 under autocast). ``kl`` is after free bits and capacity and before beta. Each may be differentiated alone.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes of ``recon`` and ``target``, or numbers of samples, that differ; an unknown ``recon_loss`` or
            reduction; a negative ``beta``, ``free_bits`` or ``capacity``; an input without a batch dimension.
        RuntimeError: ``mu`` and ``logvar`` do not broadcast, devices differ, ``beta`` requires a gradient, or a probability
            or its target outside [0, 1]. Values of tensors are looked at on the CPU, and on a GPU under ``GENLOSS_DEBUG=1``.
        NotImplementedError: an operand is not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64. The divergence keeps its digits at small log-variances. Infinite logits give 0 or
        inf. At a distance of 0 from the capacity the gradient is 0, and so is that of ``l1`` at 0. The samples' sums that a
        capacity needs are kept for the backward, 4 bytes each. A ``beta`` of 0 does not hide an infinite divergence: NaN.
        Empty batch: ``sum`` 0, means NaN.

    Differs from torch:
        Torch has no such loss. ``"bce_with_logits"`` is finite or infinite at infinite logits, where torch gives NaN.

    Source:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, equation 10 and appendix B; Higgins et al., "beta-VAE",
        2017, equation 4; Burgess et al., "Understanding disentangling in beta-VAE", 2018, equation 8 (capacity); Kingma et
        al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016, appendix C.8 (free bits).

    Example:
        >>> import torch, genloss_kernels as gk
        >>> image = torch.zeros(2, 1, 4, 4)
        >>> gk.vae_loss(image + 0.5, image, torch.ones(2, 3), torch.zeros(2, 3), beta=4.0)
        VAELossOutput(loss=tensor(10.), recon=tensor(4.), kl=tensor(1.5000))
    """
    _check(recon, target, mu, logvar, recon_loss, beta, reduction, free_bits, capacity)
    tensors = (recon, target, mu, logvar)
    dtype = recon.dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    triton = backend.use_triton(*tensors)
    name, flags = _RECONSTRUCTION[recon_loss]
    if torch.compiler.is_compiling() and not isinstance(beta, Tensor):
        # A number among an operator's arguments is a constant of the program, which each new one would compile again.
        beta = torch.ones((), dtype=accumulator(dtype), device=recon.device) * beta
    tensor_beta = isinstance(beta, Tensor)
    rule = Sum(
        1.0 if tensor_beta else float(beta),
        beta.detach() if tensor_beta else None,
        None if capacity is None else float(capacity),
        _REDUCTIONS[reduction],
    )
    if not triton and free_bits is None and _parts_are_best(tensors, rule):
        result = _by_parts(wide(recon), wide(target), mu, logvar, recon_loss, rule)
        # An infinite logit may have made NaN of a term that counts for nothing.
        if math.isfinite(result.loss.detach()):
            return VAELossOutput(*(narrow(term, dtype) for term in result))
    first = Term(name, recon, target, 0.0, flags)
    second = Term(GAUSSIAN, mu, logvar, float(free_bits or 0.0), 0 if free_bits is None else FREE_BITS)
    terms = first.operands, second.operands
    fits = capacity is None and recon.dtype == mu.dtype and all(made.fits(t, rule.reduction) for t in terms)
    if not triton and fits:
        parts = tuple(
            made.Part(term.loss, (term.s0, 0.0, 0.0), term.flags, rule.reduction, factor)
            for term, factor in zip((first, second), (1.0, float(beta)), strict=True)
        )
        return VAELossOutput(*made.apply(parts, loss_dtype(dtype, recon.device), (*terms[0], *terms[1])))
    return VAELossOutput(
        *pair_op.apply(
            first,
            second,
            rule,
            loss_dtype(dtype, recon.device),
            triton=triton,
            by_reference=not triton and backend.composite(*tensors, rule.beta_tensor),
        )
    )


def _parts_are_best(tensors: Sequence[Tensor], rule: Sum) -> bool:
    recon, _, mu, logvar = tensors
    return (
        few(recon, PARTS_BELOW)
        and mu.shape == logvar.shape
        and rule.capacity is None
        and rule.reduction != Reduction.SAMPLE
        and recon.dtype != torch.float64
        and all(t.dtype == recon.dtype for t in tensors)
        and backend.plain(*tensors, rule.beta_tensor)
    )


def _by_parts(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, recon_loss: str, rule: Sum) -> VAELossOutput:
    """Torch's reconstruction loss and the usual operators, where the elements are too few to be worth a function of both."""
    one, other = _TORCH[recon_loss](recon, target), plain_sum(mu, logvar).to(recon.dtype)
    n, m = divisor_of(rule.reduction, recon.shape), divisor_of(rule.reduction, mu.shape)
    if n != m:
        one, other, n, m = one / n, other / m, 1.0, 1.0
    beta = rule.beta if rule.beta_tensor is None else rule.beta_tensor.to(other.dtype)
    loss = one + (other if rule.beta_tensor is None and beta == 1.0 else beta * other)
    return VAELossOutput(*((loss, one, other) if n == 1.0 else (loss / n, one / n, other / n)))


def _check(
    recon: Any, target: Any, mu: Any, logvar: Any, recon_loss: Any, beta: Any, reduction: Any, free_bits: Any, capacity: Any
) -> None:
    for name, value in (("recon", recon), ("target", target), ("mu", mu), ("logvar", logvar)):
        checks.floating(name, value)
        checks.same_device(name, value, recon)
    checks.one_of("recon_loss", recon_loss, _RECONSTRUCTION)
    checks.one_of("reduction", reduction, _REDUCTIONS)
    for name, value in (("free_bits", free_bits), ("capacity", capacity)):
        if value is not None:
            checks.number(name, value)
            if not value >= 0.0:
                raise ValueError(f"{name} must not be negative, got {value}: it is in nats")
    if target.shape != recon.shape:
        raise ValueError(f"target must have the shape {list(recon.shape)} of recon, got {list(target.shape)}")
    try:
        latent = broadcast_shape((mu, logvar))
    except RuntimeError:
        shapes = f"mu {list(mu.shape)}, logvar {list(logvar.shape)}"
        raise RuntimeError(f"the shapes do not broadcast together: {shapes}") from None
    if recon.dim() == 0 or len(latent) == 0:
        raise ValueError("recon and mu must have samples along dimension 0, got a 0-d tensor: use .unsqueeze(0)")
    if latent[0] != recon.size(0):
        raise ValueError(f"recon and mu must hold as many samples along dimension 0, got {recon.size(0)} and {latent[0]}")
    _check_beta(beta, recon)
    if recon_loss == "bce":
        checks.probabilities("recon", recon, ": recon_loss='bce_with_logits' takes logits")
        checks.probabilities("target", target)


def _check_beta(beta: Any, recon: Tensor) -> None:
    if not isinstance(beta, Tensor):
        checks.number("beta", beta)
        negative = not beta >= 0.0
    else:
        if beta.dim() != 0:
            raise ValueError(f"beta must be a number or a 0-d tensor, got shape {list(beta.shape)}")
        checks.floating("beta", beta)
        checks.same_device("beta", beta, recon)
        checks.no_gradient("beta", beta)
        negative = backend.reads_values(beta) and not float(beta) >= 0.0
    if negative:
        raise ValueError(f"beta must not be negative, got {beta}")
