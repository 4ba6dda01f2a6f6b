"""Random arguments that several families draw, and the shapes of benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import Call

# (rows, columns) of a benchmark on a GPU and on a CPU.
_BENCH_CUDA, _BENCH_CPU = (8192, 128256), (512, 32000)


FLOAT32 = (torch.float32,)


def logits(generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(shape, generator=generator, device=device) * 3.0).to(dtype)


def labels(generator: torch.Generator, device: torch.device, n_classes: int, *shape: int, ignored: bool = False) -> Tensor:
    target = torch.randint(n_classes, shape, generator=generator, device=device)
    if ignored:
        target.view(-1)[::3] = -100
    return target


def scores(options: dict[str, Any], **shapes: tuple[int, ...]) -> Callable[..., Call]:
    """Normal numbers of some size by name, all differentiable."""

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        tensors = {name: logits(generator, device, dtype, *shape) for name, shape in shapes.items()}
        return Call(tensors | options, tuple(tensors))

    return make


def sized(make: Callable[..., Callable[..., Call]], **options: Any) -> Callable[..., Call]:
    """A benchmark's shape: what a large model has on a GPU, what a CPU does in a fraction of a second there."""

    def sized(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        shape = _BENCH_CPU if device.type == "cpu" else _BENCH_CUDA
        return make(*shape, **options)(generator, device, dtype)

    return sized


def flat(make: Callable[..., Callable[..., Call]], **options: Any) -> Callable[..., Call]:
    def sized(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Call:
        rows = 2**12 if device.type == "cpu" else 2**18
        return make(rows, 1024, **options)(generator, device, dtype)

    return sized
