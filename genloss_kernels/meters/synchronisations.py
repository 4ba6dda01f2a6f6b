"""Whether any call waits for a GPU: every launcher and option run on meta tensors, where reading a value raises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..cases import BYTES, CASES, DOCTOR
from .configurations import DTYPES, Configuration, configurations
from .operators import meta_call
from .specialisations import run_on_meta


@dataclass
class SynchronisationReport:
    """Calls of one loss that were run without data, and what went wrong in those that asked for it."""

    loss: str
    calls: int = 0
    violations: list[str] = field(default_factory=list)


def _drop(kernel: Any, programs: int, args: Any, keywords: Any) -> bool:
    return False


def check(calls: Iterable[Configuration]) -> dict[str, SynchronisationReport]:
    """Run calls forward and backward on meta tensors.

    There ``.item()``, ``.cpu()``, ``bool()``, ``nonzero`` and all else that would make the host wait for a GPU raises,
    while checks that may read values of CPU tensors alone do not run.
    """
    reports: dict[str, SynchronisationReport] = {}
    for call in calls:
        report = reports.setdefault(call.loss, SynchronisationReport(call.loss))
        report.calls += 1
        try:
            run_on_meta(call, _drop)
        except Exception as error:
            # Whatever the kind: each says that a call cannot run without its values.
            message = str(error).strip().splitlines() or [""]
            report.violations.append(f"{call.loss}, {call.label}: {type(error).__name__}: {message[0]}")
    return reports


def every_call(*, thorough: bool = False) -> Iterator[Configuration]:
    """Each way of calling each loss, in each dtype."""
    for dtype in DTYPES:
        yield from configurations(dtype, thorough=thorough)
    for case in CASES:
        # Autocast knows no meta tensors.
        if case.uses & {DOCTOR, BYTES} and not case.autocast:
            call = meta_call(case.call("cpu", torch.float32))
            yield Configuration(f"case: {case.name}", case.loss, call.arguments, call.differentiable)


def reports(*, thorough: bool = False) -> list[SynchronisationReport]:
    return list(check(every_call(thorough=thorough)).values())
