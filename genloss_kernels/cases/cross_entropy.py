"""Cases of cross entropy and nll_loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .case import BENCH, BYTES, DOCTOR, Call, Case, table, torchs
from .draws import FLOAT32, labels, logits, sized


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


def _indices(*shape: int, ignored: bool = False, **options: Any) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        target = labels(generator, device, shape[1], shape[0], *shape[2:], ignored=ignored)
        arguments = {"input": logits(generator, device, dtype, *shape), "target": target, **options}
        if arguments.pop("weighted", False):
            arguments["weight"] = torch.rand(shape[1], generator=generator, device=device).to(dtype) + 0.5
        if arguments.pop("row_weighted", False):
            arguments["row_weight"] = torch.rand(target.shape, generator=generator, device=device).to(dtype)
        return Call(arguments, ("input",))

    return make


def _probabilities(*shape: int, **options: Any) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        target = torch.softmax(logits(generator, device, torch.float32, *shape), 1).to(dtype)
        arguments = {"input": logits(generator, device, dtype, *shape), "target": target, **options}
        return Call(arguments, ("input",))

    return make


def _next_token(batch: int, length: int, n_classes: int) -> Callable[..., Call]:
    """The language model's view: logits of all but the last position, classes moved to dimension 1 without a copy."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        rows = logits(generator, device, dtype, batch, length, n_classes)
        target = labels(generator, device, n_classes, batch, length)
        return Call({"input": rows[:, :-1].transpose(1, 2), "target": target[:, 1:]}, ("input",))

    return make


def _strided_classes(rows: int, n_classes: int) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        target = labels(generator, device, n_classes, rows, ignored=True)
        return Call({"input": logits(generator, device, dtype, n_classes, rows).t(), "target": target}, ("input",))

    return make


def _log_probabilities(*shape: int, **options: Any) -> Callable[..., Call]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        call = _indices(*shape, ignored=True, **options)(generator, device, dtype)
        call.arguments["input"] = torch.log_softmax(call.arguments["input"].float(), 1).to(dtype)
        return Call(call.arguments, call.differentiable, gathered=("input",))

    return make


_case = table(cross_entropy=cross_entropy_oracle, nll_loss=torchs.nll_loss)


def cross_entropy() -> Iterator[Case]:
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
        yield _case(loss, "training step", sized(_indices), BENCH, dtypes=(dtype,))
    yield _case(loss, "label smoothing", sized(_indices, label_smoothing=0.1), BENCH, dtypes=FLOAT32)
    yield _case(loss, "small batch 64 x 1000", _indices(64, 1000), BENCH, dtypes=FLOAT32)


def nll_loss() -> Iterator[Case]:
    loss = "nll_loss"
    yield _case(loss, "rows 64 x 1003", _log_probabilities(64, 1003, weighted=True), DOCTOR)
    yield _case(loss, "classes in dimension 1 (2, 19, 9, 7)", _log_probabilities(2, 19, 9, 7, reduction="none"), DOCTOR)
    yield _case(loss, "training step", sized(_log_probabilities), BENCH, dtypes=FLOAT32)
