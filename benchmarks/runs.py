"""What one training run measures, and how runs are kept apart."""

import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Run:
    """Loss and time of each step; memory is in bytes. A step handles so many items of the ``unit``."""

    losses: list[float]
    step_seconds: list[float]
    items_per_step: int
    unit: str
    baseline_memory: int
    peak_memory: int

    @property
    def _warm_step_seconds(self) -> list[float]:
        # The first step also pays for kernel compilation and for allocating the optimizer state.
        return self.step_seconds[1:] or self.step_seconds

    @property
    def median_step_seconds(self) -> float:
        return statistics.median(self._warm_step_seconds)

    @property
    def p10_step_seconds(self) -> float:
        """10th percentile: a steadier figure than the median where other work comes and goes on the machine."""
        ordered = sorted(self._warm_step_seconds)
        return ordered[len(ordered) // 10]

    @property
    def items_per_second(self) -> float:
        return self.items_per_step / statistics.mean(self._warm_step_seconds)

    def summary(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "items_per_second": self.items_per_second,
            "median_step_seconds": self.median_step_seconds,
            "p10_step_seconds": self.p10_step_seconds,
            "first_step_seconds": self.step_seconds[0],
            "baseline_memory_bytes": self.baseline_memory,
            "peak_memory_bytes": self.peak_memory,
            "losses": self.losses,
            "step_seconds": self.step_seconds,
        }


def measure(steps: Iterable[Callable[[], float]], items_per_step: int, unit: str, device: torch.device) -> Run:
    """Run the steps, each of which returns its loss as a number, so that an accelerator has finished it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    baseline, losses, step_seconds = peak_memory(device), [], []
    for step in steps:
        start = time.perf_counter()
        losses.append(step())
        step_seconds.append(time.perf_counter() - start)
    return Run(losses, step_seconds, items_per_step, unit, baseline, peak_memory(device))


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.no_grad()
def perturb_by_one_ulp(model: torch.nn.Module, seed: int) -> None:
    """Move every parameter to a neighbouring floating-point number, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        upwards = torch.randint(2, parameter.shape, generator=generator, dtype=torch.bool)
        parameter.copy_(torch.nextafter(parameter, torch.where(upwards, math.inf, -math.inf)))


def call_in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Spawned, not forked: a forked child would start from this process's memory and CUDA state.

    Even so Linux lets the child's ru_maxrss begin at this process's peak: nothing large may happen here.
    """
    # By default OpenMP threads spin while they wait, and one other busy process makes a step several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def call_here(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
