"""Clock, rounds that alternate between candidates, peak memory, and the machine's own rates."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..cases import Call
from .candidates import Candidate

T = TypeVar("T")

# A tiny case is called for so long in one measurement, which makes reading the clock cost nothing, but not more often
# than keeps the graphs between forward and backward few.
_SECONDS, _MOST_CALLS = 5e-3, 200

# Twice the second-level cache of the largest GPU so far (NVIDIA B200, 126 MB).
_FLUSH_BYTES = 2**28

# Large enough to be read from memory, small enough for any machine.
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}

# Rows and columns of a matrix product that reaches the machine's rate.
_MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}

_RATE_ROUNDS = 9

_WARM_UPS = 2

# Rounds that a case gets whatever they take, unless fewer are asked for.
_FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Limit:
    """When a case has been timed enough: after so many rounds, or before that after so many seconds."""

    rounds: int
    seconds: float = math.inf

    def share(self, rounds: int, seconds: float) -> float:
        """How much of it is done, 1 and above for all."""
        return max(rounds / self.rounds, min(seconds / self.seconds, rounds / _FEWEST_ROUNDS))


@dataclass
class Samples:
    """Seconds for one call in each round, and the bytes that one call had allocated at its peak, on a GPU."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def both(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


class Stopwatch:
    """Times work on a device, on a GPU by its own events and with nothing of the operands in its cache."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flushed = None
        if device.type == "cuda":
            self._flushed = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def time(self, work: Callable[[], T]) -> tuple[float, T]:
        """Seconds that ``work`` takes, and what it returns."""
        if self._flushed is None:
            start = time.perf_counter()
            result = work()
            return time.perf_counter() - start, result
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        # While the GPU writes this, the calls queue up: what is timed is the GPU's work and not launching it.
        self._flushed.zero_()
        begin.record()
        result = work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3, result


class Race:
    """Candidates for one case, timed in turns."""

    def __init__(self, candidates: Sequence[Candidate], call: Call, device: torch.device) -> None:
        self._candidates = list(candidates)
        self._call = call
        self._device = device
        self._watch = Stopwatch(device)
        self.samples = {candidate.name: Samples() for candidate in candidates}
        for candidate in self._candidates:
            for _ in range(_WARM_UPS):
                self._time(candidate, 1)
            self.samples[candidate.name].peak_bytes = peak_bytes(
                candidate.function, Call(self._arguments(candidate), call.differentiable), device
            )
        quickest = min(sum(self._time(candidate, 1)) for candidate in self._candidates)
        self.calls = max(1, min(_MOST_CALLS, round(_SECONDS / quickest)))

    def run_round(self) -> None:
        """Time every candidate once, another one first each time."""
        for candidate in self._candidates:
            forward, backward = self._time(candidate, self.calls)
            self.samples[candidate.name].forward.append(forward)
            self.samples[candidate.name].backward.append(backward)
        self._candidates.append(self._candidates.pop(0))

    def _time(self, candidate: Candidate, calls: int) -> tuple[float, float]:
        arguments = [self._arguments(candidate) for _ in range(calls)]
        forward, losses = self._watch.time(lambda: [candidate.function(**each) for each in arguments])
        pairs = list(zip(losses, arguments, strict=True))
        upstream = torch.ones_like(losses[0])
        backward, _ = self._watch.time(lambda: _backward(pairs, self._call.differentiable, upstream))
        return forward / calls, backward / calls

    def _arguments(self, candidate: Candidate) -> dict[str, Any]:
        if not candidate.overwrites:
            return self._call.arguments
        copies = {name: tensor.detach().clone() for name, tensor in self._call.tensors().items()}
        return Call(self._call.arguments | copies, self._call.differentiable).fresh().arguments


def _backward(pairs: list[tuple[Tensor, dict[str, Any]]], differentiable: Sequence[str], upstream: Tensor) -> None:
    for loss, arguments in pairs:
        # Not loss.backward(), which would also time adding up the gradients of several calls.
        torch.autograd.grad(loss, [arguments[name] for name in differentiable], upstream)


def peak_bytes(function: Callable[..., Tensor], call: Call, device: torch.device) -> int | None:
    """Bytes that forward and backward of one call have allocated at their peak; None where nobody counts them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    loss = function(**call.arguments)
    _backward([(loss, call.arguments)], call.differentiable, torch.ones_like(loss))
    return torch.cuda.max_memory_allocated(device) - before


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of a large square matrix product."""
    size = _MATMUL_SIZE[device.type]
    matrix = torch.full((size, size), 1 / size, dtype=dtype, device=device)
    return 2 * size**3 / _seconds(lambda: matrix @ matrix, device)


def _seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    watch = Stopwatch(device)
    work()
    return statistics.median(watch.time(work)[0] for _ in range(_RATE_ROUNDS))
