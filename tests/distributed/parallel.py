"""A module around each loss, trained under DDP and FSDP2, against the mean of what the ranks' batches give one process."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from genloss_kernels import cases

from .world import Case, Ranks


def _smallest() -> dict[str, cases.Case]:
    """Of each loss the case with the fewest elements."""

    def elements(case: cases.Case) -> int:
        return sum(t.numel() for t in case.call().tensors().values())

    found: dict[str, cases.Case] = {}
    for case in sorted(cases.select(cases.DOCTOR), key=elements):
        if not case.autocast:
            found.setdefault(case.loss, case)
    return found


class Scaled(torch.nn.Module):
    """The loss of operands times a learned factor each."""

    def __init__(self, case: cases.Case) -> None:
        super().__init__()
        self.loss, self.names = case.function, case.call().differentiable
        self.factors = torch.nn.Parameter(torch.linspace(0.8, 1.2, 4).repeat(len(self.names), 1))

    def forward(self, arguments: dict[str, Any]) -> Tensor:
        scaled = {name: arguments[name] * self.factors[k].mean() for k, name in enumerate(self.names)}
        return self.loss(**arguments | scaled).sum()


def _train(loss: str, wrapper: str, ranks: Ranks) -> None:
    case = _smallest()[loss]
    model = Scaled(case)
    alone = copy.deepcopy(model)
    batches = [
        {k: v.detach() if isinstance(v, Tensor) else v for k, v in case.call(seed=rank).arguments.items()}
        for rank in range(ranks.size)
    ]
    losses = [alone(batch) for batch in batches]
    torch.stack(losses).mean().backward()
    if wrapper == "fsdp2":
        wrapped: Any = fully_shard(model, mesh=DeviceMesh("cpu", list(range(dist.get_world_size()))))
    else:
        wrapped = DistributedDataParallel(model, process_group=ranks.group)
    found = wrapped(batches[ranks.rank])
    torch.testing.assert_close(found, losses[ranks.rank])
    found.backward()
    grad = model.factors.grad
    torch.testing.assert_close(grad.full_tensor() if isinstance(grad, DTensor) else grad, alone.factors.grad)


CASES: dict[str, Case] = {
    f"{loss} {wrapper}": functools.partial(_train, loss, wrapper) for loss in _smallest() for wrapper in ("ddp", "fsdp2")
}
