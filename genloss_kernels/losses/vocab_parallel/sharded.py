"""What ``vocab_shard`` does to the public losses: unwrap, check against the whole vocabulary, run, reduce."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core import autograd, backend, checks
from ...core.reduction import Reduction, loss_dtype
from ...core.witness import witnessed
from ..cross_entropy import api as cross_entropy_api
from ..cross_entropy import reference
from ..cross_entropy.api import CrossEntropyStats
from ..cross_entropy.reference import Options
from ..linear_cross_entropy import api as linear_api
from ..linear_cross_entropy.chunks import Head as LinearHead
from ..linear_cross_entropy.options import accumulation, rows_at_a_time
from . import collectives, linear
from .linear_op import ReducedVocabParallelLinear, VocabParallelLinearRows, mask_of
from .op import VocabParallelCrossEntropy
from .shard import Layout, VocabShard

__all__ = ["VocabShard", "cross_entropy", "linear_cross_entropy"]

_REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    row_weight: Tensor | None,
    vocab_shard: Any,
    **loss_options: Any,
) -> Tensor | CrossEntropyStats:
    """Cross entropy of this rank's logits; arguments as in the public function."""
    shard = _shard(vocab_shard)
    checks.tensor("input", input)
    dim = min(1, input.dim() - 1)
    input = _unwrapped("input", input, shard, dim)
    target, weight, row_weight = _replicated(shard, target=target, weight=weight, row_weight=row_weight)
    checks.floating("input", input)
    if input.dim() == 0:
        raise RuntimeError("input must have shape (C), (N, C) or (N, C, d1, ...), got a 0-d tensor")
    layout = shard._fitting("input", input.size(dim), input.device)
    _check(input, dim, target, weight, ignore_index, reduction, label_smoothing, row_weight, layout, loss_options)
    formula, divisor = _formula(ignore_index, label_smoothing, reduction, loss_options)
    _compare(layout, formula, target, input)
    weight = None if weight is None else weight.contiguous()
    triton = backend.use_triton(input, target, weight, row_weight)
    single = input.dim() == 1
    if single:
        input = input.unsqueeze(0)
        target = target.reshape(1, -1) if target.is_floating_point() else target.reshape(1)
        row_weight = None if row_weight is None else row_weight.reshape(1)
    dtype = loss_dtype(
        torch.promote_types(input.dtype, target.dtype) if target.is_floating_point() else input.dtype, input.device
    )
    loss, lse, log_prob, entropy, correct, *_ = autograd.apply(
        VocabParallelCrossEntropy, input, target, weight, *formula[:5], formula.stats, triton, *_plain(layout)
    )
    loss, normalizer, valid = _weighted(loss, target, weight, row_weight, formula, layout)
    loss = reference.reduce(loss, normalizer, divisor, formula).to(dtype)
    return cross_entropy_api._result(loss, (lse, log_prob, entropy, valid.sum(), correct.sum()), formula, single)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    options: Any,
    row_weight: Tensor | None,
    vocab_shard: Any,
    **loss_options: Any,
) -> Tensor | CrossEntropyStats:
    """Linear cross entropy with this rank's rows of the linear layer; arguments as in the public function."""
    shard = _shard(vocab_shard)
    checks.tensor("linear_weight", linear_weight)
    linear_weight = _unwrapped("linear_weight", linear_weight, shard, 0)
    linear_bias = None if linear_bias is None else _unwrapped("linear_bias", linear_bias, shard, 0)
    input, target, weight, row_weight = _replicated(shard, input=input, target=target, weight=weight, row_weight=row_weight)
    checks.floating("input", input)
    checks.floating("linear_weight", linear_weight)
    if linear_weight.dim() != 2:
        raise RuntimeError(f"vocab_shard needs a linear_weight of shape (V, D), got {list(linear_weight.shape)}")
    layout = shard._fitting("linear_weight", linear_weight.size(0), input.device)
    linear_api._check_linear(input, linear_weight, linear_bias, target, layout.vocab_size)
    probabilities = target.is_floating_point()
    if probabilities and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    ignore_index = -100 if ignore_index is None else ignore_index
    given = (input, linear_weight, linear_bias)
    rows_shape = input.shape[:-1]
    flat = input.reshape(-1, input.size(-1))
    target = target.reshape(-1, layout.vocab_size) if probabilities else target.reshape(-1)
    row_weight = linear_api._flat_row_weight(row_weight, rows_shape)
    _check(flat, 1, target, weight, ignore_index, reduction, label_smoothing, row_weight, layout, loss_options)
    formula, divisor = _formula(ignore_index, label_smoothing, reduction, loss_options)
    _compare(layout, formula, target, flat, linear_weight, linear_bias)
    weight = None if weight is None else weight.contiguous()
    triton = backend.use_triton(flat, linear_weight, linear_bias, target if probabilities else None, weight, row_weight)
    flat, linear_weight, linear_bias = linear_api._autocast(flat, linear_weight, linear_bias)
    dtype = loss_dtype(torch.promote_types(input.dtype, target.dtype) if probabilities else input.dtype, input.device)
    kept = None
    if linear_api.gathers(options, flat, target):
        flat, target, row_weight, kept = linear_api._gather(flat, target, row_weight, ignore_index)
    # Every rank must cut the batch alike, so that a budget is that of the largest shard.
    most = rows_at_a_time(options, max(layout.sizes), flat, triton=triton)
    sum_dtype = accumulation(options, flat.dtype)
    head = LinearHead(flat, linear_weight, linear_bias, target, weight, row_weight, divisor)
    loss, stats = _compute(head, formula, layout, shard.reduce_input_grad, most, sum_dtype, dtype, triton=triton)
    loss = witnessed(linear_api._spread(loss, kept, rows_shape) if reduction == "none" else loss, *given)
    if not formula.stats:
        return loss
    lse, log_prob, entropy, n_valid, n_correct = stats
    lse, log_prob, entropy = (witnessed(linear_api._spread(s, kept, rows_shape), *given) for s in (lse, log_prob, entropy))
    return CrossEntropyStats(loss, lse, log_prob, entropy, n_valid, n_correct)


