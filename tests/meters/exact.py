"""The exact figures of the meters, which any machine finds again: a change in one of them shows in ``exact.json``.

``python -m tests.meters.exact`` writes that file anew, or says which gate is violated. Kernels that have not changed since
are compiled in their main calls alone; ``--all`` compiles every specialisation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from genloss_kernels.meters import launches, synchronisations, workers
from genloss_kernels.meters.launches import LaunchReport

FILE = Path(__file__).with_suffix(".json")
REGENERATE = "if that is meant: python -m tests.meters.exact"

Row = dict[str, Any]

# Tables of the file, and violations of the gates.
Found = tuple[dict[str, Any], list[str]]


def load() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def machine_code_row(machine: Mapping[str, Any]) -> Row:
    """Figures of one kernel in a main call; loads and stores are those of a thread in a turn of its main loop."""
    figures = {name: machine[name] for name in ("registers", "local_bytes", "shared_bytes")}
    ratios = {name: None if machine[name] is None else round(machine[name], 3) for name in ("instructions", "special")}
    widths = {name: _widths(machine[name]) for name in ("loads", "stores")}
    return {**figures, **ratios, **widths}


def _widths(widths: Iterable[int]) -> str:
    """Bytes of accesses and how many there are: 2 x 16 + 1 x 4."""
    return " + ".join(f"{count} x {width}" for width, count in sorted(Counter(widths).items(), reverse=True))


def machine_code_key(machine: Mapping[str, Any]) -> str:
    name = f"{machine['kernel']} {machine['formula']}".strip()
    return f"{name}, {machine['dtype']}: {machine['label']}"


def machine_code(shares: Iterable[Mapping[str, Any]]) -> dict[str, Row]:
    rows = {machine_code_key(machine): machine_code_row(machine) for share in shares for machine in share["main"]}
    return dict(sorted(rows.items()))


def byte_key(row: Mapping[str, Any]) -> str:
    return f"{row['loss']}, {row['dtype']}: {row['case']}"


def byte_row(row: Mapping[str, Any]) -> Row:
    """Bytes of a case, forward and backward together, and launches of each."""
    return {name: row[name] for name in ("floor", "elements", "sectors", "operator_bytes", "launches")}


def launch_key(report: LaunchReport) -> str:
    return f"{report.loss}: {report.case}"


def launch_row(report: LaunchReport) -> Row:
    """Kernels and torch operators, forward and backward."""
    stages = (report.forward, report.backward)
    return {
        "kernels": [sum(stage.kernels.values()) for stage in stages],
        "operators": [sum(stage.operators.values()) for stage in stages],
    }


def differences(key: str, found: Row | None, expected: Row | None) -> list[str]:
    """How a row differs from the file's, in words; more of anything is worse."""
    if found is None or expected is None:
        return [f"{key}: {'gone' if found is None else 'new'}; {REGENERATE}"]
    said = []
    for name in found:
        new, old = found[name], expected.get(name)
        if new != old:
            said.append(f"{key}: {name} {new}, was {old}{_verdict(new, old)}; {REGENERATE}")
    return said


def _verdict(new: Any, old: Any) -> str:
    if isinstance(new, list) and isinstance(old, list):
        new, old = sum(new), sum(old)
    if not isinstance(new, (int, float)) or not isinstance(old, (int, float)) or new == old:
        return ""
    return " (WORSE)" if new > old else " (better)"


def compare(found: Mapping[str, Row], expected: Mapping[str, Row]) -> list[str]:
    """How tables differ, row by row."""
    keys = sorted({*found, *expected})
    return [said for key in keys for said in differences(key, found.get(key), expected.get(key))]


def _machine_code(known: Mapping[str, str]) -> Found:
    import triton

    shares = workers.run("machine code", known=known)
    violations = [violation for share in shares for row in share["rows"] for violation in row["violations"]]
    violations += [failure for share in shares for failure in share["failures"]]
    digests = dict(sorted(shares[0]["digests"].items()))
    return {"triton": triton.__version__, "digests": digests, "machine code": machine_code(shares)}, violations


def _bytes(known: Mapping[str, str]) -> Found:
    rows = [row for share in workers.run("bytes") for row in share["rows"]]
    table = dict(sorted((byte_key(row), byte_row(row)) for row in rows))
    return {"bytes": table}, [violation for row in rows for violation in row["violations"]]


def _launches(known: Mapping[str, str]) -> Found:
    reports = list(launches.reports())
    table = dict(sorted((launch_key(report), launch_row(report)) for report in reports))
    return {"launches": table}, [violation for report in reports for violation in report.violations()]


def _synchronisations(known: Mapping[str, str]) -> Found:
    violations = [violation for report in synchronisations.reports() for violation in report.violations]
    return {"synchronisations": len(violations)}, violations


METERS = {
    "launches": _launches,
    "synchronisations": _synchronisations,
    "machine-code": _machine_code,
    "bytes": _bytes,
}


def text(tables: Mapping[str, Any]) -> str:
    """JSON with a row a line."""
    parts = []
    for name, table in tables.items():
        if isinstance(table, dict):
            rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in table.items())
            parts.append(f" {json.dumps(name)}: {{\n{rows}\n }}")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(table)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="compile unchanged kernels too")
    parser.add_argument("--only", choices=METERS, action="append", help="leave the figures of other meters as they are")
    args = parser.parse_args()
    tables = load()
    known = {} if args.all else tables.get("digests", {})
    violations: list[str] = []
    for name in args.only or METERS:
        found, violated = METERS[name](known)
        tables |= found
        violations += violated
    if violations:
        print(*violations, sep="\n")
        return 1
    FILE.write_text(text(dict(sorted(tables.items()))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
