"""The command that makes the table: when it fails, and what it says of losses that have no blocks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from . import __main__ as command
from .tally import INVARIANT, NARROW, WHOLE, WIDE

HELD = {NARROW: 5, WIDE: 5, INVARIANT: 2}


@pytest.mark.parametrize(
    ("statuses", "held", "code"),
    [
        ((0, 0), HELD, 0),
        ((0, 1), HELD, 1),
        ((-9, 0), HELD, 1),
        ((0, 0), {NARROW: 10, WHOLE: 1}, 0),
        ((0, 0), {NARROW: 5, WIDE: 4}, 1),
        ((0, 0), {INVARIANT: 10}, 1),
        ((0, 0), {}, 1),
    ],
)
def test_exit_status(
    statuses: tuple[int, int], held: dict[str, int], code: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def run(path: str, examples: int, seed: int, workers: int, figures: Path) -> int:
        with figures.open("a") as file:
            file.writelines(f"{json.dumps(['a loss', path, kind, count])}\n" for kind, count in held.items())
        return statuses[path == "triton"]

    monkeypatch.setattr(command, "_run", run)
    monkeypatch.setattr(sys, "argv", ["", "--examples", "11", "--kernel-examples", "10"])
    assert command.main() == code
    row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| a loss")]
    assert bool(row) == bool(held)
    if WHOLE in held:
        assert row == ["| a loss | 10 | - | 0 | 0 | 10 | - | 0 | 0 |"]
