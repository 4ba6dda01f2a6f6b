"""What a GPU can do at best, by its data sheet, and how many programs of a kernel a multiprocessor holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Limits of one GPU; rates are of a multiprocessor and cycle unless they say otherwise.

    ``lanes``: thread instructions issued, 32 from each of four schedulers. ``special``: results of the special-function
    unit. ``memory``: bytes a second of the whole device, read and written. ``latency``: seconds from a load to its data.
    ``shared_bytes`` of a multiprocessor, of which each program also takes ``reserved_bytes``.
    """

    name: str
    multiprocessors: int
    clock: float
    lanes: int
    special: int
    memory: float
    latency: float
    registers: int
    warps: int
    programs: int
    shared_bytes: int
    reserved_bytes: int

    def seconds(self, per_cycle: int) -> float:
        """Time of one thread's operation where a multiprocessor does ``per_cycle`` of them in a cycle."""
        return 1.0 / (self.multiprocessors * per_cycle * self.clock)

    def bytes_in_flight(self) -> float:
        """Bytes that a multiprocessor must have asked for at any time to keep memory busy, by Little's law."""
        return self.memory * self.latency / self.multiprocessors


# Multiprocessors: NVIDIA's data sheet of the H200 SXM. Rates and sizes: the CUDA programming guide's tables for compute
# capability 9.0. Clock: that of the H100's data sheet, which the H200 keeps under load; at its highest, 1.98 GHz, all but
# memory is 1.13 times as fast. Memory: a copy's speed, read plus write, measured elsewhere; the data sheet says 4.8e12.
# Latency: 700 ns is what microbenchmarks of this generation find under load.
H200 = Device(
    name="H200",
    multiprocessors=132,
    clock=1.755e9,
    lanes=128,
    special=16,
    memory=4.3e12,
    latency=700e-9,
    registers=64 * 1024,
    warps=64,
    programs=32,
    shared_bytes=228 * 1024,
    reserved_bytes=1024,
)

_LANES = 32

# Registers are given to a warp, shared memory to a program, in pieces of these sizes, and warps to four schedulers alike.
_REGISTERS, _SHARED_BYTES, _SCHEDULERS = 256, 128, 4


def resident_programs(device: Device, num_warps: int, registers: int, shared_bytes: int) -> int:
    """Programs that a multiprocessor holds, each of ``num_warps`` warps of threads with ``registers`` registers."""
    of_warp = _up(registers * _LANES, _REGISTERS)
    by_registers = _down(device.registers // of_warp, _SCHEDULERS) // num_warps
    by_shared_bytes = device.shared_bytes // (_up(shared_bytes, _SHARED_BYTES) + device.reserved_bytes)
    return min(by_registers, by_shared_bytes, device.warps // num_warps, device.programs)


def occupancy(device: Device, num_warps: int, registers: int, shared_bytes: int) -> float:
    """Share of a multiprocessor's warps that are there to take turns."""
    return resident_programs(device, num_warps, registers, shared_bytes) * num_warps / device.warps


def _down(n: int, multiple: int) -> int:
    return n // multiple * multiple


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
