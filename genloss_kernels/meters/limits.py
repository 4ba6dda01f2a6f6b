"""What bounds each kernel: its bytes, instructions and special functions an element, over what a device can do of each.

A count, not a measurement: the least time that the main loop of the compiled kernel could take if all else were free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .hardware import H200, Device, occupancy, resident_programs
from .machine_code import Machine, read
from .specialisations import Specialisation
from .streams import streams

_LANES = 32


class Times(NamedTuple):
    """Least seconds an element of each kind of work, on a whole device."""

    memory: float
    issue: float
    special: float

    @property
    def bound(self) -> str:
        """The kind that takes the longest."""
        return self._fields[self.index(max(self))]

    @property
    def memory_share(self) -> float:
        """Share of memory's speed that could be reached at most."""
        return self.memory / max(self)


def times(bytes_moved: float, instructions: float, special: float, device: Device = H200) -> Times:
    """Times of an element that moves these bytes and takes as many instructions, of which ``special`` special ones."""
    return Times(
        bytes_moved / device.memory,
        instructions * device.seconds(device.lanes),
        special * device.seconds(device.special),
    )


@dataclass
class Limit:
    """One kernel in one main configuration.

    ``bytes``, ``instructions`` and ``special`` are of an element and ``kilobytes_in_flight`` of a multiprocessor: what
    one turn of the main loop loads, in all threads that are resident.
    """

    kernel: str
    formula: str
    dtype: str
    label: str
    bytes: int
    instructions: float
    special: float
    registers: int
    shared_bytes: int
    occupancy: float
    kilobytes_in_flight: float
    bound: str
    memory_share: float


def limit(kernel: Specialisation, machine: Machine, device: Device = H200) -> Limit | None:
    """The limit of a kernel that goes over streams of elements; None for those that add up a few numbers."""
    moved = streams(kernel)
    if moved is None or machine.instructions is None or machine.special is None:
        return None
    bytes_moved = sum(moved.loads) + sum(moved.stores)
    needed = times(bytes_moved, machine.instructions, machine.special, device)
    resources = (device, kernel.num_warps, machine.registers, machine.shared_bytes)
    threads = resident_programs(*resources) * kernel.num_warps * _LANES
    return Limit(
        kernel.name,
        kernel.formula,
        kernel.dtype,
        kernel.label,
        bytes_moved,
        machine.instructions,
        machine.special,
        machine.registers,
        machine.shared_bytes,
        occupancy(*resources),
        threads * sum(machine.loads) / 1e3,
        needed.bound,
        needed.memory_share,
    )


LIMIT_TITLES = (
    "kernel", "call", "dtype", "bytes", "instructions", "special", "registers", "shared bytes", "occupancy", "kB in flight",
    "bound", "of memory's speed",
)  # fmt: skip


def limit_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table, of a limit as a dictionary."""
    return (
        f"{row['kernel']} {row['formula']}".strip(),
        row["label"],
        row["dtype"],
        str(row["bytes"]),
        f"{row['instructions']:.1f}",
        f"{row['special']:.2f}",
        str(row["registers"]),
        str(row["shared_bytes"]),
        f"{row['occupancy']:.0%}",
        f"{row['kilobytes_in_flight']:.0f}",
        row["bound"],
        f"{row['memory_share']:.0%}",
    )


def limits(kernels: Sequence[Specialisation], device: Device = H200) -> Iterator[Limit]:
    """Limits of those kernels that have one."""
    for kernel, machine in zip(kernels, read(kernels), strict=True):
        found = limit(kernel, machine, device)
        if found is not None:
            yield found
