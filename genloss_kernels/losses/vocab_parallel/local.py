"""One rank's part: the statistics of its logits by cross entropy's own code, and the gradient that comes back to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.reduction import Reduction, accumulator
from ..cross_entropy import eager, op, reference
from ..cross_entropy.reference import Options
from .merge import Coefficients, Head, hits, holders, planes

_IGNORED = -1


class Local(NamedTuple):
    """Target and class weight cut to this rank's classes, and the options that make cross entropy sum what is sent.

    A label that another rank holds stands here as class 0, whose log-probability is not used. ``scale`` is the sum of
    ``q * log p`` over cross entropy's loss.
    """

    target: Tensor
    weight: Tensor | None
    options: Options
    scale: float


def localise(head: Head) -> Local:
    target, weight, options, layout = head
    weight = None if weight is None else weight[layout.start : layout.start + layout.size]
    formula = options._replace(z_loss=0.0, divisor=None, reduction=Reduction.NONE)
    if not target.is_floating_point():
        label = torch.where(holders(target, layout)[layout.rank], target - layout.start, 0)
        label = torch.where(target == options.ignore_index, _IGNORED, label)
        # All of the loss is then the sum over classes, divided by their number.
        spread = 1.0 if options.label_smoothing else 0.0
        return Local(label, weight, formula._replace(ignore_index=_IGNORED, label_smoothing=spread), -float(layout.size))
    # Cross entropy divides the smoothing by the classes that it sees.
    uniform = options.label_smoothing * layout.size / layout.vocab_size
    scale = 1.0 - options.label_smoothing + uniform
    smoothing = uniform / scale if uniform else 0.0
    return Local(
        target[:, layout.start : layout.start + layout.size], weight, formula._replace(label_smoothing=smoothing), -scale
    )


def statistics(logits: Tensor, head: Head, *, triton: bool) -> tuple[Tensor, Tensor]:
    """This rank's planes (planes, rows...), and what the kernels' backward wants to have saved."""
    names = planes(*head[:3])
    rows, dtype = (logits.size(0), *logits.shape[2:]), accumulator(logits.dtype)
    if not head.layout.size:
        result = logits.new_zeros((len(names), *rows), dtype=dtype)
        for name in ("lse", "top"):
            if name in names:
                result[names.index(name)] = -float("inf")
        return result, logits.new_empty(0, dtype=dtype)
    local = localise(head)
    found = _by_kernels(logits, local) if triton else _by_operators(logits, local)
    if head.options.stats:
        found.by_name["top"] = _top(logits, found.best, head, local.options)
    result = torch.stack([found.by_name[name] for name in names])
    # Where every logit of this rank is -inf its softmax is NaN; its share is 0, and so is all that it adds.
    moments = slice(1, names.index("top") if "top" in names else None)
    result[moments].masked_fill_(result[0] == -float("inf"), 0.0)
    return result, found.saved


class _Found(NamedTuple):
    by_name: dict[str, Tensor]
    best: Tensor | None
    saved: Tensor


def _by_operators(logits: Tensor, local: Local) -> _Found:
    if not logits.numel():
        empty = logits.new_empty((logits.size(0), *logits.shape[2:]), dtype=accumulator(logits.dtype))
        return _Found(dict.fromkeys(("lse", "target", "spread", "entropy"), empty), empty, empty.new_empty(0))
    # Any z-loss has the sums include the log-sum-exp.
    sums = eager.sums(logits, local.target, local.weight, local.options._replace(z_loss=1.0))
    assert sums.lse is not None
    named = {"lse": sums.lse, "target": sums.log_prob, "entropy": sums.entropy, "spread": sums.spread}
    if local.target.is_floating_point() and sums.spread is not None:
        named["spread"] = sums.spread * -local.scale
    return _Found({name: s for name, s in named.items() if s is not None}, sums.best, sums.lse.new_empty(0))


def _by_kernels(logits: Tensor, local: Local) -> _Found:
    # Only with statistics do the kernels store a row's log-sum-exp and log-probability.
    loss, lse, log_prob, entropy, _, _, saved, _ = op.rows_forward(
        logits, local.target, local.weight, None, local.options._replace(stats=True), accumulator(logits.dtype), True
    )
    named = {"lse": lse, "target": log_prob, "entropy": entropy, "spread": loss * local.scale}
    return _Found(named, reference.transform(logits, local.options).argmax(1) if local.options.stats else None, saved)


def _top(logits: Tensor, best: Tensor | None, head: Head, options: Options) -> Tensor:
    assert best is not None
    if not logits.numel():
        return best
    top = reference.transform(logits.gather(1, best.unsqueeze(1)).squeeze(1), options)
    label, layout = hits(head.target), head.layout
    other = holders(label, layout)[layout.rank] & (best != label - layout.start)
    return torch.where(other, float("nan"), top)


def write_gradient(
    logits: Tensor, head: Head, planes_here: Tensor, saved: Tensor, by_plane: Coefficients, grad_logits: Tensor, *, triton: bool
) -> None:
    """Write this rank's gradient from the derivatives by its planes; it may take the logits' place."""
    if not logits.numel():
        return
    local = localise(head)
    names = planes(*head[:3])
    target = local.target
    if not target.is_floating_point():
        # Where every logit here is -inf, the probabilities are 0, which a softmax of them alone does not say.
        target = torch.where(planes_here[0] == -float("inf"), _IGNORED, target)
    entropy = planes_here[names.index("entropy")] if "entropy" in names else saved.new_empty(0)
    of_loss = None if by_plane.spread is None else by_plane.spread * local.scale
    grads = (of_loss, by_plane.lse, by_plane.target, by_plane.entropy)
    op.write_gradients(
        logits, target, local.weight, None, None, saved, entropy, grads, local.options, grad_logits, None, triton
    )
