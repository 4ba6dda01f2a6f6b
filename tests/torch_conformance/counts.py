"""How many of torch's own tests of its losses ran here, by loss, source and path.

    export PYTEST_ADDOPTS="--conformance-counts benchmarks/results/conformance.md"
    pytest tests/torch_conformance && TRITON_INTERPRET=1 pytest tests/torch_conformance

Rows of a table that is there are replaced by those of the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple


class Key(NamedTuple):
    loss: str
    source: str
    path: str


@dataclass
class Counts:
    passed: int = 0
    failed: int = 0
    not_applicable: int = 0
    reason: str = ""


SEEN: defaultdict[Key, Counts] = defaultdict(Counts)


@contextmanager
def counted(loss: str, source: str, path: str) -> Iterator[None]:
    """One sample, which passes unless the block raises."""
    counts = SEEN[Key(loss, source, path)]
    try:
        yield
    except BaseException:
        counts.failed += 1
        raise
    counts.passed += 1


def left_out(loss: str, source: str, path: str, number: int, reason: str) -> None:
    if number:
        counts = SEEN[Key(loss, source, path)]
        counts.not_applicable += number
        counts.reason = reason


def read(text: str) -> dict[Key, Counts]:
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    return {Key(*row[:3]): Counts(*map(int, row[3:6]), row[6]) for row in rows if row[0] != "**all**"}


def table(found: dict[Key, Counts]) -> str:
    columns = ("loss", "source in torch", "path", "passed", "failed", "not applicable", "why not")
    everything = Counts(*(sum(getattr(c, n) for c in found.values()) for n in ("passed", "failed", "not_applicable")))
    rows = [*sorted(found.items()), (Key("**all**", "", ""), everything)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += [f"| {' | '.join([*key, str(c.passed), str(c.failed), str(c.not_applicable), c.reason])} |" for key, c in rows]
    head = "Torch's own tests of these losses, run by `pytest tests/torch_conformance`. A sample counts once in each dtype."
    return "\n".join([head, "", *lines, ""])
