"""Cases of linear cross entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from .case import BENCH, DOCTOR, Call, Case, table, torchs
from .cross_entropy import cross_entropy_oracle
from .draws import labels


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


def _linear(
    n_rows: int, width: int, n_classes: int, bias: bool = False, probabilities: bool = False, **options: Any
) -> Callable[..., Call]:
    """Hidden states and a layer whose logits vary by some units; every third row of labels is ignored."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        target = labels(generator, device, n_classes, n_rows, ignored=True)
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


_case = table(linear_cross_entropy=linear_cross_entropy_oracle)


def linear_cross_entropy() -> Iterator[Case]:
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
