"""Ours against torch's built-ins under pytest-benchmark: ``pytest benchmarks``.

The cases are those of ``python -m genloss_kernels bench``, which alternates between candidates and is the better judge
of small differences; this suite keeps a history (``--benchmark-autosave``, ``--benchmark-compare``).
"""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from genloss_kernels import cases, info
from genloss_kernels.bench.candidates import BUILTIN, OURS, builtin
from genloss_kernels.bench.timing import peak_bytes
from genloss_kernels.cases import Case, floor_bytes, floor_flops
from genloss_kernels.doctor import examine

DEVICE = info.default_device()
CASES = [
    pytest.param(case, dtype, id=f"{case.loss}-{case.name}-{str(dtype).removeprefix('torch.')}".replace(" ", "_"))
    for case in cases.select(cases.BENCH)
    for dtype in case.dtypes
]


@functools.cache
def problem(case: Case, dtype: torch.dtype) -> str | None:
    """Why our loss must not be timed."""
    return examine(case, DEVICE, dtype).problem


@pytest.mark.parametrize("candidate", [OURS, BUILTIN])
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_forward_and_backward(benchmark: BenchmarkFixture, case: Case, dtype: torch.dtype, candidate: str) -> None:
    wrong = problem(case, dtype)
    if candidate == OURS and wrong is not None:
        pytest.fail(wrong)
    function = case.function if candidate == OURS else builtin(case)
    call = case.call(DEVICE, dtype)
    leaves = [call.arguments[name] for name in call.differentiable]

    def step() -> None:
        torch.autograd.grad(function(**call.arguments).sum(), leaves)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.loss}: {case.name}, {dtype}"
    shapes = {name: list(tensor.shape) for name, tensor in call.tensors().items()}
    benchmark.extra_info |= {
        "shapes": shapes, "dtype": str(dtype), "peak_bytes": peak_bytes(function, call, DEVICE), **info.environment(),
    }  # fmt: skip
    benchmark(step)
    if benchmark.stats is not None:  # as with --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {
            "GB/s": floor_bytes(call, function(**call.arguments)) / seconds / 1e9,
            "TFLOP/s": floor_flops(call) / seconds / 1e12,
        }
