"""Meters in processes of their own: bytes need Triton's interpreter, machine code its compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..cases import BYTES, select

# That in which everything beside the streams weighs the most; ``thorough`` takes all.
BYTE_DTYPES = (torch.bfloat16,)

# What is shared out among more processes than this is small beside starting one.
_MOST = 8


_FIGURES = ("floor", "elements", "sectors", "operator_bytes", "element_ratio", "sector_ratio")


def byte_rows(share: int, shares: int, *, thorough: bool) -> dict[str, Any]:
    """This share of the byte reports, each with its figures spelled out."""
    from .bytes import measure

    torch.set_num_threads(1)
    tasks = [(case, dtype) for case in select(BYTES) for dtype in case.dtypes if thorough or dtype in BYTE_DTYPES]
    rows = []
    for case, dtype in tasks[share::shares]:
        report = measure(case, "cpu", dtype)
        rows.append(
            asdict(report)
            | {name: getattr(report, name) for name in _FIGURES}
            | {"launches": [report.forward.launches, report.backward.launches]}
            | {"operators": [operation.name for operation in report.forward.operations + report.backward.operations]}
            | {"violations": report.violations()}
        )
    return {"rows": rows}


def machine_code_rows(share: int, shares: int, *, thorough: bool) -> dict[str, Any]:
    from .machine_code import gate

    machines, failures = gate(share, shares, thorough=thorough)
    return {"rows": [asdict(machine) for machine in machines], "failures": failures}


_METERS = {
    "bytes": (byte_rows, {"TRITON_INTERPRET": "1"}),
    "machine code": (machine_code_rows, {"TRITON_INTERPRET": None}),
}


def share_of(meter: str, share: int, shares: int, *, thorough: bool) -> dict[str, Any]:
    """What one share of a meter reports; this process must be one in which it can run."""
    return _METERS[meter][0](share, shares, thorough=thorough)


def run(meter: str, *, thorough: bool = False) -> list[dict[str, Any]]:
    """Run a meter in as many processes as there are cores; returns what each share reports."""
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
            [*command, str(share), str(shares), str(int(thorough))], stdout=subprocess.PIPE, env=environment, text=True
        )
        for share in range(shares)
    ]
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"measuring {meter} failed: see the message above")
    return [json.loads(text) for text in printed]
