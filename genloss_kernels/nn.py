"""The modules, named as in ``torch.nn``, which they subclass where torch has them; only the forward is ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional as F
from .functional import CrossEntropyStats

__all__ = ["BCEWithLogitsLoss", "CrossEntropyLoss", "GaussianKLLoss", "MSELoss", "NLLLoss"]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:func:`genloss_kernels.cross_entropy` as a module, with torch's arguments and that function's extra keywords.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> loss = gk.CrossEntropyLoss(z_loss=1e-4)(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> round(loss.item(), 4)
        1.3865
    """

    def __init__(
        self,
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
        inplace_backward: bool = False,
        return_stats: bool = False,
        vocab_shard: Any = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.z_loss = z_loss
        self.inplace_backward = inplace_backward
        self.return_stats = return_stats
        self.vocab_shard = vocab_shard

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor | CrossEntropyStats:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            row_weight=row_weight,
            divisor=divisor,
            inplace_backward=self.inplace_backward,
            return_stats=self.return_stats,
            vocab_shard=self.vocab_shard,
        )


class NLLLoss(torch.nn.NLLLoss):
    """:func:`genloss_kernels.nll_loss` as a module, with torch's arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """:func:`genloss_kernels.binary_cross_entropy_with_logits` as a module, with torch's arguments and label smoothing."""

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            label_smoothing=self.label_smoothing,
            mask=mask,
        )


class GaussianKLLoss(torch.nn.Module):
    """:func:`genloss_kernels.gaussian_kl` as a module.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.GaussianKLLoss(free_bits=0.25)(torch.zeros(2, 4), torch.zeros(2, 4))
        tensor(1.)
    """

    def __init__(
        self,
        *,
        reduction: str = "batchmean",
        free_bits: float | None = None,
        capacity: float | None = None,
        logvar_clamp: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.free_bits = free_bits
        self.capacity = capacity
        self.logvar_clamp = logvar_clamp

    def forward(self, mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor | None = None, logvar_p: Tensor | None = None) -> Tensor:
        return F.gaussian_kl(
            mu_q,
            logvar_q,
            mu_p,
            logvar_p,
            reduction=self.reduction,
            free_bits=self.free_bits,
            capacity=self.capacity,
            logvar_clamp=self.logvar_clamp,
        )


class MSELoss(torch.nn.MSELoss):
    """:func:`genloss_kernels.mse_loss` as a module, with torch's arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)
