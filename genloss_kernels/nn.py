"""The modules, named as in ``torch.nn``, which they subclass where torch has them; only the forward is ours."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from . import functional as F
from .functional import CrossEntropyStats, VAELossOutput

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "ContrastiveDivergenceLoss",
    "CosineEmbeddingLoss",
    "CrossEntropyLoss",
    "FusedLMHead",
    "GANDiscriminatorLoss",
    "GANGeneratorLoss",
    "GaussianKLLoss",
    "GaussianNLLLoss",
    "GradientPenalty",
    "HuberLoss",
    "JSDivWithLogitsLoss",
    "KLDivLoss",
    "KLDivWithLogitsLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "MSELoss",
    "NLLLoss",
    "R1Penalty",
    "SmoothL1Loss",
    "VAELoss",
]

_LINEAR_OPTIONS = frozenset(inspect.signature(F.linear_cross_entropy).parameters) - {
    "input", "linear_weight", "linear_bias", "target",
}  # fmt: skip


class _LinearCrossEntropyLoss(torch.nn.modules.loss._WeightedLoss):
    """What torch 2.13's module holds, for an older torch."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        super().__init__(weight=weight, reduction=reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        rows = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)


_TorchLinearCrossEntropyLoss: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _LinearCrossEntropyLoss)


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


class LinearCrossEntropyLoss(_TorchLinearCrossEntropyLoss):
    """:func:`genloss_kernels.linear_cross_entropy` as a module that owns the linear layer, ``self.linear``.

    The arguments are torch 2.13's and that function's extra keywords. On an older torch the module is the same.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> loss = gk.LinearCrossEntropyLoss(3, 4, z_loss=1e-4)
        >>> loss(torch.zeros(2, 3), torch.tensor([0, 3])).shape
        torch.Size([])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        return_stats: bool = False,
        vocab_shard: Any = None,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            out_features=out_features,
            bias=bias,
            device=device,
            dtype=dtype,
            reduction=reduction,
            weight=None if vocab_shard is not None else weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        if vocab_shard is not None:
            # Of all ranks' classes, where the layer has this rank's.
            self.weight = weight
        self.softcap, self.logit_scale, self.z_loss = softcap, logit_scale, z_loss
        self.return_stats, self.vocab_shard = return_stats, vocab_shard

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor | CrossEntropyStats:
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return F.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            row_weight=row_weight,
            divisor=divisor,
            return_stats=self.return_stats,
            vocab_shard=self.vocab_shard,
        )


class FusedLMHead(torch.nn.Linear):
    """A language model's head: logits without a target, the loss with one, and then the logits never exist.

    The logits are the layer's own, without the loss's scale and softcap.

    Args:
        in_features: width of the hidden states.
        out_features: size of the vocabulary.
        bias: whether the head has one.
        device: of the parameters.
        dtype: of the parameters.
        loss_options: keywords of :func:`genloss_kernels.linear_cross_entropy`; ``weight`` becomes the buffer
            ``class_weight``.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> head = gk.FusedLMHead(3, 5, softcap=30.0)
        >>> hidden = torch.zeros(2, 4, 3)
        >>> head(hidden).shape, head(hidden, torch.zeros(2, 4, dtype=torch.int64)).shape
        (torch.Size([2, 4, 5]), torch.Size([]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **loss_options: Any,
    ) -> None:
        unknown = loss_options.keys() - _LINEAR_OPTIONS
        if unknown:
            raise TypeError(f"{', '.join(sorted(unknown))}: not among the loss options {', '.join(sorted(_LINEAR_OPTIONS))}")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        # A buffer, so that it moves and is cast with the parameters.
        self.register_buffer("class_weight", loss_options.pop("weight", None))
        self.loss_options = loss_options

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, **loss_options: Any) -> FusedLMHead:
        """A head that shares the parameters of ``linear``, so that an optimizer or a tied embedding goes on as before."""
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, not {type(linear).__name__}")
        if isinstance(linear, FusedLMHead):
            loss_options = {"weight": linear.class_weight} | linear.loss_options | loss_options
        head = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", **loss_options)
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(self, input: Tensor, target: Tensor | None = None, **loss_options: Any) -> Any:
        if target is None:
            return super().forward(input)
        options: dict[str, Any] = {"weight": self.class_weight} | self.loss_options | loss_options
        return F.linear_cross_entropy(input, self.weight, target, linear_bias=self.bias, **options)


class NLLLoss(torch.nn.NLLLoss):
    """:func:`genloss_kernels.nll_loss` as a module, with torch's arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


class BCELoss(torch.nn.BCELoss):
    """:func:`genloss_kernels.binary_cross_entropy` as a module, with torch's arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy(input, target, self.weight, reduction=self.reduction)


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


class _Loss(torch.nn.Module):
    def extra_repr(self) -> str:
        options = {name: value for name, value in vars(self).items() if name != "training" and not name.startswith("_")}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


class GaussianKLLoss(_Loss):
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


class KLDivWithLogitsLoss(_Loss):
    """:func:`genloss_kernels.kl_div_with_logits` as a module.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.KLDivWithLogitsLoss(temperature=2.0)(torch.zeros(2, 4), torch.ones(2, 4))
        tensor(0.)
    """

    def __init__(self, *, temperature: float = 1.0, direction: str = "forward", reduction: str = "batchmean") -> None:
        super().__init__()
        self.temperature = temperature
        self.direction = direction
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.kl_div_with_logits(
            input, target, temperature=self.temperature, direction=self.direction, reduction=self.reduction
        )


