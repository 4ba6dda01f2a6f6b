"""The public cosine embedding loss: check, choose the path, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import autograd, backend, checks
from ...core.reduction import Reduction, loss_dtype, parse_reduction
from ...core.widening import few, narrow, wide
from .op import CosineEmbedding
from .reference import composed

# What torch.nn.functional's calls, without its Python.
_torch_loss = torch.cosine_embedding_loss

# Below this many elements on a CPU the built-in costs less than ours over blocks where one input is learned, and below a
# quarter of them where both are.
BUILTIN_BELOW = 2**19

# Sums of all squares whose product keeps every norm of the built-in within its range.
_LARGEST_PRODUCT = {torch.float32: 1e36, torch.float64: 1e300}

_REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Distance of the cosine of two vectors from 1 if they should be alike, from the margin if they should not.

    .. math::
        \ell = \begin{cases} 1 - c & t = 1 \\ \max(0, c - \text{margin}) & t = -1 \end{cases}, \qquad
        c = \frac{a \cdot b}{\sqrt{(|a|^2 + \epsilon)(|b|^2 + \epsilon)}}

    with epsilon 1e-12.

    Args:
        input1: vectors, shape (N, D) or (D); fp32, fp16, bf16 or fp64.
        input2: vectors to compare with them; sizes of 1 broadcast.
        target: 1 for a pair that is alike and -1 for one that is not, shape (N), or () for inputs of shape (D); any other
            label has a loss of 0. Takes no gradient.
        margin: cosine up to which vectors that should not be alike cost nothing, usually in [0, 1).
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        0-d tensor for ``mean`` and ``sum``, the shape of the target for ``none``, broadcast with the rows; in the dtype to
        which the inputs promote (fp32 under autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: unknown reduction.
        RuntimeError: dimensions that do not fit, shapes that do not broadcast, or devices that differ.
        NotImplementedError: an input is not real floating point.

    Numerics:
        Arithmetic in fp32, fp64 for fp64, on rows divided by their largest absolute value, so that no square is lost. A
        vector of zeros has cosine 0 and, as in torch, a gradient of a million times the other's direction. At a cosine
        that is the margin the gradient is that of what lies above, as torch's. No rows: ``mean`` NaN, ``sum`` 0.

    Differs from torch:
        Vectors are right whose squares a dtype does not hold: in half precision at 1e-4 and at 300, where torch gives NaN,
        infinity or 0; from 1e19 on in fp32, where torch takes the cosine for 0 or NaN. Integer inputs raise.

    Source:
        Hadsell, Chopra and LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", 2006, equation 4, with the
        cosine for a distance and without squares.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        >>> gk.cosine_embedding_loss(x, torch.tensor([[6.0, 8.0], [1.0, 1.0]]), torch.tensor([1, -1]), reduction="sum")
        tensor(0.7071)
    """
    reduction = parse_reduction(reduction, size_average, reduce)
    _check(input1, input2, target, margin, reduction)
    if not target.dtype.is_signed:
        # Which kernels do not compare with -1 as torch does.
        target = (target == 1).to(torch.int8) - (target == -1).to(torch.int8)
    triton = backend.use_triton(input1, input2)
    dtype = loss_dtype(torch.promote_types(input1.dtype, input2.dtype), input1.device)
    if not triton and _builtin_is_best(input1, input2):
        wide1, wide2 = wide(input1), wide(input2)
        # NaN is not below anything.
        if _sum_of_squares(wide1) * _sum_of_squares(wide2) < _LARGEST_PRODUCT[wide1.dtype]:
            return narrow(_torch_loss(wide1, wide2, target, float(margin), int(_REDUCTIONS[reduction])), input1.dtype)
    arguments = (input1, input2, target.detach(), float(margin), _REDUCTIONS[reduction])
    # A single column beside many counts once in its norm: rare enough for plain operators.
    if input1.size(-1) != input2.size(-1) or (not triton and backend.composite(input1, input2)):
        return composed(*arguments).to(dtype)
    loss, _ = autograd.apply(CosineEmbedding, *arguments[:4], int(arguments[4]), dtype, triton)
    return loss


def _builtin_is_best(input1: Tensor, input2: Tensor) -> bool:
    return (
        few(input1, BUILTIN_BELOW // (4 if input1.requires_grad and input2.requires_grad else 1))
        and input1.dtype == input2.dtype
        and input1.is_contiguous()
        and input2.is_contiguous()
        and backend.plain(input1, input2)
    )


def _sum_of_squares(x: Tensor) -> float:
    flat = x.detach().view(-1)
    return torch.dot(flat, flat).item()


def _check(input1: Any, input2: Any, target: Any, margin: Any, reduction: Any) -> None:
    checks.floating("input1", input1)
    checks.floating("input2", input2)
    checks.tensor("target", target)
    checks.number("margin", margin)
    checks.one_of("reduction", reduction, _REDUCTIONS)
    checks.same_device("input2", input2, input1)
    checks.same_device("target", target, input1)
    if target.is_complex():
        raise RuntimeError(f"target must hold labels 1 and -1, got {target.dtype}")
    if target.dim() > 1:
        raise RuntimeError(f"target must have shape (N) or (), multi-target not supported, got {list(target.shape)}")
    wanted = target.dim() + 1
    if input1.dim() != wanted or input2.dim() != wanted:
        expected = "a 1D target expects 2D inputs, (N, D)" if target.dim() else "a 0D target expects 1D inputs, (D)"
        raise RuntimeError(f"{expected}: got input1 {list(input1.shape)}, input2 {list(input2.shape)}")
    if input1.shape == input2.shape and input1.shape[:-1] == target.shape:
        return
    try:
        torch.broadcast_shapes(input1.shape, input2.shape)
        torch.broadcast_shapes(input1.shape[:-1], input2.shape[:-1], target.shape)
    except RuntimeError:
        shapes = f"input1 {list(input1.shape)}, input2 {list(input2.shape)}, target {list(target.shape)}"
        raise RuntimeError(f"the shapes do not broadcast together: {shapes}") from None
