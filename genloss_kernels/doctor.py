"""``python -m genloss_kernels doctor``: every kernel on this machine's device against float64."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import cases, info
from .cases import Call, Case
from .core.backend import backend, triton_installed
from .testing import Comparison, compare, count_launches


@dataclass
class Finding:
    """How one case fared in one dtype."""

    loss: str
    case: str
    dtype: str
    tensors: dict[str, Comparison] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None

    def as_json(self) -> dict[str, Any]:
        # JSON has no infinity.
        compared = {
            name: {"error": c.error if math.isfinite(c.error) else str(c.error), "allowed": c.allowed}
            for name, c in self.tensors.items()
        }
        return asdict(self) | {"tensors": compared, "passed": self.passed}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document, to attach to a bug report")
    parser.add_argument("--loss", nargs="+", choices=info.losses(), default=[], metavar="NAME", help="only these losses")


def main(args: argparse.Namespace) -> int:
    out = sys.stderr if args.json else sys.stdout
    device, chosen, explanation = _path()
    print(explanation, _HEADER, sep="\n\n", file=out, flush=True)
    start = time.perf_counter()
    findings = []
    for case in cases.select(cases.DOCTOR, tuple(args.loss)):
        for dtype in case.dtypes:
            with backend(chosen):
                findings.append(examine(case, device, dtype, kernels=chosen == "triton"))
            print(_line(findings[-1]), file=out, flush=True)
    failures = sum(not finding.passed for finding in findings)
    verdict = f"FAIL: {failures} of {len(findings)} rows" if failures else f"PASS: {len(findings)} rows"
    print(f"\n{verdict}, {time.perf_counter() - start:.0f} s", file=out)
    if args.json:
        report = info.environment() | {"device": info.device_name(device), "ran": chosen, "passed": not failures}
        print(json.dumps(report | {"rows": [finding.as_json() for finding in findings]}, indent=1))
    return 1 if failures else 0


def _path() -> tuple[torch.device, str, str]:
    """Where to run what, and how to say so."""
    device = info.default_device()
    name = info.device_name(device)
    if not triton_installed():
        return device, "eager", f"PyTorch operators on {name}. Triton is not installed, so no kernel is checked."
    if device.type == "cuda":
        return device, "triton", f"Triton kernels on {name}"
    if info.interpreter():
        return device, "triton", f"Triton kernels, interpreted on {name}"
    return device, "eager", (
        f"PyTorch operators on {name}. No kernel is checked: that needs a GPU, or TRITON_INTERPRET=1 in the "
        "environment to interpret the kernels on the CPU."
    )  # fmt: skip


def examine(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kernels: bool = False,
    function: Callable[..., Tensor] | None = None,
    like: torch.dtype = torch.float32,
) -> Finding:
    """Compare the loss and its gradients with the float64 oracle; with ``kernels``, each direction has to launch some.

    ``function`` stands in for our loss, and ``like`` is the dtype in which torch's own error is measured.
    """
    finding = Finding(case.loss, case.name, str(dtype).removeprefix("torch."))
    try:
        with count_launches() as launches:
            results = _run(function or case.function, case.call(device, dtype), launches if kernels else None)
        finding.launches = dict(launches)
        # Drawn again, since a loss may have written over its input.
        call = case.call(device, dtype)
        expected = _run(case.oracle, call.fresh(torch.float64))
        yardstick = _run(case.oracle, call.fresh(dtype if case.products and dtype.itemsize == 2 else like))
        for name, result in results.items():
            finding.tensors[name] = compare(result, expected[name], yardstick[name], products=case.products or case.cancels)
        wrong = [name for name, comparison in finding.tensors.items() if not comparison.passed]
        if wrong:
            finding.problem = f"beyond the tolerance: {', '.join(wrong)}"
    except Exception as error:  # a kernel that does not compile or run is a finding like any other
        finding.problem = f"{type(error).__name__}: {error}"
    return finding


def _run(function: Callable[..., Tensor], call: Call, launches: Counter[str] | None = None) -> dict[str, Tensor]:
    """The loss and, under its own name, the gradient of each differentiable argument."""
    loss = function(**call.arguments)
    forward = launches.total() if launches is not None else 0
    loss.backward(_upstream(loss))
    if launches is not None and (forward == 0 or launches.total() == forward):
        raise RuntimeError(f"no kernel was launched in the {'backward' if forward else 'forward'}")
    return {"loss": loss.detach()} | {f"d {name}": grad for name, grad in call.gradients().items()}


def _upstream(loss: Tensor) -> Tensor:
    """An upstream gradient other than 1, exact in every dtype: 0.75 for one loss, -1.5 to 1.5 for many."""
    if loss.dim() == 0:
        return torch.full_like(loss, 0.75)
    steps = torch.arange(loss.numel(), device=loss.device) % 13 - 6
    return (steps * 0.25).to(loss.dtype).view(loss.shape)


_COLUMNS = "{:<4}  {:<33}{:<42}{:<10}{:>10}{:>10}{:>12}{:>10}{:>9}"
_HEADER = _COLUMNS.format("", "loss", "case", "dtype", "error", "allowed", "grad error", "allowed", "launches")


def _line(finding: Finding) -> str:
    """One row of the table: the loss's error, and that of the gradient that comes closest to its allowance."""
    gradients = [c for name, c in finding.tensors.items() if name != "loss"]
    shown = [finding.tensors.get("loss"), max(gradients, key=lambda c: c.share, default=None)]
    figures = [f"{figure:.1e}" for c in shown for figure in (c or (math.nan, math.nan))]
    status = "PASS" if finding.passed else "FAIL"
    line = _COLUMNS.format(
        status, finding.loss, finding.case, finding.dtype, *figures, sum(finding.launches.values()) or "none"
    )  # fmt: skip
    return line if finding.passed else f"{line}\n      {finding.problem}"