class JSDivWithLogitsLoss(_Loss):
    """:func:`genloss_kernels.js_div_with_logits` as a module.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.JSDivWithLogitsLoss(beta=0.1)(torch.zeros(2, 4), torch.ones(2, 4))
        tensor(0.)
    """

    def __init__(self, *, beta: float = 0.5, temperature: float = 1.0, reduction: str = "batchmean") -> None:
        super().__init__()
        self.beta = beta
        self.temperature = temperature
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.js_div_with_logits(input, target, beta=self.beta, temperature=self.temperature, reduction=self.reduction)


class MSELoss(torch.nn.MSELoss):
    """:func:`genloss_kernels.mse_loss` as a module, with torch's arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class L1Loss(torch.nn.L1Loss):
    """:func:`genloss_kernels.l1_loss` as a module, with torch's arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """:func:`genloss_kernels.smooth_l1_loss` as a module, with torch's arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(torch.nn.HuberLoss):
    """:func:`genloss_kernels.huber_loss` as a module, with torch's arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class GaussianNLLLoss(torch.nn.GaussianNLLLoss):
    """:func:`genloss_kernels.gaussian_nll_loss` as a module, with torch's arguments."""

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        return F.gaussian_nll_loss(input, target, var, full=self.full, eps=self.eps, reduction=self.reduction)


class VAELoss(_Loss):
    """:func:`genloss_kernels.vae_loss` as a module; ``beta`` may be given to the call instead, for annealing.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> image = torch.zeros(2, 4)
        >>> gk.VAELoss(recon_loss="l1")(image + 0.5, image, torch.zeros(2, 3), torch.zeros(2, 3)).loss
        tensor(2.)
    """

    def __init__(
        self,
        *,
        recon_loss: str = "mse",
        beta: float | Tensor = 1.0,
        reduction: str = "batchmean",
        free_bits: float | None = None,
        capacity: float | None = None,
    ) -> None:
        super().__init__()
        self.recon_loss = recon_loss
        self.beta = beta
        self.reduction = reduction
        self.free_bits = free_bits
        self.capacity = capacity

    def forward(
        self, recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, *, beta: float | Tensor | None = None
    ) -> VAELossOutput:
        return F.vae_loss(
            recon,
            target,
            mu,
            logvar,
            recon_loss=self.recon_loss,
            beta=self.beta if beta is None else beta,
            reduction=self.reduction,
            free_bits=self.free_bits,
            capacity=self.capacity,
        )


class GANDiscriminatorLoss(_Loss):
    """:func:`genloss_kernels.gan_discriminator_loss` as a module.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.GANDiscriminatorLoss("wasserstein")(torch.ones(4), torch.zeros(8))
        tensor(-1.)
    """

    def __init__(self, kind: str = "non_saturating", *, reduction: str = "mean") -> None:
        super().__init__()
        self.kind = kind
        self.reduction = reduction

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.gan_discriminator_loss(real, fake, self.kind, reduction=self.reduction)


class GANGeneratorLoss(_Loss):
    """:func:`genloss_kernels.gan_generator_loss` as a module.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.GANGeneratorLoss("hinge")(torch.ones(4))
        tensor(-1.)
    """

    def __init__(self, kind: str = "non_saturating", *, reduction: str = "mean") -> None:
        super().__init__()
        self.kind = kind
        self.reduction = reduction

    def forward(self, fake: Tensor, *, real: Tensor | None = None) -> Tensor:
        return F.gan_generator_loss(fake, self.kind, real=real, reduction=self.reduction)


class GradientPenalty(_Loss):
    """:func:`genloss_kernels.gradient_penalty` as a module.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.GradientPenalty()(torch.tensor([[3.0, 4.0]]))
        tensor(16.)
    """

    def __init__(self, *, target: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.target = target
        self.reduction = reduction

    def forward(self, grad: Tensor) -> Tensor:
        return F.gradient_penalty(grad, target=self.target, reduction=self.reduction)


class R1Penalty(_Loss):
    """:func:`genloss_kernels.r1_penalty` as a module.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.R1Penalty(gamma=2.0)(torch.tensor([[3.0, 4.0]]))
        tensor(25.)
    """

    def __init__(self, *, gamma: float = 10.0, reduction: str = "mean") -> None:
        super().__init__()
        self.gamma = gamma
        self.reduction = reduction

    def forward(self, grad: Tensor) -> Tensor:
        return F.r1_penalty(grad, gamma=self.gamma, reduction=self.reduction)


class ContrastiveDivergenceLoss(_Loss):
    """:func:`genloss_kernels.contrastive_divergence_loss` as a module.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> gk.ContrastiveDivergenceLoss(l2=0.5)(torch.ones(4), torch.zeros(8))
        tensor(1.5000)
    """

    def __init__(self, *, l2: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        self.l2 = l2
        self.reduction = reduction

    def forward(self, positive_energy: Tensor, negative_energy: Tensor) -> Tensor:
        return F.contrastive_divergence_loss(positive_energy, negative_energy, l2=self.l2, reduction=self.reduction)


class CosineEmbeddingLoss(torch.nn.CosineEmbeddingLoss):
    """:func:`genloss_kernels.cosine_embedding_loss` as a module, with torch's arguments."""

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return F.cosine_embedding_loss(input1, input2, target, margin=self.margin, reduction=self.reduction)


class KLDivLoss(torch.nn.KLDivLoss):
    """:func:`genloss_kernels.kl_div` as a module, with torch's arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)
