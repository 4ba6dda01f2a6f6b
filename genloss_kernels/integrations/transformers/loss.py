"""The loss of a causal language model, as transformers calls it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ... import functional as F


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: int | float | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    r"""Cross entropy of each token's logits and the token after it, in the form of ``model.loss_function``.

    .. math::
        \frac{1}{n} \sum_{b, i} \mathrm{cross\_entropy}(x_{b, i}, t_{b, i + 1})

    where n is ``num_items_in_batch``, or the number of labels that are not ignored.

    Args:
        logits: shape (..., T, V), in any memory layout; fp32, fp16, bf16 or fp64. Neither copied nor written to.
        labels: token ids, int64, shape (..., T), as the model read them: they are shifted here. Ignored, and may be None,
            where ``shift_labels`` is given.
        vocab_size: V, which is checked; None to accept any.
        num_items_in_batch: what the sum is divided by: a number, or a tensor of one element on any device, such as the
            count of labels over all micro-batches and ranks.
        ignore_index: rows with this label have loss 0 and gradient 0.
        shift_labels: token ids that are shifted already, shape (..., T).
        kwargs: what models hand on to their loss and no loss reads, ignored as transformers does.

    Returns:
        0-d tensor, fp32 for half precision too; fp64 for fp64.

    Raises:
        ValueError: logits whose last dimension is not ``vocab_size``, labels of another shape than the logits' rows, or a
            ``num_items_in_batch`` of several numbers.
        TypeError: neither ``labels`` nor ``shift_labels``, or an argument that is no tensor.
        IndexError: a label out of range, as in :func:`genloss_kernels.cross_entropy`.

    Numerics:
        As :func:`genloss_kernels.cross_entropy`. With no label left, NaN, and 0 if ``num_items_in_batch`` is positive.

    Differs from transformers:
        Half-precision logits are read as they are, where transformers copies them to fp32. fp64 stays fp64.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> loss = gk.integrations.transformers.causal_lm_loss(torch.zeros(1, 3, 4), torch.tensor([[1, 2, 3]]), 4)
        >>> round(loss.item(), 4)
        1.3863
    """
    for name, value in (("logits", logits), ("labels", labels), ("shift_labels", shift_labels)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, not {type(value).__name__}")
    target = next_tokens(logits.shape[:-1], labels, shift_labels, ignore_index)
    check_vocab_size(logits.size(-1), vocab_size)
    target, divisor = target.to(logits.device), as_divisor(num_items_in_batch, logits.device)
    if logits.is_contiguous():
        logits, target = logits.flatten(0, -2), target.flatten()
    else:
        logits = logits.movedim(-1, 1)  # a view, where flattening would copy
    with loss_in_float32(logits):
        return F.cross_entropy(logits, target, ignore_index=ignore_index, divisor=divisor)  # pyright: ignore[reportReturnType]


def next_tokens(rows: torch.Size, labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """The label of each row: shifting these leaves the logits, V times as large, where they are."""
    if shift_labels is None:
        if labels is None:
            raise TypeError("causal_lm_loss needs labels or shift_labels, and both are None")
        if labels.shape != rows:
            raise ValueError(
                f"labels must have the shape {list(rows)} of the logits without classes, got {list(labels.shape)}"
            )
        return torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.numel() != rows.numel():
        raise ValueError(
            f"shift_labels must have the shape {list(rows)} of the logits without classes, got {list(shift_labels.shape)}"
        )
    return shift_labels.reshape(rows)


def check_vocab_size(n_classes: int, vocab_size: int | None) -> None:
    if vocab_size is not None and vocab_size != n_classes:
        raise ValueError(
            f"the logits have {n_classes} classes, but vocab_size is {vocab_size}: cut them off, logits[..., :vocab_size], "
            "if the head is padded"
        )


def as_divisor(num_items_in_batch: int | float | Tensor | None, device: torch.device) -> int | float | Tensor | None:
    if isinstance(num_items_in_batch, Tensor):
        # DataParallel hands each replica a tensor of shape (1,).
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                f"num_items_in_batch must hold one number, got shape {list(num_items_in_batch.shape)}: sum it first"
            )
        return num_items_in_batch.to(device).reshape(())
    return num_items_in_batch


def loss_in_float32(operand: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Half precision has three digits, too few for a loss that is logged, added up and scaled: under autocast it is fp32."""
    if operand.dtype not in (torch.float16, torch.bfloat16):
        return contextlib.nullcontext()
    return torch.autocast(operand.device.type, dtype=operand.dtype)
