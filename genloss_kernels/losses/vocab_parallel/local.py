"""One rank's part: the statistics of its logits by cross entropy's own code, and the gradient that comes back to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.launch import WHOLE_ROW
from ...core.reduction import Reduction, accumulator
from ..cross_entropy import eager, op, reference
from ..cross_entropy.eager import RowGradients
from ..cross_entropy.reference import Options
from . import merge
from .merge import Head, Whole, hits, holders, planes

_IGNORED = -1


class Local(NamedTuple):
    """Target and class weight cut to this rank's classes; with the options cross entropy smooths as over all of them.

    It divides the smoothing by the classes that it sees, which takes another smoothing and, for probabilities, a ``scale``
    of its coefficients. A label that another rank holds stands here as class 0, whose log-probability is not used.
    """

    target: Tensor
    weight: Tensor | None
    options: Options
    scale: float


def localise(head: Head) -> Local:
    target, weight, options, layout = head
    weight = None if weight is None else weight[layout.start : layout.start + layout.size]
    formula = options._replace(z_loss=0.0, divisor=None, reduction=Reduction.NONE)
    uniform = options.label_smoothing * layout.size / layout.vocab_size
    if not target.is_floating_point():
        label = torch.where(holders(target, layout)[layout.rank], target - layout.start, 0)
        label = torch.where(target == options.ignore_index, _IGNORED, label)
        return Local(label, weight, formula._replace(ignore_index=_IGNORED, label_smoothing=uniform), 1.0)
    scale = 1.0 - options.label_smoothing + uniform
    part = target[:, layout.start : layout.start + layout.size]
    return Local(part, weight, formula._replace(label_smoothing=uniform / scale if uniform else 0.0), scale)


def statistics(logits: Tensor, head: Head, *, triton: bool) -> Tensor:
    """This rank's planes (planes, rows...)."""
    names = planes(*head[:3])
    if not logits.numel():
        rows = (logits.size(0), *logits.shape[2:])
        result = logits.new_zeros((len(names), *rows), dtype=accumulator(logits.dtype))
        for name in ("lse", "top"):
            if name in names:
                result[names.index(name)] = -float("inf")
        return result
    by_name, best = (_by_kernels if triton else _by_operators)(logits, localise(head))
    if best is not None:
        by_name["top"] = _top(logits, best, head)
    result = torch.stack([by_name[name] for name in names])
    # Where every logit of this rank is -inf its softmax is NaN; its share is 0, and so is all that it adds.
    moments = slice(1, names.index("top") if "top" in names else None)
    result[moments].masked_fill_(result[0] == -float("inf"), 0.0)
    return result


def _by_operators(logits: Tensor, local: Local) -> tuple[dict[str, Tensor], Tensor | None]:
    # Any z-loss has the sums include the log-sum-exp.
    sums = eager.sums(logits, local.target, local.weight, local.options._replace(z_loss=1.0))
    spread = None if sums.spread is None else sums.spread * local.scale
    named = {"lse": sums.lse, "target": sums.log_prob, "entropy": sums.entropy, "spread": spread}
    return {name: s for name, s in named.items() if s is not None}, sums.best


def _by_kernels(logits: Tensor, local: Local) -> tuple[dict[str, Tensor], Tensor | None]:
    # Only with statistics do the kernels store a row's log-sum-exp and log-probability.
    options, scale = local.options._replace(stats=True), -local.scale
    if not local.target.is_floating_point() and options.label_smoothing:
        # The loss is then the sum over classes alone, divided by their number.
        options, scale = options._replace(label_smoothing=1.0), -float(logits.size(1))
    loss, lse, log_prob, entropy, *_ = op.rows_forward(
        logits, local.target, local.weight, None, options, accumulator(logits.dtype), True
    )
    named = {"lse": lse, "target": log_prob, "entropy": entropy, "spread": loss * scale}
    return named, reference.transform(logits, options).argmax(1) if local.options.stats else None


def _top(logits: Tensor, best: Tensor, head: Head) -> Tensor:
    top = reference.transform(logits.gather(1, best.unsqueeze(1)).squeeze(1), head.options)
    label, layout = hits(head.target), head.layout
    other = holders(label, layout)[layout.rank] & (best != label - layout.start)
    return torch.where(other, -float("inf"), top)


