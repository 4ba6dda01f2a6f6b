"""Puts each failure of the table back into a copy of the library and asks whether its tests notice.

    python -m tests.faults.run                       # all, about ten minutes on two cores
    python -m tests.faults.run --only softcap        # those whose failure or edit says so

Each test runs by itself, first on the unchanged library, where it must pass and must not be empty. Exit status: 0 every
test fails on every fault of its own, 1 one does not, 2 nothing could be measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ..mutation.runner import HarnessError, Runner, TestRun, copy_repository
from .table import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
# Longer than the slowest test takes by several times.
_SECONDS = 900.0


class Finding(NamedTuple):
    fault: Fault
    test: str
    run: TestRun

    @property
    def noticed(self) -> bool:
        return self.run.status != "survived"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    faults = [f for f in FAULTS if options.only.lower() in f"{f.failure} {f.what} {f.file}".lower()]
    pairs = [(fault, test) for fault in faults for test in fault.tests]
    if not pairs:
        print(f"faults: none says {options.only!r}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch, ThreadPoolExecutor(max(1, options.jobs)) as pool:
        snapshot = Path(scratch, "snapshot")
        copy_repository(ROOT, snapshot)
        runner = Runner(snapshot, Path(scratch))
        try:
            list(pool.map(lambda given: _unchanged(runner, *given), sorted({(f.mode, test) for f, test in pairs})))
            findings = []
            for finding in pool.map(lambda given: _found(runner, snapshot, *given), pairs):
                findings.append(finding)
                print(_line(finding), flush=True)
        except HarnessError as error:
            print(f"faults: {error}", file=sys.stderr)
            return 2
        except BaseException:
            runner.stop()
            raise
    missed = [finding for finding in findings if not finding.noticed]
    print(f"{len(faults)} faults of {len({f.failure for f in faults})} failures: {len(findings) - len(missed)} of "
          f"{len(findings)} tests noticed")  # fmt: skip
    if options.out is not None:
        options.out.write_text(_report(findings), encoding="utf-8")
    return 1 if missed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults whose description or file holds this")
    parser.add_argument("--jobs", type=int, default=2, help="tests run at once (default 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table of findings there, as Markdown")
    return parser.parse_args(arguments)


def _unchanged(runner: Runner, mode: str, test: str) -> None:
    run = runner.run([test], _SECONDS, mode=mode)
    if run.returncode != 0:
        raise HarnessError(f"{test}, {mode}, must pass on the unchanged library:\n{run.output}")


def _found(runner: Runner, snapshot: Path, fault: Fault, test: str) -> Finding:
    change = (fault.path, fault.mutated(snapshot))
    return Finding(fault, test, runner.run([test], _SECONDS, change, fault.mode))


def _line(finding: Finding) -> str:
    seen = "noticed" if finding.noticed else "MISSED "
    return f"{seen} {finding.run.seconds:6.1f}s  {finding.fault.failure}: {finding.fault.what} [{finding.test}]"


def _report(findings: list[Finding]) -> str:
    rows = [
        f"| {f.fault.failure} | {f.fault.what} | `{f.fault.file}` | {f.fault.mode} | `{f.test.split('/')[-1]}` "
        f"| {f.run.detail.split('::')[-1] or 'not noticed'} |"
        for f in findings
    ]
    head = "Each failure that shipped elsewhere, put back into a copy of this library by `python -m tests.faults.run`."
    columns = ("failure", "edit", "file", "suite", "test", "failed first")
    return "\n".join([head, "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}", *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
