"""The public cross entropy: check, choose the path, reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import autograd, backend, checks
from ...core.classes import check_class_weight, check_index_target, index_target
from ...core.reduction import Reduction, accumulator, loss_dtype, parse_reduction
from ...core.row_plan import extent
from ...core.widening import few, narrow, wide
from . import made, reference
from .op import CrossEntropy
from .reference import Options

# What torch.nn.functional.cross_entropy calls, without its 2 us of Python.
_torch_cross_entropy = torch._C._nn.cross_entropy_loss  # pyright: ignore[reportAttributeAccessIssue]

# Below this many elements on a CPU the built-in's few calls cost less than ours over blocks, which save memory traffic.
BUILTIN_BELOW = 2**21

_REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


class CrossEntropyStats(NamedTuple):
    """What ``cross_entropy(..., return_stats=True)`` returns.

    ``lse``, ``log_prob`` and ``entropy`` are in nats, fp32 (fp64 for fp64), and have the shape of the ``"none"`` result;
    ``n_valid`` and ``n_correct`` are 0-d int64.
    """

    loss: Tensor
    lse: Tensor
    log_prob: Tensor
    entropy: Tensor
    n_valid: Tensor
    n_correct: Tensor


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
    vocab_shard: Any = None,
) -> Tensor | CrossEntropyStats:
    r"""Cross entropy between logits and class indices or class probabilities.

    With ``y = softcap * tanh(logit_scale * x / softcap)``, the loss of a row is

    .. math::
        \ell = r \Big[ \sum_c q_c \, (\operatorname{lse}(y) - y_c) + z \operatorname{lse}(y)^2 \Big], \qquad
        q_c = w_c \big[ (1 - \epsilon) \, t_c + \epsilon / C \big]

    where t is the one-hot or the given target, w the class weight (of the label, in its own term), epsilon the label
    smoothing, z ``z_loss`` and r ``row_weight``.

    Args:
        input: logits, shape (C), (N, C) or (N, C, d1, ...), in any memory layout; fp32, fp16, bf16 or fp64.
        target: class indices, int64 or uint8, shape (), (N) or (N, d1, ...), or class probabilities, floating point, in
            the shape of the input.
        weight: one non-negative factor a class, shape (C).
        size_average: deprecated, see ``reduction``.
        ignore_index: rows with this label have loss 0 and gradient 0, whatever they hold. Any integer.
        reduce: deprecated, see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. ``mean`` divides by the sum of ``weight[target] * row_weight`` over
            valid rows for indices, and by the sum of ``row_weight`` (plain: the number of rows) for probabilities.
        label_smoothing: mass spread evenly over the classes, in [0, 1].
        softcap: logits are bounded to (-softcap, softcap) as in Gemma 2; positive.
        logit_scale: factor on the logits, before the softcap.
        z_loss: factor of the squared log-sum-exp, added for each valid row and not class-weighted.
        row_weight: factor of each row's whole loss, in the shape of the ``"none"`` result.
        divisor: number or 0-d tensor on the input's device that replaces what ``mean`` divides by, such as the number of
            tokens over all micro-batches.
        inplace_backward: write the gradient over the logits, which must not be a leaf or expanded; saves their memory
            once more. Ignored on the eager path and under ``torch.compile``.
        return_stats: return :class:`CrossEntropyStats` instead of the loss alone.
        vocab_shard: :class:`genloss_kernels.distributed.VocabShard` of this rank where the classes are spread over ranks;
            see *Vocabulary-parallel*.

    Returns:
        0-d tensor for ``mean`` and ``sum``; for ``none`` shape (), (N) or (N, d1, ...). In the input's dtype (fp32 under
        autocast).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: unknown reduction, batch sizes that differ, a softcap that is not positive, a negative z-loss, a divisor
            without ``mean``, a row weight of another shape, or ``inplace_backward`` on a leaf, expanded or overlapping
            input.
        RuntimeError: shapes, dtypes or devices that do not fit, ``label_smoothing`` outside [0, 1].
        IndexError: a class index out of range, on the CPU, or on a GPU under ``GENLOSS_DEBUG=1``. Without that a GPU gives
            the row a loss and a gradient of NaN.

    Vocabulary-parallel:
        With ``vocab_shard`` the class dimension of ``input`` holds this rank's classes alone, or ``input`` is a DTensor
        sharded over it. ``target`` (indices over all classes), ``weight`` and everything else are whole and the same on all
        ranks; so are the results, to the bit, and their upstream gradients. One all-gather in the forward exchanges 8 bytes
        a row and rank (the shard's log-sum-exp and the label's log-probability in it, fp32), 4 more for label smoothing or
        for the plain probabilities beside weighted ones, and 8 for statistics; the backward exchanges nothing. A log-sum-exp
        so rounded is off by what half a unit in its last place would change in the shard's logits. ``target`` and ``weight``
        take no gradient, a second derivative raises RuntimeError, ``inplace_backward`` is ignored, and a shard that does not
        fit raises ValueError. The kernels leave shards of up to 128 classes, and the argmax of statistics, to PyTorch.

    Numerics:
        Arithmetic in fp32, fp64 for fp64. Sums are relative to the row's maximum. ``mean`` over no valid row is NaN, as in
        torch, and ``sum`` 0. The same input gives the same bits.

    Differs from torch:
        NaN in an ignored row stays there. A negative ``label_smoothing`` raises. ``torch`` has no softcap, scale, z-loss,
        row weights, divisor or statistics.

    Source:
        Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, algorithm 3; Szegedy et al., "Rethinking
        the Inception Architecture", 2016, section 7; Chowdhery et al., "PaLM", 2022, section 5 (z-loss); Gemma Team,
        "Gemma 2", 2024, section 2 (softcap); Shoeybi et al., "Megatron-LM", 2019, section 3 (vocabulary-parallel).

    Example:
        >>> import torch, genloss_kernels as gk
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> loss = gk.cross_entropy(logits, torch.tensor([0, 2]))
        >>> round(loss.item(), 4)
        0.8955
    """
    reduction = parse_reduction(reduction, size_average, reduce)
    target = index_target(target)
    if vocab_shard is not None:
        from ..vocab_parallel import sharded

        checks.flag("inplace_backward", inplace_backward)
        return sharded.cross_entropy(
            input, target, weight, ignore_index, reduction, label_smoothing, row_weight, vocab_shard,
            softcap=softcap, logit_scale=logit_scale, z_loss=z_loss, divisor=divisor, return_stats=return_stats,
        )  # fmt: skip
    _check(input, target, weight, ignore_index, reduction, label_smoothing)
    checks.finite("logit_scale", logit_scale)
    checks.finite("z_loss", z_loss)
    checks.flag("inplace_backward", inplace_backward)
    plain = (
        softcap is None
        and logit_scale == 1.0
        and z_loss == 0.0
        and row_weight is None
        and divisor is None
        and not return_stats
    )
    if not plain:
        _check_extras(input, target, softcap, z_loss, row_weight, divisor, reduction, return_stats)
    weight = None if weight is None else weight.contiguous()
    triton = backend.use_triton(input, target, weight, row_weight)
    if plain and not triton and _builtin_is_best(input, target):
        return _builtin(input, target, weight, ignore_index, reduction, label_smoothing)
    if not target.is_floating_point():
        checks.class_indices(target, input.size(1) if input.dim() > 1 else input.size(0), ignore_index)
    in_place = inplace_backward and triton and not torch.compiler.is_compiling()
    if in_place:
        _check_in_place(input)
    tensor_divisor = divisor if isinstance(divisor, Tensor) else None
    options = Options(
        ignore_index,
        float(label_smoothing),
        None if softcap is None else float(softcap),
        float(logit_scale),
        float(z_loss),
        None if divisor is None or tensor_divisor is not None else float(divisor),  # pyright: ignore[reportArgumentType]
        _REDUCTIONS[reduction],
        return_stats,
    )
    single = input.dim() == 1
    if single:
        input = input.unsqueeze(0)
        target = target.reshape(1, -1) if target.is_floating_point() else target.reshape(1)
        row_weight = None if row_weight is None else row_weight.reshape(1)
    dtype = loss_dtype(
        torch.promote_types(input.dtype, target.dtype) if target.is_floating_point() else input.dtype, input.device
    )
    grad = torch.is_grad_enabled()
    if grad and weight is not None and weight.requires_grad and triton:
        if backend.current() == "triton":
            raise RuntimeError("backend 'triton' has no kernel for the gradient of weight: use backend 'auto' or 'eager'")
        triton = False
    weights_learn = grad and any(t is not None and t.requires_grad for t in (row_weight, tensor_divisor))
    class_weight_learns = grad and weight is not None and weight.requires_grad
    composed = weights_learn or class_weight_learns or backend.composite(input, target, weight, row_weight, tensor_divisor)
    # The kernels have no row to read where there is no class.
    if (not triton and composed) or not input.size(1):
        return _by_reference(input, target, weight, row_weight, tensor_divisor, options, dtype, single)
    if weights_learn:
        return _weighted_rows(input, target, weight, row_weight, tensor_divisor, options, dtype, single, in_place)
    row_weight = None if row_weight is None else row_weight.contiguous()
    if triton and grad and not in_place and made.fits(input, target, (weight, row_weight, tensor_divisor), options):
        return made.CrossEntropyMadeInForward.apply(  # pyright: ignore[reportReturnType]
            input, target, weight, row_weight, tensor_divisor, options, dtype
        )
    loss, *stats, _, _ = autograd.apply(
        CrossEntropy,
        input,
        target,
        weight,
        row_weight,
        tensor_divisor,
        *options,
        dtype,
        triton,
        in_place,
    )
    return _result(loss, stats, options, single)


def _weighted_rows(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    divisor: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    single: bool,
    in_place: bool,
) -> Tensor | CrossEntropyStats:
    """The kernels' loss of each row, weighted and reduced by operators through which the weights and the divisor learn."""
    rows = options._replace(reduction=Reduction.NONE, divisor=None)
    acc = accumulator(input.dtype)
    loss, *stats, _, _ = autograd.apply(CrossEntropy, input, target, weight, None, None, *rows, acc, True, in_place)
    class_weight = None if weight is None else weight.to(acc)
    loss, normalizer, _ = reference.weighted(loss, target, class_weight, row_weight, options, input.size(1))
    return _result(reference.reduce(loss, normalizer, divisor, options).to(dtype), stats, options, single)


