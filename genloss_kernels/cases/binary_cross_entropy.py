"""Cases of binary cross entropy, from logits and from probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .case import BENCH, BYTES, DOCTOR, Call, Case, table, torchs
from .draws import FLOAT32, flat, logits


def _binary(*shape: int, weighted: tuple[int, ...] = (), positive: tuple[int, ...] = (), **options: Any) -> Any:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        arguments = {
            "input": logits(generator, device, dtype, *shape),
            "target": torch.rand(shape, generator=generator, device=device).to(dtype),
        }
        for name, size in (("weight", weighted), ("pos_weight", positive)):
            if size:
                arguments[name] = torch.rand(size, generator=generator, device=device).to(dtype) + 0.5
        return Call(arguments | options, ("input",))

    return make


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


_case = table(
    binary_cross_entropy=torchs.binary_cross_entropy,
    binary_cross_entropy_with_logits=torchs.binary_cross_entropy_with_logits,
)


def binary_cross_entropy() -> Iterator[Case]:
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
        yield _case(loss, "elements", flat(_binary), BENCH, dtypes=(dtype,))
    yield _case(loss, "pos_weight[1024]", flat(_binary, positive=(1024,)), BENCH, dtypes=FLOAT32)
    yield _case(loss, "small batch 64 x 100", _binary(64, 100), BENCH, dtypes=FLOAT32)


def binary_cross_entropy_of_probabilities() -> Iterator[Case]:
    loss = "binary_cross_entropy"
    yield _case(loss, "elements 2**18", _certainties(2**18), BYTES)
    yield _case(loss, "elements 2**15", _certainties(2**15), DOCTOR)
    yield _case(loss, "weight[N, 1]", _certainties(61, 257, weighted=(61, 1), reduction="sum"), DOCTOR)
    yield _case(loss, "both learned", _certainties(61, 257, learned=True), DOCTOR)
    yield _case(loss, "per element", _certainties(37, 53, reduction="none"), DOCTOR)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(loss, "elements", flat(_certainties), BENCH, dtypes=(dtype,))
