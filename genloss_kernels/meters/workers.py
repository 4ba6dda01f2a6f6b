"""Meters in processes of their own: bytes need Triton's interpreter, machine code its compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..cases import BYTES, select
from .bytes import ByteReport, measure

# That in which everything beside the streams weighs the most; ``thorough`` takes all.
BYTE_DTYPES = (torch.bfloat16,)

# What is shared out among more processes than this is small beside starting one.
_MOST = 8


_FIGURES = ("floor", "elements", "sectors", "operator_bytes", "element_ratio", "sector_ratio")


def byte_figures(report: ByteReport) -> dict[str, Any]:
    """A report with its figures spelled out."""
    return (
        asdict(report)
        | {name: getattr(report, name) for name in _FIGURES}
        | {"launches": [report.forward.launches, report.backward.launches]}
        | {"operators": [operation.name for operation in report.forward.operations + report.backward.operations]}
        | {"violations": report.violations()}
    )


def byte_rows(share: int, shares: int, *, thorough: bool, known: Mapping[str, str]) -> dict[str, Any]:
    """This share of the byte reports."""
    torch.set_num_threads(1)
    tasks = [(case, dtype) for case in select(BYTES) for dtype in case.dtypes if thorough or dtype in BYTE_DTYPES]
    rows = []
    for case, dtype in tasks[share::shares]:
        rows.append(byte_figures(measure(case, "cpu", dtype)))
    return {"rows": rows}


def machine_code_rows(share: int, shares: int, *, thorough: bool, known: Mapping[str, str]) -> dict[str, Any]:
    from .machine_code import gate

    verdict = asdict(gate(share, shares, thorough=thorough, known=known))
    return {"rows": verdict["main"] + verdict["others"], **verdict}


def limit_rows(share: int, shares: int, *, thorough: bool, known: Mapping[str, str]) -> dict[str, Any]:
    from .limits import limits
    from .main_configurations import main_specialisations

    return {"rows": [asdict(limit) for limit in limits(main_specialisations()[share::shares])]}


_METERS = {
    "bytes": (byte_rows, {"TRITON_INTERPRET": "1"}),
    "machine code": (machine_code_rows, {"TRITON_INTERPRET": None}),
    "limits": (limit_rows, {"TRITON_INTERPRET": None}),
}


def share_of(meter: str, share: int, shares: int, *, thorough: bool, known: Mapping[str, str]) -> dict[str, Any]:
    """What one share of a meter reports; this process must be one in which it can run."""
    return _METERS[meter][0](share, shares, thorough=thorough, known=known)


def run(meter: str, *, thorough: bool = False, known: Mapping[str, str] = MappingProxyType({})) -> list[dict[str, Any]]:
    """Run a meter in as many processes as there are cores; returns what each share reports.

    ``known``: digests of kernels of whose machine code the main calls are enough.
    """
    shares = min(_MOST, os.cpu_count() or 1)
    # One thread each: the processes are the parallelism.
    changes: dict[str, str | None] = {"OMP_NUM_THREADS": "1", "GENLOSS_DEBUG": None, **_METERS[meter][1]}
    environment = {name: value for name, value in os.environ.items() if name not in changes}
    environment |= {name: value for name, value in changes.items() if value is not None}
    # This package, wherever it was imported from.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "genloss_kernels.meters._worker", meter]
    processes = [
        subprocess.Popen(
            [*command, str(share), str(shares), str(int(thorough)), json.dumps(dict(known))],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for share in range(shares)
    ]
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"measuring {meter} failed: see the message above")
    return [json.loads(text) for text in printed]
