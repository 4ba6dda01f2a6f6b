"""Reading compiled kernels back: registers, local memory, and the instructions of the main loop."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# /*04d0*/  @!P2 LDG.E.128 R4, desc[UR12][R14.64] ;
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_TARGET = re.compile(r"0x([0-9a-f]+)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a load or store moves for one thread."""
        return next((_WIDTHS[part] for part in self.opcode.split(".") if part in _WIDTHS), 4)

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = _TARGET.search(self.operands) if self.kind == "BRA" else None
        return int(found[1], 16) if found else None


class Resources(NamedTuple):
    registers: int
    local_bytes: int
    shared_bytes: int


def resources(cubin: bytes) -> Resources:
    """Registers a thread, bytes of local memory a thread (where spills go) and of shared memory a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = _RESOURCES.search(_run("cuobjdump", "-res-usage", file.name))
    if found is None:
        raise RuntimeError("cuobjdump printed no resource usage")
    registers, stack, shared, local = map(int, found.groups())
    return Resources(registers, stack + local, shared)


def disassemble(cubins: Sequence[bytes], architecture: int = 90) -> list[list[Instruction]]:
    """Instructions of each cubin's kernel.

    All in one image: the disassembler takes a third of a second to start and next to nothing for a kernel.
    """
    if not cubins:
        return []
    texts = [_text(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(texts))
        file.flush()
        listing = _run("nvdisasm", "-b", f"SM{architecture}", file.name)
    kernels: list[list[Instruction]] = [[] for _ in texts]
    index, start = 0, 0
    for address, predicate, opcode, rest in _INSTRUCTION.findall(listing):
        place = int(address, 16)
        while place >= start + len(texts[index]):
            start += len(texts[index])
            index += 1
        branches = opcode.startswith("BRA")
        operands = _TARGET.sub(lambda found, start=start: hex(int(found[1], 16) - start), rest) if branches else rest
        kernels[index].append(Instruction(place - start, predicate, opcode, operands))
    return kernels


def _run(tool: str, *arguments: str) -> str:
    import triton.backends.nvidia

    folder = Path(triton.backends.nvidia.__file__).parent / "bin"
    return subprocess.run([folder / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _text(cubin: bytes) -> bytes:
    """Machine code of the kernel in an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]
    for name, _, _, _, offset, length in sections:
        if cubin[strings + name :].startswith(b".text."):
            return cubin[offset : offset + length]
    raise ValueError("the cubin has no .text section")


class Body(NamedTuple):
    """What a thread does for one turn of a kernel's main loop, or in all where nothing is repeated."""

    instructions: list[Instruction]
    looped: bool

    def widths(self, kind: str) -> list[int]:
        """Bytes of each global load (LDG) or store (STG)."""
        return [i.width for i in self.instructions if i.kind == kind]

    def special(self) -> int:
        """Instructions of the special-function unit."""
        return sum(i.kind == "MUFU" for i in self.instructions)


def main_body(kernel: list[Instruction]) -> Body:
    """The loop that moves the most, without the masked alternative of a tile where it has an unmasked one."""
    loops = []
    for instruction in kernel:
        target = instruction.target
        # The last instruction branches to itself, and is never reached.
        if target is not None and target < instruction.address:
            loops.append([i for i in kernel if target <= i.address <= instruction.address])
    if not loops:
        return Body(_unmasked(kernel), False)
    # A loop inside another is the shorter of two that move as much.
    return Body(_unmasked(max(loops, key=lambda loop: (_moved(loop), -len(loop)))), True)


def _moved(instructions: list[Instruction]) -> int:
    return sum(i.width for i in instructions if i.kind in ("LDG", "STG"))


def _unmasked(instructions: list[Instruction]) -> list[Instruction]:
    """Drop one side of the outermost if and else: that whose accesses are predicated, where the other's are not."""
    for place, branch in enumerate(instructions):
        target = branch.target
        if target is None or not branch.predicate or target <= branch.address:
            continue
        inside = [i for i in instructions[place + 1 :] if i.address < target]
        if not inside or inside[-1].kind != "BRA" or inside[-1].predicate or (inside[-1].target or 0) < target:
            continue
        join = inside[-1].target or 0
        otherwise = [i for i in instructions if target <= i.address < join]
        if _unpredicated(inside) == _unpredicated(otherwise):
            continue
        dropped = set(otherwise if _unpredicated(inside) > _unpredicated(otherwise) else inside)
        return [i for i in instructions if i not in dropped]
    return instructions


def _unpredicated(instructions: list[Instruction]) -> int:
    return _moved([i for i in instructions if not i.predicate])
