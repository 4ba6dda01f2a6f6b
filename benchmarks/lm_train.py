"""One training run for train_lm.py, with its loss curve, step times and peak memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lm_data import batches
from lm_model import Decoder
from runs import Run, measure, perturb_by_one_ulp
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

    def steps() -> Iterator[Callable[[], float]]:
        for inputs, labels in tqdm(stream, desc=name, total=config.steps, leave=False, disable=None):
            yield partial(_step, model, optimizer, objective, inputs.to(device), labels.to(device), config.dtype)

    return measure(steps(), config.batch * config.seq_len, "tokens", device)


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