def _result(loss: Tensor, stats: Sequence[Tensor], options: Options, single: bool) -> Tensor | CrossEntropyStats:
    """What the caller gets: ``stats`` are log-sum-exp, log-probability, entropy and the two counts."""
    if single and options.reduction == Reduction.NONE:
        loss = loss.squeeze(0)
    if not options.stats:
        return loss
    lse, log_prob, entropy, n_valid, n_correct = stats
    if single:
        lse, log_prob, entropy = lse.squeeze(0), log_prob.squeeze(0), entropy.squeeze(0)
    return CrossEntropyStats(loss, lse, log_prob, entropy, n_valid, n_correct)


def _by_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    divisor: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    single: bool,
) -> Tensor | CrossEntropyStats:
    """What the operators cannot do: vmap, forward mode, and gradients of the weights and the divisor."""
    loss, rows = reference.cross_entropy(input, target, weight, row_weight, divisor, options)
    stats = (rows.lse, rows.log_prob, rows.entropy, rows.valid.sum(), rows.correct.sum())
    return _result(loss.to(dtype), stats, options, single)


# With fewer classes than this, or classes that are not contiguous, gathering and scattering rows costs more than it saves.
BUILTIN_CLASSES = 256


def _builtin_is_best(input: Tensor, target: Tensor) -> bool:
    if input.device.type != "cpu" or not backend.plain(input, target):
        return False
    if few(input, BUILTIN_BELOW):
        return True
    classes = min(1, input.dim() - 1)
    few_classes = input.size(classes) < BUILTIN_CLASSES or input.stride(classes) != 1
    return BUILTIN_BELOW > 0 and few_classes and input.dtype in (torch.float32, torch.float64)