def write_gradient(
    logits: Tensor, head: Head, gathered: Tensor, grads: tuple[Tensor | None, ...], grad_logits: Tensor, *, triton: bool
) -> None:
    """Write this rank's gradient, from those of the rows' loss, lse, log-probability and entropy over all classes.

    It may take the logits' place on the kernels' path.
    """
    if not logits.numel():
        return
    target, weight, options, layout = head
    shape = [*logits.shape]
    shape[1] = layout.vocab_size
    every = logits.new_empty(()).expand(shape)
    weight = None if weight is None else weight.to(accumulator(logits.dtype))
    rows = eager.row_gradients(every, target, weight, None, None, grads, options)
    whole = merge.whole(gathered, head)
    # Tiles of whole rows find the log-sum-exp anew, which would be that of this rank alone.
    if triton and layout.size > WHOLE_ROW:
        _write_by_kernels(logits, head, whole, gathered, rows, grad_logits)
    else:
        _write_by_operators(logits, head, whole, gathered, rows, grad_logits)


def _write_by_operators(
    logits: Tensor, head: Head, whole: Whole, gathered: Tensor, rows: RowGradients, grad_logits: Tensor
) -> None:
    """Cross entropy's gradient by a softmax of this rank's logits, whose probabilities times its share are the row's."""
    rank, options = head.layout.rank, head.options
    log_share, dead = whole.log_share[rank], gathered[rank, 0] == -float("inf")
    share = log_share.exp()
    of_probability = _of_probability(rows, whole, options)
    if rows.entropy is not None:
        assert whole.surplus is not None
        assert whole.sums.entropy is not None
        of_probability = of_probability + rows.entropy * (whole.surplus[rank] - whole.sums.entropy)
        rows = rows._replace(entropy=rows.entropy * share)
    part = localise(head)
    if rows.of_label is not None:
        rows = rows._replace(
            label=part.target.clamp(min=0), of_label=torch.where(whole.masses.target_held[rank], rows.of_label, 0.0)
        )
    # Where every logit here is -inf the probabilities are 0, which a softmax of them alone does not say.
    ignored = dead if rows.ignored is None else rows.ignored | dead
    rows = rows._replace(loss=rows.loss * part.scale, of_probability=of_probability * share, ignored=ignored)
    eager.write(logits, part.target, part.weight, rows, grad_logits, None, part.options)


def _of_probability(rows: RowGradients, whole: Whole, options: Options) -> Tensor:
    result = rows.of_probability
    if result is None:
        result = eager.of_probabilities(rows, whole.masses.spread.sum(0), whole.masses.target.sum(0))
    return result + eager.of_z_loss(rows, whole.lse, options) if options.z_loss else result


def _write_by_kernels(
    logits: Tensor, head: Head, whole: Whole, gathered: Tensor, rows: RowGradients, grad_logits: Tensor
) -> None:
    """Cross entropy's backward kernel, given in place of what its forward saves the same of all classes."""
    rank, options = head.layout.rank, head.options
    part = localise(head)
    lse, log_share = gathered[rank, 0], whole.log_share[rank]
    dead = lse == -float("inf")
    maximum = torch.where(dead, 0.0, lse)
    if rows.outside is not None:
        # As the forward says of a label out of range: NaN reaches the whole row.
        maximum = torch.where(rows.outside, float("nan"), maximum)
    of_probability = _of_probability(rows, whole, options)
    target, of_target, zero = part.target, rows.log_prob, torch.zeros_like(lse)
    # What the kernel would add for the mass of the target is in ``of_probability``, so that the planes of masses are 0.
    saved = [maximum, torch.where(dead, whole.lse, -log_share)]
    if rows.of_label is None:
        saved += [zero, zero]
    else:
        assert whole.sums.log_prob is not None
        own = whole.masses.target_held[rank]
        target = torch.where(own | (target == _IGNORED), target, head.layout.size)
        label_weight, mass = zero + 1.0, zero + 1.0
        saved += [whole.sums.log_prob]
        if part.weight is not None:
            label_weight = part.weight.to(lse.dtype)[part.target.clamp(min=0)]
            mass = torch.where(own, label_weight, 0.0)
            if options.label_smoothing:
                saved, mass = [*saved, zero], zero
        of_target = rows.loss * (1.0 - part.options.label_smoothing) * label_weight - rows.of_label
        of_target = torch.where(own, of_target, 0.0)
        of_probability = of_probability - rows.loss * mass + of_target
    entropy = saved[0] if rows.entropy is None else whole.sums.entropy
    assert entropy is not None
    op.write_gradients(
        logits, target, part.weight, None, None, torch.stack(saved), entropy,
        (rows.loss * part.scale, of_probability, of_target, rows.entropy), part.options, grad_logits, None, True,
    )  # fmt: skip
