"""Cases of divergences and entropies of distributions over classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import BENCH, BYTES, DOCTOR, Call, Case, table, torchs
from .draws import FLOAT32, flat, logits, sized


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


def _pair(*shape: int, names: tuple[str, ...] = ("input",), **options: Any) -> Callable[..., Call]:
    """Logits of a student and a teacher; ``names`` get a gradient."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        tensors = {name: logits(generator, device, dtype, *shape) for name in ("input", "target")}
        return Call(tensors | options, names)

    return make


def _one(*shape: int, **options: Any) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        return Call({"logits": logits(generator, device, dtype, *shape), **options}, ("logits",))

    return make


def _divergence(*shape: int, learned: bool = False, **options: Any) -> Callable[..., Call]:
    """Distributions over dimension 1, of which the target's is ``learned`` too or not."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        x, t = (torch.log_softmax(logits(generator, device, torch.float32, *shape), 1) for _ in range(2))
        target = t if options.get("log_target") else t.exp()
        arguments = {"input": x.to(dtype), "target": target.to(dtype), "reduction": "batchmean", **options}
        return Call(arguments, ("input", "target") if learned else ("input",))

    return make


_case = table(
    kl_div=torchs.kl_div,
    kl_div_with_logits=kl_div_with_logits_oracle,
    js_div_with_logits=js_div_with_logits_oracle,
    categorical_entropy=categorical_entropy_oracle,
)


def divergences() -> Iterator[Case]:
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
        yield _case(kl, "distillation", sized(_pair, temperature=2.0), BENCH, builtin=usual, dtypes=(dtype,))
    yield _case(kl, "small batch 64 x 1000", _pair(64, 1000), BENCH, builtin=usual, dtypes=FLOAT32)
    yield _case(js, "distillation", sized(_pair), BENCH, builtin=js_div_with_logits_usual, dtypes=FLOAT32)
    yield _case(
        entropy, "rows", sized(_one, reduction="mean"), BENCH, builtin=categorical_entropy_usual, dtypes=FLOAT32,
        cancels=True,
    )  # fmt: skip


def kl_div() -> Iterator[Case]:
    loss = "kl_div"
    yield _case(loss, "rows 256 x 1024", _divergence(256, 1024), BYTES)
    yield _case(loss, "rows 32 x 1024", _divergence(32, 1024), DOCTOR)
    yield _case(loss, "logarithms, both learned", _divergence(256, 1024, log_target=True, learned=True), BYTES)
    yield _case(loss, "few logarithms, both learned", _divergence(32, 1024, log_target=True, learned=True), DOCTOR)
    yield _case(loss, "both learned", _divergence(61, 257, learned=True, reduction="sum"), DOCTOR)
    yield _case(loss, "per element", _divergence(37, 53, reduction="none"), DOCTOR)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(loss, "rows", flat(_divergence), BENCH, dtypes=(dtype,))
    yield _case(loss, "logarithms", flat(_divergence, log_target=True), BENCH, dtypes=FLOAT32)
