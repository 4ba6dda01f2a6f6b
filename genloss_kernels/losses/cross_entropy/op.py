"""Cross entropy's operators: allocate, launch, register; and the autograd.Function that calls them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import autograd
from ...core.launch import WHOLE_ROW, held_loss_tile, launch
from ...core.library import register
from ...core.reduction import Reduction, accumulator, kernel_dtype, launch_reduction
from ...core.row_plan import Plan, gradient_like, incoming, plan
from . import eager, reference
from .reference import Options

SPLIT_STATISTICS = 8


def loss_shape(logits: Tensor) -> tuple[int, ...]:
    return (logits.size(0), *logits.shape[2:])


def _scalars(options: Options) -> tuple[float, float, float, float]:
    return options.label_smoothing, options.logit_scale, options.softcap or 1.0, options.z_loss


def saved_rows(n_cols: int, target: Tensor, weight: Tensor | None, options: Options) -> int:
    """Rows saved: maximum, log of the total and, for labels, the log-probability, unless a tile holds the row.

    And the mass of the coefficients if it varies; for probabilities and statistics, that of the plain target.
    """
    whole = n_cols <= WHOLE_ROW
    if target.is_floating_point():
        return (0 if whole else 2) + (2 if options.stats else 1)
    return (0 if whole else 3) + (1 if options.label_smoothing and weight is not None else 0)


def _launch_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
    options: Options, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    from . import kernels

    probabilities = target.is_floating_point()
    acc = accumulator(logits.dtype)
    rows_shape = loss_shape(logits)
    streams = [logits, target] if probabilities else [logits]
    p = plan(streams, None if probabilities else target, heavy=probabilities or options.stats)
    reduce = options.reduction != Reduction.NONE
    split = p.n_splits > 1

    def new(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    loss = new(dtype=dtype) if reduce else new(*rows_shape, dtype=dtype)
    stats = [new(*rows_shape) if options.stats else new(0) for _ in range(3)]
    counts = [new(dtype=torch.int64) if options.stats else new(0, dtype=torch.int64) for _ in range(2)]
    saved = new(saved_rows(p.n_cols, target, weight, options), p.n_rows)
    by_normalizer = options.by_normalizer(divisor)
    normalizer = new() if by_normalizer else new(0)
    n_partials = p.n_rows if split else p.programs
    partials = (
        new(n_partials) if reduce else None,
        new(n_partials) if by_normalizer else None,
        new(n_partials, dtype=torch.int32) if options.stats else None,
        new(n_partials, dtype=torch.int32) if options.stats else None,
    )
    shares = new(SPLIT_STATISTICS, p.n_rows, p.n_splits) if split else None
    share_indices = new(2, p.n_rows, p.n_splits, dtype=torch.int32) if split else None
    pointers = (
        logits, target, weight, row_weight, None if reduce else loss,
        *(s if options.stats else None for s in stats), saved, partials, shares, share_indices,
    )  # fmt: skip
    flags = {
        "PROBABILITIES": probabilities,
        "SMOOTHING": options.label_smoothing != 0.0,
        "SOFTCAP": options.softcap is not None,
        "STATS": options.stats,
        "REDUCE": reduce,
        "DTYPE": kernel_dtype(acc),
    }
    target_strides = p.strides[1]
    stride_col, target_stride_col = logits.stride(1), target.stride(1) if probabilities else 0
    if p.by_rows:
        launch(
            kernels._cross_entropy_forward_rows_kernel, p.programs * p.n_splits, logits.device,
            *pointers, p.shape, p.strides[0], target_strides, stride_col, target_stride_col,
            p.n_rows, p.n_cols, p.n_splits, p.split_cols, options.ignore_index, *_scalars(options),
            SPLIT=split, VEC=p.vec, RAGGED=p.ragged, BLOCK=p.block, num_warps=p.num_warps, **flags,
        )  # fmt: skip
    else:
        outer, inner = _outer_inner(p)
        launch(
            kernels._cross_entropy_forward_tiles_kernel, p.programs * p.n_splits, logits.device,
            *pointers, outer.shape, outer.strides[0], outer.strides[1], *inner[:2], stride_col, target_stride_col,
            p.shape[-1], -(-p.shape[-1] // p.block_rows), p.n_rows, p.n_cols, p.n_splits, p.split_cols,
            options.ignore_index, *_scalars(options),
            SPLIT=split, WHOLE=p.n_cols <= WHOLE_ROW, BLOCK_ROWS=p.block_rows, BLOCK_COLS=p.block,
            num_warps=p.num_warps, **flags,
        )  # fmt: skip
    if split:
        launch(
            kernels._cross_entropy_merge_kernel, p.n_rows, logits.device,
            *pointers, p.shape, p.strides[0], target_strides, stride_col,
            p.n_rows, p.n_cols, p.n_splits, options.ignore_index, *_scalars(options),
            BLOCK=max(16, 1 << (p.n_splits - 1).bit_length()), num_warps=4, **flags,
        )  # fmt: skip
    if reduce or options.stats:
        launch_reduction(
            partials,
            (
                loss if reduce else None,
                normalizer if by_normalizer else None,
                *(c if options.stats else None for c in counts),
            ),
            n_partials,
            acc,
            divisor=options.number(divisor) if divisor is None else divisor,
            by_normalizer=by_normalizer,
        )
    return loss, *stats, *counts, saved, normalizer


class _Outer(NamedTuple):
    shape: tuple[int, ...]
    strides: list[tuple[int, ...]]


def _outer_inner(p: Plan) -> tuple[_Outer, list[int]]:
    """Split a plan's rows into the innermost dimension, which a tile covers, and the rest."""
    shape = p.shape[:-1] or (1,)
    return _Outer(shape, [s[:-1] or (0,) for s in p.strides]), [s[-1] for s in p.strides]