def _compute(
    head: LinearHead,
    formula: Options,
    layout: Layout,
    reduce_input_grad: bool,
    most: int,
    sum_dtype: torch.dtype,
    dtype: torch.dtype,
    *,
    triton: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    grad = torch.is_grad_enabled()
    needed = tuple(grad and t is not None and t.requires_grad for t in head[:3])
    weights_learn = grad and any(t is not None and t.requires_grad for t in (head.row_weight, head.divisor))
    plain = _plain(layout)
    if linear_api.makes_gradients(formula, head.input.dtype) and not weights_learn and any(needed):
        loss, *_ = autograd.apply(
            ReducedVocabParallelLinear, *head, *formula[:6], int(formula.reduction), most, sum_dtype, mask_of(needed), dtype,
            triton, *plain, reduce_input_grad,
        )  # fmt: skip
        return loss, ()
    loss, lse, log_prob, entropy, correct, *_ = autograd.apply(
        VocabParallelLinearRows, *head[:5], *formula[:5], formula.stats, most, sum_dtype, triton, *plain, mask_of(needed),
        reduce_input_grad,
    )  # fmt: skip
    loss, normalizer, valid = linear.weighted(loss, head, formula, layout)
    loss = reference.reduce(loss, normalizer, head.divisor, formula).to(dtype)
    return loss, (lse, log_prob, entropy, valid.sum(), correct.sum())


def _plain(layout: Layout) -> tuple[list[int], list[int], int, str]:
    return list(layout.starts), list(layout.sizes), layout.rank, layout.group


def _shard(vocab_shard: Any) -> VocabShard:
    if not isinstance(vocab_shard, VocabShard):
        raise TypeError(
            f"vocab_shard must be a genloss_kernels.distributed.VocabShard, not {type(vocab_shard).__name__}: make one by "
            "VocabShard(start, group), VocabShard.even(vocab_size, group) or VocabShard.from_dtensor(weight)"
        )
    return vocab_shard


def _unwrapped(name: str, tensor: Any, shard: VocabShard, dim: int) -> Any:
    """This rank's part of a DTensor that is sharded over the vocabulary; a plain tensor is that already."""
    if not checks.is_dtensor(tensor):
        return tensor
    placements = tensor.placements
    sharded = [p for p in placements if not p.is_replicate()]
    if len(sharded) != 1 or not sharded[0].is_shard(dim % max(1, tensor.dim())):
        raise ValueError(
            f"{name} is a DTensor with the placements {placements}, where vocab_shard wants Shard({dim}) over the ranks of "
            f"{shard}: redistribute it, or pass {name}.to_local() of one that is"
        )
    return tensor.to_local()


def _replicated(shard: VocabShard, **tensors: Any) -> list[Any]:
    """What must be the same on every rank: a replicated DTensor's own copy, or a plain tensor."""
    found = []
    for name, tensor in tensors.items():
        if checks.is_dtensor(tensor):
            if not all(p.is_replicate() for p in tensor.placements):
                raise ValueError(
                    f"{name} is a DTensor with the placements {tensor.placements}, but must be the same on all ranks of "
                    f"{shard}: pass {name}.full_tensor()"
                )
            found.append(tensor.to_local())
        else:
            found.append(tensor)
    return found


def _check(
    input: Tensor, dim: int, target: Any, weight: Any, ignore_index: Any, reduction: str, label_smoothing: Any,
    row_weight: Any, layout: Layout, loss_options: dict[str, Any],
) -> None:  # fmt: skip
    if backend.composite(input):
        raise RuntimeError("vocab_shard cannot be used under torch.func's transforms, forward-mode AD or torch.export")
    shape = [*input.shape]
    shape[dim] = layout.vocab_size
    # Everything is checked as for logits of all classes, of which the shape is enough.
    like = input.new_empty(()).expand(shape)
    cross_entropy_api.check(like, target, weight, ignore_index, reduction, label_smoothing, row_weight, **loss_options)
    for name, tensor in (("weight", weight), ("target", target)):
        if tensor is not None:
            checks.no_gradient(name, tensor)
    if not target.is_floating_point():
        checks.class_indices(target, layout.vocab_size, ignore_index)


def _compare(layout: Layout, formula: Options, target: Tensor, *learning: Tensor | None) -> None:
    """Under ``GENLOSS_DEBUG=1``, raise on every rank where the ranks' calls differ, which would hang or abort."""
    if not backend.debug() or torch.compiler.is_compiling():
        return
    grad = torch.is_grad_enabled()
    asked: dict[str, Any] = {
        "rows": target.numel() // (layout.vocab_size if target.is_floating_point() else 1),
        "gradients wanted": sum((grad and t is not None and t.requires_grad) << k for k, t in enumerate(learning)),
        **{name: getattr(formula, name) for name in formula._fields if name != "divisor"},
    }
    own = torch.tensor([math.nan if v is None else float(v) for v in asked.values()], dtype=torch.float64)
    everyone = collectives.all_gather(own.nan_to_num(-1.0).to(target.device), layout.ranks, layout.group).tolist()
    for name, values in zip(asked, zip(*everyone, strict=True), strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"vocab_shard: the ranks' calls differ in {name}, which in their order is {values}")


def _formula(
    ignore_index: int, label_smoothing: float, reduction: str, loss_options: dict[str, Any]
) -> tuple[Options, Tensor | None]:
    """The options, and the divisor if it is a tensor."""
    softcap, divisor = loss_options["softcap"], loss_options["divisor"]
    of_tensor = divisor if isinstance(divisor, Tensor) else None
    fixed = None if divisor is None or of_tensor is not None else float(divisor)
    return Options(
        ignore_index,
        float(label_smoothing),
        None if softcap is None else float(softcap),
        float(loss_options["logit_scale"]),
        float(loss_options["z_loss"]),
        fixed,
        _REDUCTIONS[reduction],
        loss_options["return_stats"],
    ), of_tensor


def _weighted(
    loss: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, formula: Options, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    weight = None if weight is None else weight.to(loss.dtype)
    return reference.weighted(loss, target, weight, row_weight, formula, layout.vocab_size)
