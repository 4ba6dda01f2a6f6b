"""One training run for train_lm.py, with its loss curve, step times and peak memory."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lm_data import batches
from lm_model import Decoder, perturb_by_one_ulp
from torch import Tensor
from tqdm import tqdm

CrossEntropy = Callable[..., Any]
Objective = Callable[[Decoder, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """Everything that the runs under comparison have in common."""

    vocab_size: int
    steps: int
    batch: int
    seq_len: int
    dim: int
    layers: int
    seed: int
    lr: float
    device: str
    dtype: str


@dataclass(frozen=True)
class Run:
    """What one training run measured; memory is in bytes."""

    losses: list[float]
    step_seconds: list[float]
    tokens_per_step: int
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
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / statistics.mean(self._warm_step_seconds)

    def summary(self) -> dict[str, Any]:
        return {
            "tokens_per_second": self.tokens_per_second,
            "median_step_seconds": self.median_step_seconds,
            "p10_step_seconds": self.p10_step_seconds,
            "first_step_seconds": self.step_seconds[0],
            "baseline_memory_bytes": self.baseline_memory,
            "peak_memory_bytes": self.peak_memory,
            "losses": self.losses,
            "step_seconds": self.step_seconds,
        }


def loss_from_logits(cross_entropy: CrossEntropy, model: Decoder, inputs: Tensor, labels: Tensor) -> Tensor:
    logits = model(inputs)
    return cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


def loss_from_hidden(linear_cross_entropy: CrossEntropy, model: Decoder, inputs: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(model.hidden(inputs), model.head.weight, labels)


def train(config: Config, tokens: Tensor, objective: Objective, perturb: bool, name: str) -> Run:
    """Train from `config.seed`; `perturb` moves each initial weight by one ulp and changes nothing else."""
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    model = Decoder(config.vocab_size, config.seq_len, config.dim, config.layers)
    if perturb:
        perturb_by_one_ulp(model, config.seed + 1)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    stream = batches(tokens, config.steps, config.batch, config.seq_len, config.seed)

    baseline = _start_memory_count(device)
    losses, step_seconds = [], []
    for inputs, labels in tqdm(stream, desc=name, total=config.steps, leave=False, disable=None):
        start = time.perf_counter()
        losses.append(_step(model, optimizer, objective, inputs.to(device), labels.to(device), config.dtype))
        step_seconds.append(time.perf_counter() - start)
    return Run(losses, step_seconds, config.batch * config.seq_len, baseline, _peak_memory(device))


def _step(
    model: Decoder, optimizer: torch.optim.Optimizer, objective: Objective, inputs: Tensor, labels: Tensor, dtype: str
) -> float:
    # Weights stay in float32: in bfloat16 an AdamW update is often below half an ulp and would be lost.
    with torch.autocast(inputs.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        loss = objective(model, inputs, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    # Read last, so that on an accelerator the wait for it puts the whole step inside the caller's timing.
    return loss.item()


def _start_memory_count(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return _peak_memory(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
