"""The case table: inputs, oracle and built-in of each loss, which tests, doctor, meters and bench share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional
from .core.torch_losses import TORCH_LOSSES

# Themselves, under gk.patch_torch() too.
torchs = SimpleNamespace(**TORCH_LOSSES)

# What a case is for.
DOCTOR, BYTES, BENCH = "doctor", "bytes", "bench"

# (rows, columns) of a benchmark on a GPU and on a CPU.
_BENCH_CUDA, _BENCH_CPU = (8192, 128256), (512, 32000)


@dataclass(frozen=True)
class Call:
    """Arguments of one call.

    ``differentiable`` names the tensors that get a gradient, ``gathered`` those of which only an element a row is read.
    """

    arguments: dict[str, Any]
    differentiable: tuple[str, ...]
    gathered: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def fresh(self, dtype: torch.dtype | None = None) -> Call:
        """The same arguments as leaves of a new graph, floating point ones in ``dtype`` if that is given."""
        arguments = dict(self.arguments)
        for name, tensor in self.tensors().items():
            leaf = tensor.detach()
            if dtype is not None and leaf.is_floating_point():
                leaf = leaf.to(dtype)
            arguments[name] = leaf.requires_grad_(name in self.differentiable)
        return Call(arguments, self.differentiable, self.gathered)

    def gradients(self) -> dict[str, Tensor]:
        found = {name: self.arguments[name].grad for name in self.differentiable}
        return {name: grad for name, grad in found.items() if grad is not None}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    ``make`` draws the call for a device and dtype; ``oracle`` computes the loss by plain torch operators from the same
    arguments, in whatever dtype these have; ``builtin`` is what a user would write with torch, and None where that is the
    oracle too. ``products`` says that results are sums of products of tensors that are stored in the call's dtype, and
    ``cancels`` that they are differences which may nearly cancel: an error is then that of its terms.
    """

    loss: str
    name: str
    make: Callable[[torch.Generator, torch.device, torch.dtype], Call]
    oracle: Callable[..., Tensor]
    builtin: Callable[..., Tensor] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    uses: frozenset[str] = field(default_factory=frozenset)
    autocast: bool = False
    products: bool = False
    cancels: bool = False

    @property
    def function(self) -> Callable[..., Tensor]:
        """The public function; of one with several results the loss alone."""
        return partial(_loss_of, getattr(functional, self.loss))

    def call(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
        device = torch.device(device)
        return self.make(torch.Generator(device).manual_seed(seed), device, dtype).fresh()


def _loss_of(function: Callable[..., Any], **arguments: Any) -> Tensor:
    result = function(**arguments)
    return result if isinstance(result, Tensor) else result.loss


def floor_bytes(call: Call, loss: Tensor) -> int:
    """Bytes that must move: operands read in forward and backward, gradients and the loss written once."""
    size = {name: _unique_bytes(tensor) for name, tensor in call.tensors().items() if name not in call.gathered}
    for name in call.gathered:
        # Forward only: the gradient of a gather does not need what was gathered.
        size[name] = call.arguments["target"].numel() * call.arguments[name].element_size() // 2
    gradients = sum(call.arguments[name].numel() * call.arguments[name].element_size() for name in call.differentiable)
    return 2 * sum(size.values()) + gradients + loss.numel() * loss.element_size()


def _unique_bytes(tensor: Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def cross_entropy_oracle(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """Cross entropy composed from torch's own, with the extra keywords spelled out."""
    y = input * logit_scale
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    rows = torchs.cross_entropy(
        y, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    valid = torch.ones_like(rows) if target.is_floating_point() else (target != ignore_index).to(rows)
    rows = rows + valid * z_loss * torch.logsumexp(y, 1).square()
    normalizer = valid
    if weight is not None and not target.is_floating_point():
        normalizer = valid * weight[target.clamp(min=0)]
    if row_weight is not None:
        rows, normalizer = rows * row_weight, normalizer * row_weight
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / (normalizer.sum() if divisor is None else divisor)


def linear_cross_entropy_oracle(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    row_weight: Tensor | None = None,
    options: Any = None,
    **rest: Any,
) -> Tensor:
    """Cross entropy of logits that exist in full; how many at a time, ``options``, makes no difference."""
    shape, n_classes = input.shape[:-1], linear_weight.size(0)
    logits = F.linear(input, linear_weight, linear_bias).reshape(-1, n_classes)
    target = target.reshape(-1, n_classes) if target.is_floating_point() else target.reshape(-1)
    ignore_index = -100 if ignore_index is None else ignore_index
    row_weight = None if row_weight is None else row_weight.reshape(-1)
    loss = cross_entropy_oracle(logits, target, ignore_index=ignore_index, row_weight=row_weight, **rest)
    return loss.reshape(shape) if rest.get("reduction") == "none" else loss


def linear_cross_entropy_usual(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """What most training scripts do."""
    return torchs.cross_entropy(F.linear(input, linear_weight), target)


def gaussian_kl_oracle(
    mu_q: Tensor,
    logvar_q: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    reduction: str = "batchmean",
    free_bits: float | None = None,
    capacity: float | None = None,
    logvar_clamp: tuple[float, float] | None = None,
) -> Tensor:
    """The divergence by ``torch.distributions``, with the extra keywords spelled out."""
    mu_p = torch.zeros_like(mu_q) if mu_p is None else mu_p
    logvar_p = torch.zeros_like(logvar_q) if logvar_p is None else logvar_p
    if logvar_clamp is not None:
        logvar_q, logvar_p = logvar_q.clamp(*logvar_clamp), logvar_p.clamp(*logvar_clamp)
    q = torch.distributions.Normal(mu_q, (0.5 * logvar_q).exp(), validate_args=False)
    p = torch.distributions.Normal(mu_p, (0.5 * logvar_p).exp(), validate_args=False)
    kl = torch.distributions.kl_divergence(q, p)
    if free_bits is not None:
        kl = kl.clamp(min=free_bits)
    if capacity is not None:
        kl = (kl.flatten(1).sum(1) - capacity).abs() if kl.dim() > 1 else (kl - capacity).abs()
        return kl if reduction == "none" else kl.sum() if reduction == "sum" else kl.mean()
    if reduction == "none":
        return kl
    return kl.mean() if reduction == "mean" else kl.sum() / (kl.size(0) if reduction == "batchmean" else 1)


def gaussian_kl_usual(mu_q: Tensor, logvar_q: Tensor) -> Tensor:
    """The formula of most variational autoencoders, batchmean."""
    return -0.5 * torch.sum(1 + logvar_q - mu_q.pow(2) - logvar_q.exp()) / mu_q.size(0)


def gaussian_kl_usual_general(mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Tensor:
    """The usual formula between two Gaussians, batchmean."""
    spread = (logvar_q.exp() + (mu_q - mu_p).pow(2)) / logvar_p.exp()
    return 0.5 * torch.sum(logvar_p - logvar_q + spread - 1) / mu_q.size(0)


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    """Reduction of rows of a batch (N, ...)."""
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum() / (rows.size(0) if reduction == "batchmean" else 1)


def _kl_rows(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.where(p > 0.0, p * (log_p - log_q), 0.0).sum(-1)


def kl_div_with_logits_oracle(
    input: Tensor, target: Tensor, temperature: float = 1.0, direction: str = "forward", reduction: str = "batchmean"
) -> Tensor:
    """The divergence from torch's log_softmax, by its definition."""
    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (input, target))
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    return _reduced(_kl_rows(log_p.exp(), log_p, log_q) * temperature**2, reduction)


def js_div_with_logits_oracle(
    input: Tensor, target: Tensor, beta: float = 0.5, temperature: float = 1.0, reduction: str = "batchmean"
) -> Tensor:
    """The divergence from torch's log_softmax, by its definition."""
    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (input, target))
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    rows = beta * _kl_rows(p, log_p, log_m) + (1.0 - beta) * _kl_rows(q, log_q, log_m)
    return _reduced(rows * temperature**2, reduction)


def categorical_entropy_oracle(logits: Tensor, reduction: str = "none") -> Tensor:
    """The entropy by ``torch.distributions``, without its checks of values."""
    return _reduced(torch.distributions.Categorical(logits=logits, validate_args=False).entropy(), reduction)


def kl_div_with_logits_usual(input: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """What most distillation scripts do, batchmean."""
    student, teacher = F.log_softmax(input / temperature, -1), F.log_softmax(target / temperature, -1)
    return torchs.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


def js_div_with_logits_usual(input: Tensor, target: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """The usual generalized divergence, batchmean."""
    student, teacher = F.log_softmax(input / temperature, -1), F.log_softmax(target / temperature, -1)
    mixture = torch.logsumexp(torch.stack([teacher + math.log(beta), student + math.log(1.0 - beta)]), 0)
    of_teacher = torchs.kl_div(mixture, teacher, log_target=True, reduction="batchmean")
    of_student = torchs.kl_div(mixture, student, log_target=True, reduction="batchmean")
    return (beta * of_teacher + (1.0 - beta) * of_student) * temperature**2


def categorical_entropy_usual(logits: Tensor, reduction: str = "mean") -> Tensor:
    """The usual formula, mean over rows."""
    log_p = F.log_softmax(logits, -1)
    return _reduced(-(log_p.exp() * log_p).sum(-1), reduction)


def vae_loss_oracle(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    recon_loss: str = "mse",
    beta: float | Tensor = 1.0,
    reduction: str = "batchmean",
    free_bits: float | None = None,
    capacity: float | None = None,
) -> Tensor:
    """Torch's loss of the pixels and the divergence by ``torch.distributions``."""
    pixels = VAE_RECONSTRUCTION[recon_loss](recon, target, reduction="none")
    kl = gaussian_kl_oracle(mu, logvar, reduction="none", free_bits=free_bits)
    terms = [term.flatten(1).sum(1) if term.dim() > 1 else term for term in (pixels, kl)]
    if capacity is not None:
        terms[1] = (terms[1] - capacity).abs()
    if reduction == "mean":
        return pixels.mean() + beta * (kl.mean() if capacity is None else terms[1].mean())
    loss = terms[0] + beta * terms[1]
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / mu.size(0)


VAE_RECONSTRUCTION = {
    "mse": torchs.mse_loss,
    "l1": torchs.l1_loss,
    "bce": torchs.binary_cross_entropy,
    "bce_with_logits": torchs.binary_cross_entropy_with_logits,
}


def vae_loss_usual(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, recon_loss: str = "mse") -> Tensor:
    """What most training scripts do."""
    pixels = VAE_RECONSTRUCTION[recon_loss](recon, target, reduction="sum")
    return pixels / recon.size(0) + gaussian_kl_usual(mu, logvar)


def gan_discriminator_loss_oracle(
    real: Tensor, fake: Tensor, kind: str = "non_saturating", reduction: str = "mean"
) -> Tensor:
    """Binary cross entropy and the like against targets of ones and zeros."""
    if kind == "relativistic":
        return torchs.binary_cross_entropy_with_logits(real - fake, torch.ones_like(real), reduction=reduction)
    if kind in ("minimax", "non_saturating"):
        bce = torchs.binary_cross_entropy_with_logits
        sides = (bce(s, torch.full_like(s, t), reduction="none") for s, t in ((real, 1.0), (fake, 0.0)))
    elif kind == "lsgan":
        sides = ((real - 1.0).square() / 2.0, fake.square() / 2.0)
    else:
        sides = (F.relu(1.0 - real), F.relu(1.0 + fake)) if kind == "hinge" else (-real, fake)
    first, second = sides
    if reduction == "none":
        return first + second
    return first.sum() + second.sum() if reduction == "sum" else first.mean() + second.mean()


def gan_generator_loss_oracle(
    fake: Tensor, kind: str = "non_saturating", real: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """The same towards ones."""
    if kind == "minimax":
        loss = -torchs.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake), reduction="none")
    elif kind in ("non_saturating", "relativistic"):
        logits = fake if real is None else fake - real
        loss = torchs.binary_cross_entropy_with_logits(logits, torch.ones_like(fake), reduction="none")
    else:
        loss = (fake - 1.0).square() / 2.0 if kind == "lsgan" else -fake
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def gradient_penalty_oracle(grad: Tensor, target: float = 1.0, reduction: str = "mean") -> Tensor:
    loss = (torch.linalg.vector_norm(grad.flatten(1), dim=1) - target).square()
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def r1_penalty_oracle(grad: Tensor, gamma: float = 10.0, reduction: str = "mean") -> Tensor:
    loss = 0.5 * gamma * grad.flatten(1).square().sum(1)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def contrastive_divergence_loss_oracle(
    positive_energy: Tensor, negative_energy: Tensor, l2: float = 0.0, reduction: str = "mean"
) -> Tensor:
    if reduction == "none":
        return positive_energy - negative_energy + l2 * (positive_energy.square() + negative_energy.square())
    reduced = torch.mean if reduction == "mean" else torch.sum
    squares = reduced(positive_energy.square()) + reduced(negative_energy.square())
    return reduced(positive_energy) - reduced(negative_energy) + l2 * squares


def _logits(generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(shape, generator=generator, device=device) * 3.0).to(dtype)


def _labels(generator: torch.Generator, device: torch.device, n_classes: int, *shape: int, ignored: bool = False) -> Tensor:
    target = torch.randint(n_classes, shape, generator=generator, device=device)
    if ignored:
        target.view(-1)[::3] = -100
    return target


def _indices(*shape: int, ignored: bool = False, **options: Any) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        target = _labels(generator, device, shape[1], shape[0], *shape[2:], ignored=ignored)
        arguments = {"input": _logits(generator, device, dtype, *shape), "target": target, **options}
        if arguments.pop("weighted", False):
            arguments["weight"] = torch.rand(shape[1], generator=generator, device=device).to(dtype) + 0.5
        if arguments.pop("row_weighted", False):
            arguments["row_weight"] = torch.rand(target.shape, generator=generator, device=device).to(dtype)
        return Call(arguments, ("input",))

    return make


def _probabilities(*shape: int, **options: Any) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        target = torch.softmax(_logits(generator, device, torch.float32, *shape), 1).to(dtype)
        arguments = {"input": _logits(generator, device, dtype, *shape), "target": target, **options}
        return Call(arguments, ("input",))

    return make


def _next_token(batch: int, length: int, n_classes: int) -> Callable[..., Call]:
    """The language model's view: logits of all but the last position, classes moved to dimension 1 without a copy."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        logits = _logits(generator, device, dtype, batch, length, n_classes)
        target = _labels(generator, device, n_classes, batch, length)
        return Call({"input": logits[:, :-1].transpose(1, 2), "target": target[:, 1:]}, ("input",))

    return make


def _strided_classes(rows: int, n_classes: int) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        target = _labels(generator, device, n_classes, rows, ignored=True)
        return Call({"input": _logits(generator, device, dtype, n_classes, rows).t(), "target": target}, ("input",))

    return make


def _log_probabilities(*shape: int, **options: Any) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        call = _indices(*shape, ignored=True, **options)(generator, device, dtype)
        call.arguments["input"] = torch.log_softmax(call.arguments["input"].float(), 1).to(dtype)
        return Call(call.arguments, call.differentiable, gathered=("input",))

    return make


def _binary(*shape: int, weighted: tuple[int, ...] = (), positive: tuple[int, ...] = (), **options: Any) -> Any:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        arguments = {
            "input": _logits(generator, device, dtype, *shape),
            "target": torch.rand(shape, generator=generator, device=device).to(dtype),
        }
        for name, size in (("weight", weighted), ("pos_weight", positive)):
            if size:
                arguments[name] = torch.rand(size, generator=generator, device=device).to(dtype) + 0.5
        return Call(arguments | options, ("input",))

    return make


def _gaussians(*shape: int, general: bool = False, prior: tuple[int, ...] = (), **options: Any) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        names = ("mu_q", "logvar_q", "mu_p", "logvar_p")
        shapes = [shape, shape, prior or shape, prior or shape]
        count = 4 if general or prior else 2
        tensors = {
            name: torch.randn(size, generator=generator, device=device).to(dtype)
            for name, size in list(zip(names, shapes, strict=True))[:count]
        }
        return Call(tensors | options, tuple(tensors))

    return make


def _autoencoder(*shape: int, latents: int, recon_loss: str, annealed: float | None = None, **options: Any) -> Any:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        def uniform() -> Tensor:
            return torch.rand(shape, generator=generator, device=device).to(dtype)

        arguments = {
            "recon": uniform() if recon_loss == "bce" else _logits(generator, device, dtype, *shape),
            "target": uniform(),
            "mu": torch.randn(shape[0], latents, generator=generator, device=device).to(dtype),
            "logvar": torch.randn(shape[0], latents, generator=generator, device=device).to(dtype),
        }
        if annealed is not None:
            arguments["beta"] = torch.tensor(annealed, device=device, dtype=dtype)
        return Call(arguments | {"recon_loss": recon_loss} | options, ("recon", "mu", "logvar"))

    return make


def _scores(options: dict[str, Any], **shapes: tuple[int, ...]) -> Callable[..., Call]:
    """Normal numbers of some size by name, all differentiable."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        tensors = {name: _logits(generator, device, dtype, *shape) for name, shape in shapes.items()}
        return Call(tensors | options, tuple(tensors))

    return make


_DTYPES_32 = (torch.float32,)


def _case(loss: str, name: str, make: Any, *uses: str, **rest: Any) -> Case:
    oracle = {
        "cross_entropy": cross_entropy_oracle,
        "linear_cross_entropy": linear_cross_entropy_oracle,
        "nll_loss": torchs.nll_loss,
        "binary_cross_entropy": torchs.binary_cross_entropy,
        "binary_cross_entropy_with_logits": torchs.binary_cross_entropy_with_logits,
        "gaussian_kl": gaussian_kl_oracle,
        "kl_div": torchs.kl_div,
        "cosine_embedding_loss": torchs.cosine_embedding_loss,
        "gaussian_nll_loss": torchs.gaussian_nll_loss,
        "kl_div_with_logits": kl_div_with_logits_oracle,
        "js_div_with_logits": js_div_with_logits_oracle,
        "categorical_entropy": categorical_entropy_oracle,
        "mse_loss": torchs.mse_loss,
        "l1_loss": torchs.l1_loss,
        "smooth_l1_loss": torchs.smooth_l1_loss,
        "huber_loss": torchs.huber_loss,
        "vae_loss": vae_loss_oracle,
        "gan_discriminator_loss": gan_discriminator_loss_oracle,
        "gan_generator_loss": gan_generator_loss_oracle,
        "gradient_penalty": gradient_penalty_oracle,
        "r1_penalty": r1_penalty_oracle,
        "contrastive_divergence_loss": contrastive_divergence_loss_oracle,
    }[loss]
    return Case(loss, name, make, oracle, uses=frozenset(uses), **rest)


def _cross_entropy() -> Iterator[Case]:
    loss = "cross_entropy"
    yield _case(loss, "aligned rows 16 x 32768", _indices(16, 32768), BYTES)
    yield _case(loss, "aligned rows 4 x 32768", _indices(4, 32768), DOCTOR)
    yield _case(loss, "ragged rows 8 x 50257", _indices(8, 50257), BYTES)
    yield _case(loss, "ragged rows 3 x 50257", _indices(3, 50257), DOCTOR)
    yield _case(loss, "many ragged rows 40 x 5003", _indices(40, 5003, ignored=True), DOCTOR)
    yield _case(loss, "classes in dimension 1 (2, 64, 64, 64)", _indices(2, 64, 64, 64), BYTES)
    yield _case(loss, "classes in dimension 1 (2, 64, 16, 16)", _indices(2, 64, 16, 16), DOCTOR)
    yield _case(loss, "next-token view (4, 9, 4096)", _next_token(4, 9, 4096), DOCTOR, BYTES)
    yield _case(loss, "ragged next-token view (4, 9, 5003)", _next_token(4, 9, 5003), DOCTOR, BYTES)
    yield _case(
        loss, "autocast 16 x 32768", _indices(16, 32768), BYTES, dtypes=(torch.bfloat16,), autocast=True
    )  # fmt: skip
    yield _case(loss, "short rows 500 x 10", _indices(500, 10, ignored=True), DOCTOR)
    yield _case(loss, "strided classes 6 x 5003", _strided_classes(6, 5003), DOCTOR)
    yield _case(loss, "one class 5 x 1", _indices(5, 1), DOCTOR)
    yield _case(
        loss, "every option", _indices(16, 1003, ignored=True, weighted=True, row_weighted=True, label_smoothing=0.1,
                                       softcap=30.0, logit_scale=0.7, z_loss=1e-3, divisor=37.0), DOCTOR,
    )  # fmt: skip
    yield _case(loss, "per row", _indices(16, 1003, ignored=True, reduction="none"), DOCTOR)
    yield _case(loss, "probabilities 64 x 1003", _probabilities(64, 1003, label_smoothing=0.1), BYTES)
    yield _case(loss, "probabilities 16 x 1003", _probabilities(16, 1003, label_smoothing=0.1), DOCTOR)
    yield _case(loss, "probabilities (2, 19, 9, 7)", _probabilities(2, 19, 9, 7, softcap=5.0, reduction="sum"), DOCTOR)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(loss, "training step", _sized(_indices), BENCH, dtypes=(dtype,))
    yield _case(loss, "label smoothing", _sized(_indices, label_smoothing=0.1), BENCH, dtypes=_DTYPES_32)
    yield _case(loss, "small batch 64 x 1000", _indices(64, 1000), BENCH, dtypes=_DTYPES_32)


def _sized(make: Callable[..., Callable[..., Call]], **options: Any) -> Callable[..., Call]:
    """A benchmark's shape: what a large model has on a GPU, what a CPU does in a fraction of a second there."""

    def sized(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        shape = _BENCH_CPU if device.type == "cpu" else _BENCH_CUDA
        return make(*shape, **options)(generator, device, dtype)

    return sized


def _flat(make: Callable[..., Callable[..., Call]], **options: Any) -> Callable[..., Call]:
    def sized(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        rows = 2**12 if device.type == "cpu" else 2**18
        return make(rows, 1024, **options)(generator, device, dtype)

    return sized


def _linear(
    n_rows: int, width: int, n_classes: int, bias: bool = False, probabilities: bool = False, **options: Any
) -> Callable[..., Call]:
    """Hidden states and a layer whose logits vary by some units; every third row of labels is ignored."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        target = _labels(generator, device, n_classes, n_rows, ignored=True)
        if probabilities:
            target = torch.softmax(normal(n_rows, n_classes), 1).to(dtype)
        tensors = {
            "input": normal(n_rows, width).to(dtype),
            "linear_weight": (normal(n_classes, width) / width**0.5).to(dtype),
        }
        if bias:
            tensors["linear_bias"] = normal(n_classes).to(dtype)
        return Call(tensors | {"target": target} | options, tuple(tensors))

    return make


# (tokens, features, vocabulary) of a benchmark on a GPU and on a CPU.
_HEAD_CUDA, _HEAD_CPU = (8192, 4096, 128256), (2048, 256, 32000)


def _head(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
    return _linear(*(_HEAD_CPU if device.type == "cpu" else _HEAD_CUDA))(generator, device, dtype)


def _linear_cross_entropy() -> Iterator[Case]:
    loss = "linear_cross_entropy"
    chunks = functional.LinearCrossEntropyOptions(batch_chunk_size=16)

    def case(name: str, make: Any, *uses: str, **rest: Any) -> Case:
        return _case(loss, name, make, *uses, products=True, **rest)

    yield case("one chunk 24 x 64 x 5003", _linear(24, 64, 5003), DOCTOR)
    yield case("chunks 40 x 32 x 1003", _linear(40, 32, 1003, bias=True, options=chunks), DOCTOR)
    yield case("per row", _linear(40, 32, 1003, reduction="none", bias=True), DOCTOR)
    every: dict[str, Any] = {
        "label_smoothing": 0.1, "softcap": 30.0, "logit_scale": 0.7, "z_loss": 1e-3, "divisor": 37.0,
    }  # fmt: skip
    yield case("every option", _linear(40, 32, 1003, bias=True, **every), DOCTOR)
    yield case("probabilities", _linear(40, 32, 1003, probabilities=True, reduction="sum"), DOCTOR)
    for dtype in (torch.float32, torch.bfloat16):
        yield case("training step", _head, BENCH, builtin=linear_cross_entropy_usual, dtypes=(dtype,))


def _nll_loss() -> Iterator[Case]:
    loss = "nll_loss"
    yield _case(loss, "rows 64 x 1003", _log_probabilities(64, 1003, weighted=True), DOCTOR)
    yield _case(loss, "classes in dimension 1 (2, 19, 9, 7)", _log_probabilities(2, 19, 9, 7, reduction="none"), DOCTOR)
    yield _case(loss, "training step", _sized(_log_probabilities), BENCH, dtypes=_DTYPES_32)


def _binary_cross_entropy() -> Iterator[Case]:
    loss = "binary_cross_entropy_with_logits"
    yield _case(loss, "elements 2**18", _binary(2**18), BYTES)
    yield _case(loss, "elements 2**15", _binary(2**15), DOCTOR)
    yield _case(loss, "ragged elements 2**18 + 5", _binary(2**18 + 5), BYTES)
    yield _case(loss, "pos_weight[1024]", _binary(256, 1024, positive=(1024,)), BYTES)
    yield _case(loss, "pos_weight[257]", _binary(1021, 257, positive=(257,)), BYTES)
    yield _case(loss, "few rows, pos_weight[1024]", _binary(32, 1024, positive=(1024,)), DOCTOR)
    yield _case(loss, "few rows, pos_weight[257]", _binary(61, 257, positive=(257,)), DOCTOR)
    yield _case(
        loss, "weight[N, 1], pos_weight[C, 1, 1]", _binary(3, 5, 6, 7, weighted=(3, 1, 1, 1), positive=(5, 1, 1)), DOCTOR
    )  # fmt: skip
    yield _case(loss, "per element", _binary(37, 53, reduction="none"), DOCTOR)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(loss, "elements", _flat(_binary), BENCH, dtypes=(dtype,))
    yield _case(loss, "pos_weight[1024]", _flat(_binary, positive=(1024,)), BENCH, dtypes=_DTYPES_32)
    yield _case(loss, "small batch 64 x 100", _binary(64, 100), BENCH, dtypes=_DTYPES_32)


def _certainties(*shape: int, weighted: tuple[int, ...] = (), learned: bool = False, **options: Any) -> Callable[..., Call]:
    """Probabilities, each certain of one or the other now and then, unless the target is ``learned``."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        def some(*size: int) -> Tensor:
            return torch.rand(size, generator=generator, device=device)

        # Beyond the ends, and then cut off.
        x, t = ((some(*shape) * 1.02 - 0.01).clamp(0.0, 1.0).to(dtype) for _ in range(2))
        x = x.clamp(0.01, 0.99) if learned else x
        extra = {"weight": (some(*weighted) + 0.5).to(dtype)} if weighted else {}
        return Call({"input": x, "target": t, **extra, **options}, ("input", "target") if learned else ("input",))

    return make


def _binary_cross_entropy_of_probabilities() -> Iterator[Case]:
    loss = "binary_cross_entropy"
    yield _case(loss, "elements 2**20", _certainties(2**20), BYTES)
    yield _case(loss, "elements 2**15", _certainties(2**15), DOCTOR)
    yield _case(loss, "weight[N, 1]", _certainties(61, 257, weighted=(61, 1), reduction="sum"), DOCTOR)
    yield _case(loss, "both learned", _certainties(61, 257, learned=True), DOCTOR)
    yield _case(loss, "per element", _certainties(37, 53, reduction="none"), DOCTOR)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(loss, "elements", _flat(_certainties), BENCH, dtypes=(dtype,))


def _gaussian_kl() -> Iterator[Case]:
    loss = "gaussian_kl"
    yield _case(loss, "standard 512 x 512", _gaussians(512, 512), BYTES)
    yield _case(loss, "standard 32 x 1024", _gaussians(32, 1024), DOCTOR)
    yield _case(loss, "general 512 x 512", _gaussians(512, 512, general=True), BYTES)
    yield _case(loss, "general 32 x 1024", _gaussians(32, 1024, general=True), DOCTOR)
    yield _case(loss, "ragged 509 x 511", _gaussians(509, 511), BYTES)
    yield _case(loss, "learned prior 61 x 33", _gaussians(61, 33, prior=(33,), reduction="mean"), DOCTOR)
    yield _case(
        loss, "free bits, capacity, clamp",
        _gaussians(17, 1001, general=True, free_bits=0.5, capacity=1200.0, logvar_clamp=(-1.0, 1.0)), DOCTOR,
    )  # fmt: skip
    yield _case(loss, "per element", _gaussians(17, 33, general=True, reduction="none"), DOCTOR)
    yield _case(loss, "standard", _flat(_gaussians), BENCH, builtin=gaussian_kl_usual, dtypes=_DTYPES_32)
    yield _case(
        loss, "general", _flat(_gaussians, general=True), BENCH, builtin=gaussian_kl_usual_general, dtypes=_DTYPES_32
    )  # fmt: skip
    yield _case(loss, "small batch 64 x 32", _gaussians(64, 32), BENCH, builtin=gaussian_kl_usual, dtypes=_DTYPES_32)


def _regression(*shape: int, weighted: bool = False, **options: Any) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        names = ("input", "target", "weight")[: 3 if weighted else 2]
        tensors = {name: torch.rand(shape, generator=generator, device=device).to(dtype) for name in names}
        return Call(tensors | options, ("input",))

    return make


def _regressions() -> Iterator[Case]:
    # Thresholds that part differences of uniform numbers about evenly.
    options: dict[str, dict[str, Any]] = {
        "mse_loss": {}, "l1_loss": {}, "smooth_l1_loss": {"beta": 0.25}, "huber_loss": {"delta": 0.25},
    }  # fmt: skip
    for loss, threshold in options.items():
        yield _case(loss, "elements 2**18", _regression(2**18, **threshold), BYTES)
        yield _case(loss, "elements 2**15", _regression(2**15, **threshold), DOCTOR)
        if loss != "smooth_l1_loss":
            yield _case(loss, "weighted", _regression(37, 1001, weighted=True, **threshold), DOCTOR)
        yield _case(loss, "per element", _regression(37, 53, reduction="none", **threshold), DOCTOR)
        yield _case(loss, "elements", _flat(_regression, **threshold), BENCH, dtypes=_DTYPES_32)


def _likelihood(*shape: int, var: tuple[int, ...] | float = (), **options: Any) -> Callable[..., Call]:
    """Means, and variances of at least a quarter."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        mean, target = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
        if isinstance(var, float):
            return Call({"input": mean, "target": target, "var": var, **options}, ("input",))
        variance = (torch.rand(var or shape, generator=generator, device=device) + 0.25).to(dtype)
        return Call({"input": mean, "target": target, "var": variance, **options}, ("input", "var"))

    return make


def _gaussian_nll_loss() -> Iterator[Case]:
    loss = "gaussian_nll_loss"
    yield _case(loss, "elements 2**18", _likelihood(2**18), BYTES)
    yield _case(loss, "elements 2**15", _likelihood(2**15, full=True), DOCTOR)
    yield _case(loss, "clamped", _likelihood(37, 1001, eps=0.5), DOCTOR)
    yield _case(loss, "one variance a row", _likelihood(61, 257, var=(61, 1)), DOCTOR)
    yield _case(loss, "one variance", _likelihood(61, 257, var=0.3, reduction="sum"), DOCTOR)
    yield _case(loss, "per element", _likelihood(37, 53, reduction="none"), DOCTOR)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(loss, "elements", _flat(_likelihood), BENCH, dtypes=(dtype,))


def _pair(*shape: int, names: tuple[str, ...] = ("input",), **options: Any) -> Callable[..., Call]:
    """Logits of a student and a teacher; ``names`` get a gradient."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        tensors = {name: _logits(generator, device, dtype, *shape) for name in ("input", "target")}
        return Call(tensors | options, names)

    return make


def _one(*shape: int, **options: Any) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        return Call({"logits": _logits(generator, device, dtype, *shape), **options}, ("logits",))

    return make


def _divergences() -> Iterator[Case]:
    # ``cancels``: most gradients are p * (value - mean), which may nearly cancel.
    both = ("input", "target")
    kl, js, entropy = "kl_div_with_logits", "js_div_with_logits", "categorical_entropy"
    yield _case(kl, "aligned rows 64 x 4096", _pair(64, 4096, temperature=2.0), BYTES)
    yield _case(kl, "ragged rows 16 x 50257", _pair(16, 50257, direction="reverse"), BYTES)
    yield _case(kl, "both gradients, next-token view", _pair(4, 9, 4096, names=both), BYTES)
    yield _case(kl, "aligned rows 8 x 4096", _pair(8, 4096, temperature=2.0), DOCTOR)
    yield _case(kl, "reverse, ragged rows 3 x 5003", _pair(3, 5003, names=both, direction="reverse"), DOCTOR, cancels=True)
    yield _case(kl, "short rows 50 x 37", _pair(50, 37, names=both, temperature=0.5, reduction="mean"), DOCTOR, cancels=True)
    yield _case(kl, "per row (2, 3, 300)", _pair(2, 3, 300, names=both, reduction="none"), DOCTOR, cancels=True)
    yield _case(js, "rows held 64 x 4096", _pair(64, 4096), BYTES)
    yield _case(js, "ragged rows held 32 x 5003", _pair(32, 5003, beta=0.25), BYTES)
    yield _case(js, "rows held 8 x 4096", _pair(8, 4096, names=both, beta=0.25, temperature=2.0), DOCTOR, cancels=True)
    yield _case(js, "long ragged rows 2 x 9001", _pair(2, 9001), DOCTOR, cancels=True)
    yield _case(js, "short rows 50 x 37", _pair(50, 37, names=both, beta=0.75, reduction="none"), DOCTOR, cancels=True)
    yield _case(entropy, "aligned rows 64 x 4096", _one(64, 4096), BYTES)
    yield _case(entropy, "ragged rows 16 x 50257", _one(16, 50257, reduction="mean"), BYTES)
    yield _case(entropy, "ragged rows 3 x 5003", _one(3, 5003), DOCTOR, cancels=True)
    yield _case(entropy, "short rows 50 x 37", _one(50, 37, reduction="sum"), DOCTOR, cancels=True)
    usual = kl_div_with_logits_usual
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(kl, "distillation", _sized(_pair, temperature=2.0), BENCH, builtin=usual, dtypes=(dtype,))
    yield _case(kl, "small batch 64 x 1000", _pair(64, 1000), BENCH, builtin=usual, dtypes=_DTYPES_32)
    yield _case(js, "distillation", _sized(_pair), BENCH, builtin=js_div_with_logits_usual, dtypes=_DTYPES_32)
    yield _case(
        entropy, "rows", _sized(_one, reduction="mean"), BENCH, builtin=categorical_entropy_usual, dtypes=_DTYPES_32,
        cancels=True,
    )  # fmt: skip


def _vae_loss() -> Iterator[Case]:
    loss, logits = "vae_loss", "bce_with_logits"
    yield _case(loss, "logits (8, 3, 64, 64) and 128", _autoencoder(8, 3, 64, 64, latents=128, recon_loss=logits), BYTES)
    yield _case(loss, "logits 37 x 784 and 20", _autoencoder(37, 784, latents=20, recon_loss=logits), DOCTOR)
    yield _case(loss, "squares, ragged 61 x 5003 and 1021", _autoencoder(61, 5003, latents=1021, recon_loss="mse"), BYTES)
    yield _case(loss, "squares 7 x 1001 and 33", _autoencoder(7, 1001, latents=33, recon_loss="mse", beta=4.0), DOCTOR)
    yield _case(loss, "distances", _autoencoder(7, 3, 9, 11, latents=33, recon_loss="l1", reduction="mean"), DOCTOR)
    yield _case(loss, "probabilities", _autoencoder(7, 3, 9, 11, latents=33, recon_loss="bce", reduction="sum"), DOCTOR)
    yield _case(
        loss, "free bits, capacity, annealed beta",
        _autoencoder(17, 501, latents=101, recon_loss=logits, free_bits=0.5, capacity=120.0, annealed=0.75), DOCTOR,
    )  # fmt: skip
    yield _case(
        loss, "capacity (8, 3, 64, 64) and 4096",
        _autoencoder(8, 3, 64, 64, latents=4096, recon_loss="mse", capacity=4000.0), BYTES,
    )  # fmt: skip
    yield _case(
        loss, "per sample", _autoencoder(17, 501, latents=33, recon_loss="mse", reduction="none", capacity=40.0), DOCTOR
    )  # fmt: skip
    for name, shape, latents in (("digits 128 x 784 and 20", (128, 784), 20), ("pictures", (128, 3, 64, 64), 128)):
        make = _autoencoder(*shape, latents=latents, recon_loss=logits)
        yield _case(loss, name, make, BENCH, builtin=vae_loss_usual, dtypes=_DTYPES_32)


GAN_KINDS = ("minimax", "non_saturating", "lsgan", "hinge", "wasserstein", "relativistic")


def _adversarial() -> Iterator[Case]:
    loss, few, patches = "gan_discriminator_loss", (16, 1, 128, 128), (64, 1, 128, 128)
    yield _case(loss, "patches (16, 1, 128, 128)", _scores({}, real=few, fake=few), BYTES)
    yield _case(loss, "ragged sides", _scores({"kind": "lsgan"}, real=(2**18 + 5,), fake=(2**17 + 3,)), BYTES)
    for kind in GAN_KINDS:
        fake = (37, 31) if kind == "relativistic" else (53, 41)
        yield _case(loss, kind, _scores({"kind": kind}, real=(37, 31), fake=fake), DOCTOR)
    yield _case(
        loss, "per element", _scores({"kind": "hinge", "reduction": "none"}, real=(37, 31), fake=(37, 31)), DOCTOR
    )  # fmt: skip
    yield _case(loss, "patches", _scores({}, real=patches, fake=patches), BENCH, dtypes=_DTYPES_32)
    loss = "gan_generator_loss"
    yield _case(loss, "patches (16, 1, 128, 128)", _scores({}, fake=few), BYTES)
    for kind in GAN_KINDS:
        shapes = {"fake": (37, 31)} | ({"real": (37, 31)} if kind == "relativistic" else {})
        yield _case(loss, kind, _scores({"kind": kind, "reduction": "sum"}, **shapes), DOCTOR)
    for loss in ("gradient_penalty", "r1_penalty"):
        yield _case(loss, "images (8, 3, 64, 64)", _scores({}, grad=(8, 3, 64, 64)), BYTES)
        yield _case(loss, "vectors 37 x 129", _scores({}, grad=(37, 129)), DOCTOR)
        yield _case(loss, "per sample", _scores({"reduction": "none"}, grad=(5, 3, 33, 31)), DOCTOR)
        yield _case(loss, "images", _scores({}, grad=(64, 3, 64, 64)), BENCH, dtypes=_DTYPES_32)


def _energy() -> Iterator[Case]:
    loss, names = "contrastive_divergence_loss", ("positive_energy", "negative_energy")

    def sides(*shapes: tuple[int, ...], **options: Any) -> Callable[..., Call]:
        return _scores(options, **dict(zip(names, shapes, strict=True)))

    yield _case(loss, "energies 2**18 and 2**17", sides((2**18,), (2**17,), l2=0.1), BYTES)
    yield _case(loss, "energies 1003 and 517", sides((1003,), (517,), l2=0.1), DOCTOR)
    yield _case(loss, "per element", sides((37, 31), (37, 31), l2=0.1, reduction="none"), DOCTOR)
    yield _case(loss, "energies", sides((2**20,), (2**20,), l2=0.1), BENCH, dtypes=_DTYPES_32)


def _divergence(*shape: int, learned: bool = False, **options: Any) -> Callable[..., Call]:
    """Distributions over dimension 1, of which the target's is ``learned`` too or not."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        x, t = (torch.log_softmax(_logits(generator, device, torch.float32, *shape), 1) for _ in range(2))
        target = t if options.get("log_target") else t.exp()
        arguments = {"input": x.to(dtype), "target": target.to(dtype), "reduction": "batchmean", **options}
        return Call(arguments, ("input", "target") if learned else ("input",))

    return make


def _kl_div() -> Iterator[Case]:
    loss = "kl_div"
    yield _case(loss, "rows 1024 x 1024", _divergence(1024, 1024), BYTES)
    yield _case(loss, "rows 32 x 1024", _divergence(32, 1024), DOCTOR)
    yield _case(loss, "logarithms, both learned", _divergence(1024, 1024, log_target=True, learned=True), BYTES)
    yield _case(loss, "few logarithms, both learned", _divergence(32, 1024, log_target=True, learned=True), DOCTOR)
    yield _case(loss, "both learned", _divergence(61, 257, learned=True, reduction="sum"), DOCTOR)
    yield _case(loss, "per element", _divergence(37, 53, reduction="none"), DOCTOR)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(loss, "rows", _flat(_divergence), BENCH, dtypes=(dtype,))
    yield _case(loss, "logarithms", _flat(_divergence, log_target=True), BENCH, dtypes=_DTYPES_32)


def _embeddings(
    *shape: int, gap: int = 0, shared: bool = False, learned: bool = True, **options: Any
) -> Callable[..., Call]:
    """Pairs of rows, with a ``gap`` between them, or all with one ``shared``; of which one or both are learned."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        n_rows, n_cols = shape
        first = _logits(generator, device, dtype, n_rows, n_cols + gap)[:, :n_cols]
        second = _logits(generator, device, dtype, 1 if shared else n_rows, n_cols)
        target = torch.randint(2, (n_rows,), generator=generator, device=device) * 2 - 1
        arguments = {"input1": first, "input2": second, "target": target, "margin": -0.5, **options}
        return Call(arguments, ("input1", "input2") if learned else ("input1",))

    return make


def _cosine_embedding_loss() -> Iterator[Case]:
    loss = "cosine_embedding_loss"
    yield _case(loss, "rows 1024 x 768", _embeddings(1024, 768), BYTES)
    yield _case(loss, "long rows 16 x 32768", _embeddings(16, 32768), BYTES)
    yield _case(loss, "rows 37 x 768", _embeddings(37, 768), DOCTOR)
    yield _case(loss, "long ragged rows 3 x 5003", _embeddings(3, 5003, margin=0.0), DOCTOR)
    yield _case(loss, "short rows 501 x 7", _embeddings(501, 7, reduction="sum"), DOCTOR)
    yield _case(loss, "rows apart, one learned", _embeddings(61, 128, gap=8, learned=False), DOCTOR)
    yield _case(loss, "one row for all, per pair", _embeddings(37, 64, shared=True, learned=False, reduction="none"), DOCTOR)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(loss, "rows of 1024", _flat(_embeddings), BENCH, dtypes=(dtype,))


CASES: tuple[Case, ...] = (
    *_cross_entropy(),
    *_linear_cross_entropy(),
    *_nll_loss(),
    *_binary_cross_entropy(),
    *_binary_cross_entropy_of_probabilities(),
    *_gaussian_kl(),
    *_regressions(),
    *_gaussian_nll_loss(),
    *_divergences(),
    *_vae_loss(),
    *_adversarial(),
    *_energy(),
    *_kl_div(),
    *_cosine_embedding_loss(),
)


def select(use: str, losses: tuple[str, ...] = ()) -> list[Case]:
    """Cases for one use, of the given losses or of all."""
    return [c for c in CASES if use in c.uses and (not losses or c.loss in losses)]
