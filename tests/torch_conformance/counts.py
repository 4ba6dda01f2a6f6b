"""How many of torch's own tests of its losses ran here, by loss, source and path.

    export PYTEST_ADDOPTS="--conformance-counts benchmarks/results/conformance.md"
    pytest tests/torch_conformance && TRITON_INTERPRET=1 pytest tests/torch_conformance

A run replaces all rows of the paths that it takes, so that none of a test that is no more stays: give it the whole folder.
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
    left_out: int = 0
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


def not_applicable(loss: str, source: str, path: str, number: int, reason: str) -> None:
    counts = SEEN[Key(loss, source, path)]
    counts.not_applicable += number
    counts.reason = reason


def left_out(loss: str, source: str, path: str, number: int) -> None:
    """Samples that apply and would take too long."""
    if number:
        counts = SEEN[Key(loss, source, path)]
        counts.left_out += number
        counts.reason = "interpreted kernels take a spread of the samples, for time"


def read(text: str) -> dict[Key, Counts]:
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    return {Key(*row[:3]): Counts(*map(int, row[3:7]), row[7]) for row in rows if row[0] != "**all**"}


def merged(before: dict[Key, Counts], seen: dict[Key, Counts], *, kernels: bool, eager: bool) -> dict[Key, Counts]:
    """The rows of a run, and earlier ones of paths that it does not take: those of ``kernels`` or the others."""
    return {key: row for key, row in before.items() if not (kernels if key.path == "triton" else eager)} | seen


def table(found: dict[Key, Counts]) -> str:
    numbers = ("passed", "failed", "not_applicable", "left_out")
    columns = ("loss", "source in torch", "path", "passed", "failed", "not applicable", "left out, for time", "why not")
    everything = Counts(*(sum(getattr(c, n) for c in found.values()) for n in numbers))
    rows = [*sorted(found.items()), (Key("**all**", "", ""), everything)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += [f"| {' | '.join([*key, *(str(getattr(c, n)) for n in numbers), c.reason])} |" for key, c in rows]
    head = "Torch's own tests of these losses, run by `pytest tests/torch_conformance`. A sample counts once in each dtype."
    return "\n".join([head, "", *lines, ""])