def _builtin(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    if not target.is_floating_point() and (ignore_index >= 0 or (target.numel() and int(target.min()) < 0)):
        ignored = target == ignore_index
        if ignored.any():
            input = input.masked_fill(ignored if input.dim() == 1 else ignored.unsqueeze(1), 0.0)
    dtype = torch.promote_types(input.dtype, target.dtype) if target.is_floating_point() else input.dtype
    operands = wide(input), wide(target), wide(weight)
    try:
        return narrow(_torch_cross_entropy(*operands, int(_REDUCTIONS[reduction]), ignore_index, label_smoothing), dtype)
    except IndexError:
        # Torch's message says what it got; ours, what is accepted as well.
        checks.class_indices(target, input.size(min(1, input.dim() - 1)), ignore_index)
        raise


def _check(input: Any, target: Any, weight: Any, ignore_index: Any, reduction: str, label_smoothing: Any) -> None:
    checks.tensor("input", input)
    checks.tensor("target", target)
    checks.one_of("reduction", reduction, _REDUCTIONS)
    checks.integer("ignore_index", ignore_index)
    checks.label_smoothing(label_smoothing)
    if input.dim() == 0:
        raise RuntimeError("input must have shape (C), (N, C) or (N, C, d1, ...), got a 0-d tensor")
    checks.floating("input", input)
    checks.same_device("target", target, input)
    if target.shape == input.shape:
        if not target.is_floating_point():
            raise RuntimeError(
                f"Expected floating point type for target with class probabilities, got {target.dtype}: a target in the "
                "shape of the input holds probabilities; class indices have no class dimension"
            )
        if ignore_index >= 0:
            raise RuntimeError("ignore_index is not supported for floating point target")
    else:
        check_index_target("cross_entropy", input, target)
        if weight is not None:
            checks.tensor("weight", weight)
            checks.no_gradient("weight", weight)
    check_class_weight(weight, input, same_dtype=not target.is_floating_point())


def check(
    input: Tensor,
    target: Any,
    weight: Any,
    ignore_index: Any,
    reduction: str,
    label_smoothing: Any,
    row_weight: Any,
    *,
    softcap: Any,
    logit_scale: Any,
    z_loss: Any,
    divisor: Any,
    return_stats: Any,
) -> None:
    """Every check that needs the shape of the logits and not the logits."""
    _check(input, target, weight, ignore_index, reduction, label_smoothing)
    checks.finite("logit_scale", logit_scale)
    checks.finite("z_loss", z_loss)
    _check_extras(input, target, softcap, z_loss, row_weight, divisor, reduction, return_stats)


def _check_extras(
    input: Tensor,
    target: Tensor,
    softcap: Any,
    z_loss: float,
    row_weight: Any,
    divisor: Any,
    reduction: str,
    return_stats: Any,
) -> None:
    checks.flag("return_stats", return_stats)
    if softcap is not None:
        checks.number("softcap", softcap)
        if not 0.0 < softcap < float("inf"):
            raise ValueError(f"softcap must be positive and finite, got {softcap}: leave it out for no cap")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    if row_weight is not None:
        checks.floating("row_weight", row_weight)
        shape = _rows_shape(input)
        if row_weight.shape != shape:
            raise ValueError(
                f"row_weight must have the shape {list(shape)} of the loss with reduction='none', got "
                f"{list(row_weight.shape)}"
            )
        checks.same_device("row_weight", row_weight, input)
    if divisor is None:
        return
    if reduction != "mean":
        raise ValueError(f"divisor replaces what reduction='mean' divides by, but reduction is {reduction!r}")
    if isinstance(divisor, Tensor):
        if divisor.dim() != 0:
            raise ValueError(f"divisor must be a number or a 0-d tensor, got shape {list(divisor.shape)}")
        if divisor.is_complex():
            raise TypeError(f"divisor must be a real number or 0-d tensor, got {divisor.dtype}")
        checks.same_device("divisor", divisor, input)
    else:
        checks.finite("divisor", divisor)


def _rows_shape(input: Tensor) -> torch.Size:
    return torch.Size((*input.shape[:1], *input.shape[2:])) if input.dim() > 1 else torch.Size(())


def _check_in_place(input: Tensor) -> None:
    if not input.requires_grad:
        return
    if input.is_leaf:
        raise ValueError(
            "inplace_backward=True would write the gradient over a leaf, such as a parameter: leave it out, or pass the "
            "result of an operation"
        )
    if extent(input) is None or input.is_neg():
        raise ValueError(
            "inplace_backward=True cannot write over an expanded, overlapping or lazily negated input, whose elements have "
            "no memory of their own: call .contiguous()"
        )
