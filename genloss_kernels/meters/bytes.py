"""Bytes moved by a loss, counted under Triton's interpreter: by kernels' loads and stores, and by torch's operators."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..cases import Case, floor_bytes
from ..core import backend
from .operators import Operation, run_stages, unique_bytes
from .traffic import Traffic, count_memory

# At most this much over the floor: partial sums, and sectors that two tiles share.
RATIO_LIMIT = 1.05


@dataclass
class StageBytes:
    """One direction of a loss."""

    floor: int = 0
    kernels: dict[str, Traffic] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)

    @property
    def operator_bytes(self) -> int:
        return sum(operation.bytes for operation in self.operations)

    @property
    def elements(self) -> int:
        return sum(traffic.elements for traffic in self.kernels.values()) + self.operator_bytes

    @property
    def sectors(self) -> int:
        return sum(traffic.sectors for traffic in self.kernels.values()) + self.operator_bytes

    @property
    def launches(self) -> int:
        """Kernels, and torch operators that would launch one on a GPU."""
        return sum(traffic.launches for traffic in self.kernels.values()) + len(self.operations)


@dataclass
class ByteReport:
    """Bytes of a case, forward and backward, beside the floor below which no implementation can go."""

    loss: str
    case: str
    dtype: str
    forward: StageBytes
    backward: StageBytes

    @property
    def floor(self) -> int:
        return self.forward.floor + self.backward.floor

    @property
    def elements(self) -> int:
        return self.forward.elements + self.backward.elements

    @property
    def sectors(self) -> int:
        return self.forward.sectors + self.backward.sectors

    @property
    def operator_bytes(self) -> int:
        return self.forward.operator_bytes + self.backward.operator_bytes

    @property
    def element_ratio(self) -> float:
        return self.elements / self.floor

    @property
    def sector_ratio(self) -> float:
        return self.sectors / self.floor

    def violations(self) -> list[str]:
        ratios = (("elements", self.element_ratio), ("sectors", self.sector_ratio))
        where = f"{self.loss}, {self.case}, {self.dtype}"
        return [
            f"{where}: {ratio:.3f} of the floor by {name}, over {RATIO_LIMIT}"
            for name, ratio in ratios
            if ratio > RATIO_LIMIT
        ]


def measure(case: Case, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ByteReport:
    """Bytes that ``case`` moves in ``dtype``, forward and backward."""
    call = case.call(device, dtype)
    # A GPU's checks: those that read values run on CPU tensors alone.
    with backend.backend("triton"), backend.device_semantics(), count_memory() as memory:
        counted = []
        forward, backward = run_stages(case, call, lambda: counted.append(memory.take()))
        counted.append(memory.take())
    floor = floor_bytes(call, forward.result)
    gradients = sum(unique_bytes(call.arguments[name]) for name in call.differentiable)
    loss_bytes = unique_bytes(forward.result)
    operands = (floor - gradients - loss_bytes) // 2
    return ByteReport(
        case.loss,
        case.name,
        str(dtype).removeprefix("torch."),
        StageBytes(operands + loss_bytes, counted[0], forward.operations),
        StageBytes(operands + gradients, counted[1], backward.operations),
    )