def _eager_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
    options: Options, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    result = eager.forward(logits, target, weight, row_weight, options)
    loss = reference.reduce(result.loss, result.normalizer, divisor, options).to(dtype)
    empty = [logits.new_empty(0, dtype=accumulator(logits.dtype)) for _ in range(5)]
    own = options.by_normalizer(divisor)
    normalizer = result.normalizer.sum() if own else empty[4]
    if not options.stats:
        counts = [logits.new_empty(0, dtype=torch.int64) for _ in range(2)]
        return loss, *empty[:3], *counts, empty[3], normalizer
    counts = [result.valid.sum(), result.correct.sum()]
    return loss, result.lse, result.log_prob, result.entropy, *counts, empty[3], normalizer


def rows_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, options: Options,
    dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Without the dispatcher: loss, log-sum-exp, log-probability, entropy, the two counts, what is saved, the divisor."""
    run = _launch_forward if triton else _eager_forward
    return run(logits, target, weight, row_weight, None, options, dtype)


def _forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    fixed_divisor: float | None, reduction: int, stats: bool, dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = Options(
        ignore_index, label_smoothing, softcap, logit_scale, z_loss, fixed_divisor, Reduction(reduction), stats
    )
    run = _launch_forward if triton else _eager_forward
    return run(logits, target, weight, row_weight, divisor, options, dtype)


def _forward_fake(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    fixed_divisor: float | None, reduction: int, stats: bool, dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    acc = accumulator(logits.dtype)
    rows_shape = loss_shape(logits)
    n_rows = 1
    for size in rows_shape:
        n_rows = n_rows * size

    def new(*shape: Any, dtype: torch.dtype = acc) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    loss = new(*rows_shape, dtype=dtype) if reduction == Reduction.NONE else new(dtype=dtype)
    rows = [new(*rows_shape) if stats else new(0) for _ in range(3)]
    counts = [new(dtype=torch.int64) if stats else new(0, dtype=torch.int64) for _ in range(2)]
    planes = saved_rows(logits.size(1), target, weight, Options(label_smoothing=label_smoothing, stats=stats))
    saved = new(planes, n_rows) if triton else new(0)
    own = reduction == Reduction.MEAN and divisor is None and fixed_divisor is None
    return loss, *rows, *counts, saved, new() if own else new(0)


def _launch_backward(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
    saved: Tensor, entropy: Tensor, grads: tuple[Tensor | None, ...], options: Options,
    grad_logits: Tensor | None, grad_target: Tensor | None,
) -> None:  # fmt: skip
    from . import kernels

    probabilities = target.is_floating_point()
    acc = accumulator(logits.dtype)
    gradients = [g for g in (grad_logits, grad_target) if g is not None]
    streams = [logits, *([target] if probabilities else []), *gradients]
    stats = any(g is not None for g in grads[1:])
    p = plan(streams, None if probabilities else target, heavy=probabilities or stats)
    strides, cols = iter(p.strides), iter([s.stride(1) for s in streams])
    logits_strides, logits_col = next(strides), next(cols)
    target_strides, target_col = (next(strides), next(cols)) if probabilities else (p.strides[-1], 0)
    grad_strides, grad_col = (next(strides), next(cols)) if grad_logits is not None else (logits_strides, 1)
    grad_target_strides, grad_target_col = (next(strides), next(cols)) if grad_target is not None else (target_strides, 1)
    upstream = [incoming(g) for g in grads]
    pointers = (
        logits, target, weight, row_weight, saved, divisor, *(g for g, _ in upstream), entropy if stats else None,
        logits if grad_logits is None else grad_logits, logits if grad_target is None else grad_target,
        *(stride for _, stride in upstream),
    )  # fmt: skip
    fixed = options.number(divisor)
    flags = {
        "PROBABILITIES": probabilities,
        "SMOOTHING": options.label_smoothing != 0.0,
        "SOFTCAP": options.softcap is not None,
        "STATS": stats,
        "GRAD_LOGITS": grad_logits is not None,
        "GRAD_TARGET": grad_target is not None,
        "DTYPE": kernel_dtype(acc),
    }
    if p.by_rows:
        launch(
            kernels._cross_entropy_backward_rows_kernel, p.programs * p.n_splits, logits.device,
            *pointers, p.shape, logits_strides, target_strides, grad_strides, grad_target_strides,
            logits_col, target_col, grad_col, grad_target_col,
            p.n_rows, p.n_cols, p.n_splits, p.split_cols, options.ignore_index, *_scalars(options), fixed,
            VEC=p.vec, RAGGED=p.ragged, BLOCK=p.block, num_warps=p.num_warps, **flags,
        )  # fmt: skip
    else:
        every = (logits_strides, target_strides, grad_strides, grad_target_strides)
        launch(
            kernels._cross_entropy_backward_tiles_kernel, p.programs * p.n_splits, logits.device,
            *pointers, p.shape[:-1] or (1,), *(s[:-1] or (0,) for s in every), *(s[-1] for s in every),
            logits_col, target_col, grad_col, grad_target_col, p.shape[-1], -(-p.shape[-1] // p.block_rows),
            p.n_rows, p.n_cols, p.n_splits, p.split_cols, options.ignore_index, *_scalars(options), fixed,
            WHOLE=p.n_cols <= WHOLE_ROW, BLOCK_ROWS=p.block_rows, BLOCK_COLS=p.block, num_warps=p.num_warps, **flags,
        )  # fmt: skip


def _backward(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
    saved: Tensor, entropy: Tensor,
    grad_loss: Tensor | None, grad_lse: Tensor | None, grad_log_prob: Tensor | None, grad_entropy: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    fixed_divisor: float | None, need_logits: bool, need_target: bool, triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_logits = gradient_like(logits) if need_logits else None
    grad_target = gradient_like(target) if need_target else None
    options = Options(ignore_index, label_smoothing, softcap, logit_scale, z_loss, fixed_divisor)
    grads = (grad_loss, grad_lse, grad_log_prob, grad_entropy)
    write_gradients(
        logits, target, weight, row_weight, divisor, saved, entropy, grads, options, grad_logits, grad_target, triton
    )
    return (
        logits.new_empty(0) if grad_logits is None else grad_logits,
        logits.new_empty(0) if grad_target is None else grad_target,
    )


def write_gradients(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
    saved: Tensor, entropy: Tensor, grads: tuple[Tensor | None, ...], options: Options,
    grad_logits: Tensor | None, grad_target: Tensor | None, triton: bool,
) -> None:  # fmt: skip
    """Write the gradients into the tensors given; ``grad_logits`` may be the logits themselves."""
    if logits.numel() == 0:
        return
    if triton:
        _launch_backward(
            logits, target, weight, row_weight, divisor, saved, entropy, grads, options, grad_logits, grad_target
        )
    else:
        eager.backward(logits, target, weight, row_weight, divisor, grads, grad_logits, grad_target, options)


def loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
    upstream: Tensor, options: Options, grad_logits: Tensor | None, grad_target: Tensor | None, triton: bool,
) -> Tensor:  # fmt: skip
    """Loss of each row before it is divided; writes the gradients of their mean or sum as :func:`write_gradients` does.

    In one launch where a row is long and not shared among programs.
    """
    if triton and grad_logits is not None and logits.numel():
        loss = _launch_loss_and_gradient(
            logits, target, weight, row_weight, divisor, upstream, options, grad_logits, grad_target
        )
        if loss is not None:
            return loss
    rows = options._replace(reduction=Reduction.NONE, divisor=None)
    loss, *_, saved, _ = rows_forward(logits, target, weight, row_weight, rows, accumulator(logits.dtype), triton)
    grads = (upstream.expand(loss.shape), None, None, None)
    write_gradients(
        logits,
        target,
        weight,
        row_weight,
        divisor,
        saved,
        loss.new_empty(0),
        grads,
        options,
        grad_logits,
        grad_target,
        triton,
    )
    return loss


def _launch_loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
    upstream: Tensor, options: Options, grad_logits: Tensor, grad_target: Tensor | None,
) -> Tensor | None:  # fmt: skip
    from . import kernels

    probabilities = target.is_floating_point()
    acc = accumulator(logits.dtype)
    streams = [t for t in (logits, grad_logits, target if probabilities else None, grad_target) if t is not None]
    coefficients = probabilities or (options.label_smoothing != 0.0 and weight is not None)
    p = plan(streams, None if probabilities else target, heavy=coefficients, twice=True)
    if not p.by_rows or p.n_splits > 1:
        return None
    loss = torch.empty(loss_shape(logits), dtype=acc, device=logits.device)
    pointers = (logits, target, weight, row_weight, divisor, upstream, loss, grad_logits)
    sizes = p.n_rows, p.n_cols, options.ignore_index
    fixed = options.number(divisor)
    flags = {
        "SMOOTHING": options.label_smoothing != 0.0,
        "VEC": p.vec,
        "RAGGED": p.ragged,
        "DTYPE": kernel_dtype(acc),
    }
    held = held_loss_tile(p.n_cols, logits.element_size())
    if held is not None and not coefficients and options.softcap is None and p.vec > 1:
        launch(
            kernels._cross_entropy_loss_and_gradient_held_kernel, p.programs, logits.device,
            *pointers, p.shape, p.strides[0], p.strides[2], p.strides[1], *sizes,
            options.label_smoothing, options.logit_scale, options.z_loss, fixed,
            **flags, BLOCK=held.block, EDGE=2 * p.vec, num_warps=held.num_warps,
        )  # fmt: skip
        return loss
    grad_target_strides = p.strides[3] if grad_target is not None else p.strides[2]
    launch(
        kernels._cross_entropy_loss_and_gradient_kernel, p.programs, logits.device,
        *pointers, logits if grad_target is None else grad_target,
        p.shape, p.strides[0], p.strides[2], p.strides[1], grad_target_strides,
        logits.stride(1), target.stride(1) if probabilities else 0, grad_logits.stride(1),
        1 if grad_target is None else grad_target.stride(1),
        *sizes, *_scalars(options), fixed,
        **flags, PROBABILITIES=probabilities, SOFTCAP=options.softcap is not None, GRAD_TARGET=grad_target is not None,
        BLOCK=p.block, num_warps=p.num_warps,
    )  # fmt: skip
    return loss


def _backward_fake(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
    saved: Tensor, entropy: Tensor,
    grad_loss: Tensor | None, grad_lse: Tensor | None, grad_log_prob: Tensor | None, grad_entropy: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
    fixed_divisor: float | None, need_logits: bool, need_target: bool, triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        gradient_like(logits) if need_logits else logits.new_empty(0),
        gradient_like(target) if need_target else logits.new_empty(0),
    )


_OPTIONS = "int ignore_index, float label_smoothing, float? softcap, float logit_scale, float z_loss, float? fixed_divisor"
_TENSORS = "Tensor logits, Tensor target, Tensor? weight, Tensor? row_weight, Tensor? divisor"

cross_entropy_forward = register(
    f"cross_entropy_forward({_TENSORS}, {_OPTIONS}, int reduction, bool stats, ScalarType dtype, bool triton)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
cross_entropy_backward = register(
    f"cross_entropy_backward({_TENSORS}, Tensor saved, Tensor entropy, Tensor? grad_loss, Tensor? grad_lse, "
    f"Tensor? grad_log_prob, Tensor? grad_entropy, {_OPTIONS}, bool need_logits, bool need_target, bool triton)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class CrossEntropy(torch.autograd.Function):
    """Cross entropy of logits (N, C, d1, ...) with the hand-written backward.

    Returns loss, lse, log-probability, entropy and the two counts; then what only the backward needs.
    """

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
        ignore_index: int, label_smoothing: float, softcap: float | None, logit_scale: float, z_loss: float,
        fixed_divisor: float | None, reduction: int, stats: bool, dtype: torch.dtype, triton: bool, in_place: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return cross_entropy_forward(
            logits, target, weight, row_weight, divisor,
            ignore_index, label_smoothing, softcap, logit_scale, z_loss, fixed_divisor, reduction, stats, dtype, triton,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, weight, row_weight, divisor, *scalars, reduction, stats, _, triton, in_place = inputs
        _, _, _, entropy, n_valid, n_correct, saved, normalizer = output
        ctx.mark_non_differentiable(n_valid, n_correct, saved, normalizer)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, row_weight, divisor, saved, normalizer, entropy)
        ctx.options = Options._make((*scalars, reduction, stats))
        ctx.triton, ctx.in_place = triton, in_place

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, weight, row_weight, divisor, saved, normalizer, entropy = ctx.saved_tensors
        options: Options = ctx.options
        need_logits, need_target = ctx.needs_input_grad[:2]
        nothing = (None,) * 14
        # A compiled graph hands over gradients of statistics that were not asked for, and are empty.
        upstream = grads[:4] if options.stats else (grads[0], None, None, None)
        if all(g is None for g in upstream):
            return None, None, *nothing
        if torch.is_grad_enabled():
            if ctx.in_place:
                raise RuntimeError(
                    "inplace_backward=True cannot be differentiated twice: its backward overwrites the logits. "
                    "Leave inplace_backward out where create_graph=True"
                )
            return *reference_gradients(
                logits, target, weight, row_weight, divisor, options, upstream, need_logits, need_target
            ), *nothing
        own = options.by_normalizer(divisor)
        effective = normalizer if own else divisor
        if ctx.in_place and need_logits:
            grad_target = gradient_like(target) if need_target else None
            write_gradients(
                logits, target, weight, row_weight, effective, saved, entropy, upstream, options,
                logits, grad_target, ctx.triton,
            )  # fmt: skip
            torch.autograd.graph.increment_version(logits)
            return logits.detach(), grad_target, *nothing
        grad_logits, grad_target = cross_entropy_backward(
            logits, target, weight, row_weight, effective, saved, entropy, *upstream,
            options.ignore_index, options.label_smoothing, options.softcap, options.logit_scale, options.z_loss,
            options.divisor, need_logits, need_target, ctx.triton,
        )  # fmt: skip
        return grad_logits if need_logits else None, grad_target if need_target else None, *nothing


def reference_gradients(
    logits: Tensor, target: Tensor, weight: Tensor | None, row_weight: Tensor | None, divisor: Tensor | None,
    options: Options, grads: tuple[Tensor | None, ...], need_logits: bool, need_target: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Differentiable gradients: the reference's, so that they can be differentiated again."""
    logits, target = autograd.apart((logits, target))
    loss, rows = reference.cross_entropy(logits, target, weight, row_weight, divisor, options)
    outputs = (loss, rows.lse, rows.log_prob, rows.entropy)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    wanted = [t for t, need in ((logits, need_logits), (target, need_target)) if need]
    result = iter(
        torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return next(result) if need_logits else None, next(result) if need_target else None
