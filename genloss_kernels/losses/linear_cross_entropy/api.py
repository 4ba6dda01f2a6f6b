"""The public linear cross entropy: check, choose the path, reduce."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import autograd, backend, checks
from ...core.classes import index_target
from ...core.reduction import Reduction, accumulator, autocasting, loss_dtype
from ...core.witness import witnessed
from ..cross_entropy import api as cross_entropy_api
from ..cross_entropy import reference
from ..cross_entropy.api import CrossEntropyStats, cross_entropy
from ..cross_entropy.reference import Options
from .chunks import Head, mean_divisor
from .derivatives import by_reference
from .flops import register_formulas
from .functions import LinearCrossEntropyRows, ReducedLinearCrossEntropy
from .op import Needed, mask_of
from .options import (
    BY_DEVICE,
    LinearCrossEntropyOptions,
    accumulation,
    check_fit,
    check_options,
    limits_rows,
    rows_at_a_time,
)

# Logits of a CPU's batch below which calling the operators of chunks costs more than it saves.
LOGITS_BELOW = 2**20

_REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | Any | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    return_stats: bool = False,
    vocab_shard: Any = None,
) -> Tensor | CrossEntropyStats:
    r"""Cross entropy of ``input @ linear_weight.T + linear_bias``, whose logits exist for some rows at a time only.

    .. math::
        y = x W^\top + b, \qquad \ell = \mathrm{cross\_entropy}(y, t)

    For ``mean`` and ``sum`` the gradients are made in the forward, while a chunk's logits exist: 6 N V D operations in all.
    For ``none``, for statistics and in fp16, whose gradients are too small until they are multiplied by the loss scale, the
    backward computes the logits again: 8 N V D.

    Args:
        input: hidden states, shape (D), (N, D) or (..., D); fp32, fp16, bf16 or fp64.
        linear_weight: shape (V, D), in the input's dtype; (V, d1, ..., D) as in torch, where the logits exist.
        target: class indices, int64 or uint8, in the shape of the input without D, or class probabilities, floating point,
            with V in D's place.
        linear_bias: shape (V), in the input's dtype.
        weight: one non-negative factor a class, shape (V).
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, as in :func:`cross_entropy`.
        ignore_index: rows with this label have loss 0 and gradient 0, whatever they hold; -100 if None.
        label_smoothing: mass spread evenly over the classes, in [0, 1].
        options: :class:`LinearCrossEntropyOptions` or torch's own.
        softcap: as in :func:`cross_entropy`.
        logit_scale: as in :func:`cross_entropy`.
        z_loss: as in :func:`cross_entropy`.
        row_weight: factor of each row's whole loss, in the shape of the ``"none"`` result.
        divisor: number or 0-d tensor that replaces what ``mean`` divides by.
        return_stats: return :class:`CrossEntropyStats` instead of the loss alone.
        vocab_shard: :class:`genloss_kernels.distributed.VocabShard` of this rank where the vocabulary is spread over ranks;
            see *Vocabulary-parallel*.

    Returns:
        0-d tensor for ``mean`` and ``sum``; for ``none`` the input's shape without D. In the input's dtype (fp32 under
        autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: unknown reduction, batch sizes that differ, a number that is not finite, or a ``memory_budget`` too
            small for one row.
        RuntimeError: shapes, dtypes or devices that do not fit; an empty ``linear_weight``, as of parameters sharded away.
        IndexError: a class index out of range, on the CPU, or on a GPU under ``GENLOSS_DEBUG=1``. Without that a GPU gives
            the row a loss of NaN, and the gradient of the weight NaN.

    Vocabulary-parallel:
        With ``vocab_shard``, ``linear_weight`` and ``linear_bias`` are this rank's rows, or DTensors of ``Shard(0)``;
        all else is as for :func:`cross_entropy` with ``vocab_shard``, whole and the same on all ranks. One all-gather serves
        each chunk whose gradients are made in the forward, else one for all rows, of as many bytes a row. The gradients
        of weight and bias are this rank's; that of ``input`` is summed over the ranks, in its dtype, by one all-reduce in
        the backward, unless the shard's ``reduce_input_grad`` is False. Whether gradients are wanted must be the same on all
        ranks.

    Numerics:
        Logits in the dtype of the product, the rest in fp32 (fp64 for fp64); the gradient of the weight is summed over
        chunks in fp32. Every backward gives the same bits.

    Differs from torch:
        NaN in an ignored row stays there. All options work in chunks. Logits are computed in full for a gradient of
        ``weight``, in forward mode and under ``vmap``, in a third derivative, and for a K-dimensional ``linear_weight``.

    Source:
        Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, and Hsu et al., "Liger Kernel", 2024,
        for gradients made chunk by chunk in the forward; Shoeybi et al., "Megatron-LM", 2019, section 3
        (vocabulary-parallel).

    Example:
        >>> import torch, genloss_kernels as gk
        >>> hidden, head = torch.eye(2, 3), torch.eye(4, 3)
        >>> round(gk.linear_cross_entropy(hidden, head, torch.tensor([0, 1])).item(), 4)
        0.7437
    """
    if not torch.compiler.is_compiling():
        register_formulas()
    check_options(options)
    target = index_target(target)
    loss_options: dict[str, Any] = {
        "softcap": softcap, "logit_scale": logit_scale, "z_loss": z_loss, "divisor": divisor, "return_stats": return_stats,
    }  # fmt: skip
    if vocab_shard is not None:
        from ..vocab_parallel import sharded

        return sharded.linear_cross_entropy(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options, row_weight,
            vocab_shard, **loss_options,
        )  # fmt: skip
    _check_linear(input, linear_weight, linear_bias, target)
    probabilities = target.is_floating_point()
    if probabilities and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    ignore_index = -100 if ignore_index is None else ignore_index
    if linear_weight.dim() > 2:
        check_fit(options, linear_weight.flatten(0, -2).size(0), input, triton=False)
        if not probabilities:
            # A row of which every label is ignored may hold anything.
            ignored = (target == ignore_index).reshape(input.size(0), math.prod(target.shape[1:])).all(1)
            input = input.masked_fill(ignored.unsqueeze(1), 0.0)
        logits = _logits(input, linear_weight, linear_bias)
        return cross_entropy(
            logits,
            target,
            weight,
            None,
            ignore_index,
            None,
            reduction,
            label_smoothing,
            row_weight=row_weight,
            **loss_options,
        )
    given = (input, linear_weight, linear_bias, target)
    rows_shape, n_classes = input.shape[:-1], linear_weight.size(0)
    flat = input.reshape(-1, input.size(-1))
    target = target.reshape(-1, n_classes) if probabilities else target.reshape(-1)
    row_weight = _flat_row_weight(row_weight, rows_shape)
    # Everything else is checked as for logits, of which the shape is enough.
    like = flat[:, :1].expand(-1, n_classes)
    cross_entropy_api.check(like, target, weight, ignore_index, reduction, label_smoothing, row_weight, **loss_options)
    weight = None if weight is None else weight.contiguous()
    triton = backend.use_triton(flat, linear_weight, linear_bias, target if probabilities else None, weight, row_weight)
    check_fit(options, n_classes, flat, triton=triton)
    if not triton and not limits_rows(options) and _logits_are_best(flat, linear_weight, target):
        return _by_logits(
            flat, linear_weight, linear_bias, target, weight, ignore_index, reduction, label_smoothing, row_weight,
            rows_shape, loss_options,
        )  # fmt: skip
    if not probabilities:
        checks.class_indices(target, n_classes, ignore_index)
    tensor_divisor = divisor if isinstance(divisor, Tensor) else None
    formula = Options(
        ignore_index,
        float(label_smoothing),
        None if softcap is None else float(softcap),
        float(logit_scale),
        float(z_loss),
        None if divisor is None or tensor_divisor is not None else float(divisor),  # pyright: ignore[reportArgumentType]
        _REDUCTIONS[reduction],
        return_stats,
    )
    flat, linear_weight, linear_bias = _autocast(flat, linear_weight, linear_bias)
    dtype = loss_dtype(torch.promote_types(input.dtype, target.dtype) if probabilities else input.dtype, input.device)
    kept = None
    if gathers(options, flat, target):
        flat, target, row_weight, kept = _gather(flat, target, row_weight, ignore_index)
    head = Head(flat, linear_weight, linear_bias, target, weight, row_weight, tensor_divisor)
    loss, stats = _compute(head, formula, options, dtype, triton=triton)
    loss = witnessed(_spread(loss, kept, rows_shape) if reduction == "none" else loss, *given)
    if not return_stats:
        return loss
    lse, log_prob, entropy, n_valid, n_correct = stats
    lse, log_prob, entropy = (witnessed(_spread(s, kept, rows_shape), *given) for s in (lse, log_prob, entropy))
    return CrossEntropyStats(loss, lse, log_prob, entropy, n_valid, n_correct)


def makes_gradients(formula: Options, dtype: torch.dtype) -> bool:
    """Whether a mean or sum makes its gradients in the forward.

    In fp16 they would be too small before a loss scale is known, and are made in the backward.
    """
    return formula.reduction != Reduction.NONE and not formula.stats and dtype != torch.float16


def _logits_are_best(input: Tensor, linear_weight: Tensor, target: Tensor) -> bool:
    if input.device.type != "cpu" or not backend.plain(input, linear_weight, target):
        return False
    return 0 < input.size(0) * linear_weight.size(0) < LOGITS_BELOW


def _by_logits(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    row_weight: Tensor | None,
    shape: torch.Size,
    loss_options: dict[str, Any],
) -> Tensor | CrossEntropyStats:
    """Cross entropy of the logits of the whole batch, where they are too few to be worth chunks."""
    if not target.is_floating_point():
        ignored = target == ignore_index
        if ignored.any():
            input = input.masked_fill(ignored.unsqueeze(1), 0.0)
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    result = cross_entropy(
        logits, target, weight, None, ignore_index, None, reduction, label_smoothing, row_weight=row_weight, **loss_options
    )
    if isinstance(result, Tensor):
        return result.reshape(shape) if reduction == "none" else result
    loss = result.loss.reshape(shape) if reduction == "none" else result.loss
    lse, log_prob, entropy = (row.reshape(shape) for row in (result.lse, result.log_prob, result.entropy))
    return CrossEntropyStats(loss, lse, log_prob, entropy, result.n_valid, result.n_correct)


def _compute(
    head: Head, formula: Options, options: Any, dtype: torch.dtype, *, triton: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    tensors = (head.input, head.linear_weight, head.linear_bias, head.target)
    grad = torch.is_grad_enabled()
    weights_learn = grad and any(t is not None and t.requires_grad for t in (head.row_weight, head.divisor))
    class_weight_learns = grad and head.weight is not None and head.weight.requires_grad
    if class_weight_learns and triton and backend.current() == "triton":
        raise RuntimeError("backend 'triton' has no kernel for the gradient of weight: use backend 'auto' or 'eager'")
    # Reverse mode over reverse mode, as any forward mode, sees through operators of torch alone.
    if class_weight_learns or backend.transformed(*head) or backend.transforms() > 1 or backend.recorded():
        loss, rows = by_reference(head, formula)
        return loss.to(dtype), (rows.lse, rows.log_prob, rows.entropy, rows.valid.sum(), rows.correct.sum())
    needed: Needed = tuple(grad and t is not None and t.requires_grad for t in tensors)  # pyright: ignore[reportAssignmentType]
    n_classes = head.linear_weight.size(0)
    limited = limits_rows(options)
    most = rows_at_a_time(options, n_classes, head.input, triton=triton) if limited else BY_DEVICE
    sum_dtype = accumulation(options, head.input.dtype)
    row_weight = None if head.row_weight is None else head.row_weight.contiguous()
    in_forward = makes_gradients(formula, head.input.dtype) and not backend.transforms()
    if in_forward and not weights_learn and any(needed):
        loss, *_ = autograd.apply(
            ReducedLinearCrossEntropy, *head._replace(row_weight=row_weight), *formula[:6], int(formula.reduction), most,
            sum_dtype, mask_of(needed), dtype, triton,
        )  # fmt: skip
        return loss, ()
    result = autograd.apply(
        LinearCrossEntropyRows, *tensors, head.weight, None if weights_learn else row_weight,
        *formula[:5], formula.stats, most, sum_dtype, mask_of(needed), triton,
    )  # fmt: skip
    loss, stats = result[0], result[1:6]
    if weights_learn:
        weight = None if head.weight is None else head.weight.to(accumulator(head.input.dtype))
        loss, normalizer, _ = reference.weighted(loss, head.target, weight, head.row_weight, formula, n_classes)
    else:
        normalizer = mean_divisor(head, head.ignored(formula)) if formula.reduction == Reduction.MEAN else loss
    return reference.reduce(loss, normalizer, head.divisor, formula).to(dtype), stats


def _flat_row_weight(row_weight: Any, shape: torch.Size) -> Tensor | None:
    if row_weight is None:
        return None
    checks.floating("row_weight", row_weight)
    if row_weight.shape != shape:
        raise ValueError(
            f"row_weight must have the shape {list(shape)} of the loss with reduction='none', got {list(row_weight.shape)}"
        )
    return row_weight.reshape(-1)


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    logits = (input @ linear_weight.flatten(0, -2).t()).unflatten(1, linear_weight.shape[:-1])
    return logits if linear_bias is None else logits + linear_bias


def _autocast(*tensors: Tensor | None) -> list[Any]:
    first = tensors[0]
    if first is None or not autocasting(first.device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def gathers(options: Any, input: Tensor, target: Tensor) -> bool:
    """Whether ignored rows are dropped: not where a compiler or a transform would have to know how many there are."""
    wanted = getattr(options, "gather_rows", False) and not target.is_floating_point()
    return wanted and not torch.compiler.is_compiling() and not backend.composite(input, target)


def _gather(
    input: Tensor, target: Tensor, row_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    kept = (target != ignore_index).nonzero().squeeze(1)
    return input[kept], target[kept], None if row_weight is None else row_weight[kept], kept


def _spread(rows: Tensor, kept: Tensor | None, shape: torch.Size) -> Tensor:
    """Results of the rows kept among zeros for those left out, in the caller's shape."""
    if kept is not None:
        rows = rows.new_zeros(shape.numel()).index_put((kept,), rows)
    return rows.reshape(shape)


def _check_linear(input: Any, linear_weight: Any, linear_bias: Any, target: Any, vocab_size: int | None = None) -> None:
    """``vocab_size`` is that of all ranks, of which this one may hold nothing; None where ``linear_weight`` is whole."""
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias), ("input", input)):
        if checks.is_dtensor(tensor):
            raise TypeError(
                f"{name} is a DTensor with the placements {tensor.placements}: call the layer itself inside its FSDP "
                "module, which gathers its parameters, pass .full_tensor(), or where the vocabulary is spread over ranks "
                "pass vocab_shard=genloss_kernels.distributed.VocabShard.from_dtensor(linear_weight)"
            )
    checks.floating("input", input)
    checks.floating("linear_weight", linear_weight)
    checks.tensor("target", target)
    if input.dim() < 1:
        raise RuntimeError("input must have shape (..., D), got a 0-d tensor")
    if linear_weight.numel() == 0 and vocab_size is None:
        raise RuntimeError(
            f"linear_weight of shape {list(linear_weight.shape)} is empty: if its parameters are sharded, gather them "
            "first, for example by calling the layer itself inside its FSDP module"
        )
    if linear_weight.dim() < 2:
        raise RuntimeError(f"linear_weight must have shape (V, D), got {list(linear_weight.shape)}")
    if input.size(-1) != linear_weight.size(-1):
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), got "
            f"{input.size(-1)} and {linear_weight.size(-1)}, respectively"
        )
    checks.same_device("linear_weight", linear_weight, input)
    if linear_weight.dtype != input.dtype and not autocasting(input.device):
        raise RuntimeError(f"linear_weight must have the input's dtype, {input.dtype}, but has {linear_weight.dtype}")
    if linear_bias is not None:
        checks.floating("linear_bias", linear_bias)
        if linear_bias.shape != linear_weight.shape[:-1]:
            raise RuntimeError(f"expected linear_bias shape {list(linear_weight.shape[:-1])}, got {list(linear_bias.shape)}")
        checks.same_device("linear_bias", linear_bias, input)
        if linear_bias.dtype != input.dtype and not autocasting(input.device):
            raise RuntimeError(f"linear_bias must have the input's dtype, {input.dtype}, but has {linear_bias.dtype}")
    if linear_weight.dim() > 2:
        if input.dim() != 2:
            raise RuntimeError(
                f"K-dimensional loss defined by linear_weight shape {list(linear_weight.shape)} requires batched input, "
                f"(N, {input.size(-1)}), got {list(input.shape)}"
            )
        return
    n_classes = linear_weight.size(0) if vocab_size is None else vocab_size
    expected = (*input.shape[:-1], n_classes) if target.is_floating_point() else input.shape[:-1]
    if target.shape != torch.Size(expected):
        got, rows = list(target.shape), list(input.shape[:-1])
        if len(got) == len(expected) and got[: len(rows)] != rows:
            raise ValueError(f"Expected input batch_size ({rows}) to match target batch_size ({got[: len(rows)]}).")
        kind = "probabilities" if target.is_floating_point() else "class indices"
        raise RuntimeError(f"target of {kind} must have the shape {list(expected)}, got {list(target.shape)}")
