"""Reading machine code: instructions, and which of them are a kernel's main loop."""

from __future__ import annotations

from genloss_kernels.meters.sass import Instruction, main_body


def _kernel(*lines: str) -> list[Instruction]:
    """Instructions at addresses 0, 16, 32 ..., each ``predicate opcode operands`` with ``-`` for no predicate."""
    kernel = []
    for place, line in enumerate(lines):
        predicate, opcode, *operands = line.split(maxsplit=2)
        kernel.append(Instruction(16 * place, predicate.replace("-", ""), opcode, " ".join(operands)))
    return kernel


def _opcodes(*lines: str) -> list[str]:
    return [i.opcode for i in main_body(_kernel(*lines)).instructions]


def test_widths() -> None:
    kinds = {"LDG.E.U16": 2, "LDG.E": 4, "LDG.E.64": 8, "LDG.E.128.CONSTANT": 16, "STG.E.U8": 1}
    assert {opcode: Instruction(0, "", opcode, "").width for opcode in kinds} == kinds


def test_a_kernel_without_a_loop_is_taken_whole() -> None:
    body = main_body(_kernel("- LDG.E R0", "- STG.E R0", "- EXIT", "- BRA 0x30"))
    assert not body.looped
    assert body.widths("LDG") == body.widths("STG") == [4]


def test_the_loop_that_moves_the_most_is_the_main_one() -> None:
    assert _opcodes(
        "- LDG.E R0", "- LDG.E.U16 R1", "@P0 BRA 0x10", "- LDG.E.128 R2", "- MUFU.EX2 R2", "@!P1 BRA 0x30", "- EXIT"
    ) == ["LDG.E.128", "MUFU.EX2", "BRA"]  # fmt: skip


def test_the_masked_side_of_a_tile_is_left_out_on_whichever_side_it_lies() -> None:
    unmasked, masked = ["- LDG.E.128 R0", "- MUFU.EX2 R0"], ["@P1 LDG.E.U16 R0", "- MUFU.RCP R0"]
    kept = ["BRA", "LDG.E.128", "MUFU.EX2", "BRA"]
    first = ("@P0 BRA 0x40", *unmasked, "- BRA 0x60", *masked, "@P2 BRA 0x0", "- EXIT")
    second = ("@P0 BRA 0x40", *masked, "- BRA 0x60", *unmasked, "@P2 BRA 0x0", "- EXIT")
    assert _opcodes(*first) == [*kept, "BRA"]
    assert _opcodes(*second) == ["BRA", "LDG.E.128", "MUFU.EX2", "BRA"]


def test_a_branch_around_a_slow_path_is_kept() -> None:
    lines = ("- LDG.E.128 R0", "@P0 BRA 0x30", "- DADD R0", "@P1 BRA 0x0", "- EXIT")
    assert _opcodes(*lines) == ["LDG.E.128", "BRA", "DADD", "BRA"]
