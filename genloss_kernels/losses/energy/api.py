"""The public loss of energy-based models: check, choose the path, reduce."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import backend, checks, elementwise_op, pair_op
from ...core.pair import Sum, Term
from ...core.reduction import Reduction, loss_dtype
from .reference import BOTH, NAME, NEGATIVE, SQUARES

# Below this many energies on a CPU plain operators with autograd cost less than our operators' bookkeeping.
PLAIN_BELOW = 2**19

_REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


def contrastive_divergence_loss(
    positive_energy: Tensor, negative_energy: Tensor, *, l2: float = 0.0, reduction: str = "mean"
) -> Tensor:
    r"""Energy of data less energy of the model's samples, with a penalty that keeps both small.

    .. math::
        \overline{E^+} - \overline{E^-} + l_2 \big( \overline{(E^+)^2} + \overline{(E^-)^2} \big)

    For a model :math:`p(x) \propto e^{-E(x)}` the gradient of the negative log-likelihood is the mean gradient of E over the
    data less that over samples of p, since the normalising constant's gradient is minus the latter. So with ``l2=0`` and
    samples from p, this loss has the gradient of maximum likelihood, though its value is no likelihood. In practice the
    samples come from a few steps of a Markov chain that starts at data (contrastive divergence) or goes on from a buffer
    (persistent), and are detached.

    Args:
        positive_energy: energies of data, any shape; fp32, fp16, bf16 or fp64.
        negative_energy: energies of samples; of another shape if need be, unless ``reduction`` is ``"none"``.
        l2: weight of the squared energies; not negative.
        reduction: ``"mean"``: over each side's own elements, then added; ``"sum"``; ``"none"``: element by element.

    Returns:
        0-d tensor for ``mean`` and ``sum``, the shape of ``positive_energy`` for ``none``; in the dtype to which the two
        promote (fp32 under autocast). Differentiable in both.

    Raises:
        TypeError: an energy is not a tensor, or ``l2`` not a number.
        ValueError: a negative ``l2``, an unknown reduction, shapes that differ for ``none``.
        RuntimeError: devices differ.
        NotImplementedError: energies are not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64. An empty side makes the mean NaN.

    Differs from torch:
        Torch has no such loss.

    Source:
        Hinton, "Training Products of Experts by Minimizing Contrastive Divergence", 2002, equation 5; Du and Mordatch,
        "Implicit Generation and Modeling with Energy-Based Models", 2019, section 3.3 (the squares).

    Example:
        A Gaussian of unknown mean: E(x) = (x - mean)^2 / 2, whose samples are drawn exactly. It finds the data's mean.

        >>> import torch, genloss_kernels as gk
        >>> data = 3.0 + torch.randn(4096, generator=torch.Generator().manual_seed(0))
        >>> mean = torch.zeros((), requires_grad=True)
        >>> optimizer = torch.optim.SGD([mean], lr=0.5)
        >>> for step in range(20):
        ...     samples = mean.detach() + torch.randn(4096, generator=torch.Generator().manual_seed(step))
        ...     loss = gk.contrastive_divergence_loss((data - mean).square() / 2, (samples - mean).square() / 2)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> bool((mean - data.mean()).abs() < 0.1)
        True
    """
    for name, energy in (("positive_energy", positive_energy), ("negative_energy", negative_energy)):
        checks.floating(name, energy)
        checks.same_device(name, energy, positive_energy)
    checks.number("l2", l2)
    if not l2 >= 0.0:
        raise ValueError(f"l2 must not be negative, got {l2}")
    checks.one_of("reduction", reduction, _REDUCTIONS)
    if reduction == "none" and positive_energy.shape != negative_energy.shape:
        raise ValueError(
            f"positive_energy and negative_energy must have one shape for reduction='none', got "
            f"{list(positive_energy.shape)} and {list(negative_energy.shape)}"
        )
    tensors = (positive_energy, negative_energy)
    dtype = loss_dtype(torch.promote_types(*(t.dtype for t in tensors)), positive_energy.device)
    triton = backend.use_triton(*tensors)
    small = positive_energy.device.type == "cpu" and sum(t.numel() for t in tensors) < PLAIN_BELOW
    plain = not torch.compiler.is_compiling() and small
    by_reference = not triton and (plain or backend.composite(*tensors))
    # Without a penalty no square, which may be infinite, is a term.
    squares = SQUARES if l2 > 0.0 else 0
    if reduction == "none":
        scalars = (float(l2), 0.0, 0.0)
        return elementwise_op.apply(
            NAME,
            (*tensors, None, None),
            None,
            scalars,
            BOTH | squares,
            Reduction.NONE,
            dtype,
            triton=triton,
            by_reference=by_reference,
        )
    loss, _, _ = pair_op.apply(
        Term(NAME, positive_energy, None, float(l2), squares),
        Term(NAME, negative_energy, None, float(l2), NEGATIVE | squares),
        Sum(1.0, None, None, _REDUCTIONS[reduction]),
        dtype,
        triton=triton,
        by_reference=by_reference,
    )
    return loss
