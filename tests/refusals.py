"""What every refused call has in common, and the table of those that runs of the tests have seen.

    export PYTEST_ADDOPTS="-k bad --bad-input-table benchmarks/results/bad_input.md"
    pytest tests/test_bad_input.py tests/losses && TRITON_INTERPRET=1 pytest tests/test_bad_input.py tests/losses

Each adds to the rows of a table that is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core import backend


class Refusal(NamedTuple):
    loss: str
    arguments: str
    path: str
    error: str
    message: str


SEEN: set[Refusal] = set()


def brief(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    place = "" if value.device.type == "cpu" else f"{value.device.type} "
    return f"{place}{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


@contextmanager
def refused(
    loss: str, arguments: Mapping[str, Any], error: type[Exception], message: str
) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """The call within raises ``error`` with ``message``, before any launch; ``arguments`` are those that make it bad."""
    with gk.testing.count_launches() as launches, pytest.raises(error, match=message) as caught:
        yield caught
    assert not launches, f"launched before the check: {launches}"
    given = ", ".join(f"{name}={brief(value)}" for name, value in arguments.items())
    SEEN.add(Refusal(loss, given, backend.current(), type(caught.value).__name__, str(caught.value).strip()))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def read(text: str) -> set[Refusal]:
    """The rows of a table, one for each path."""
    rows = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.replace(r"\|", "|") for cell in row] for row in rows[2:]]
    return {Refusal(loss, given, path, *rest) for loss, given, paths, *rest in cells for path in paths.split(", ")}


def table(seen: set[Refusal]) -> str:
    """Rows that differ only in their path are one row."""
    paths: dict[tuple[str, ...], list[str]] = {}
    for loss, arguments, path, *rest in sorted(seen):
        paths.setdefault((loss, arguments, *rest), []).append(path)
    rows = [(loss, given, ", ".join(on), error, message) for (loss, given, error, message), on in paths.items()]
    head = f"{len(rows)} refused calls, as the tests have seen them: what replaced a good call's arguments, and the answer."
    lines = [head, "", "| loss | argument and value | path | error | message |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines) + "\n"
