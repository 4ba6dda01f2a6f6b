"""``python -m genloss_kernels meters``: five tables, and what is wrong."""

from __future__ import annotations

import argparse
import json as json_module
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from . import launches, synchronisations, workers
from .limits import LIMIT_TITLES, limit_cells

METERS = ("bytes", "machine code", "limits", "launches", "synchronisations")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="also write every row to this file")
    parser.add_argument(
        "--only",
        metavar="METERS",
        help=f"some of: {', '.join(METERS)}, separated by commas",
        type=_meters,
        default=METERS,
    )
    parser.add_argument(
        "--all", action="store_true", help="all dtypes, layouts and options together: an hour rather than minutes"
    )


def _meters(text: str) -> tuple[str, ...]:
    chosen = tuple(part.strip().replace("_", " ").replace("-", " ") for part in text.split(","))
    for name in chosen:
        if name not in METERS:
            raise argparse.ArgumentTypeError(f"there is no meter {name!r}: choose among {', '.join(METERS)}")
    return chosen


def main(args: argparse.Namespace) -> int:
    return 1 if report(sys.stdout, args.json, args.only, thorough=args.all) else 0


def report(
    out: TextIO | None = None, json: str | None = None, what: Sequence[str] = METERS, *, thorough: bool = False
) -> list[str]:
    """Print the tables of the meters named, optionally write all rows to a file; returns the violated gates."""
    out = sys.stdout if out is None else out
    violations: list[str] = []
    document: dict[str, Any] = {}
    for name in what:
        start = time.perf_counter()
        rows, table, found = _RUN[name](thorough)
        print(f"{name.capitalize()}, {time.perf_counter() - start:.0f} s\n", file=out)
        print(_aligned(table), end="\n\n", file=out, flush=True)
        document[name] = {"rows": rows, "violations": found}
        violations += found
    for violation in violations:
        print(violation, file=out)
    print(f"FAIL: {len(violations)} gates violated" if violations else "PASS: no gate violated", file=out, flush=True)
    if json is not None:
        with open(json, "w", encoding="utf-8") as file:
            json_module.dump(document, file, indent=1)
    return violations


_Result = tuple[list[Any], list[Sequence[str]], list[str]]


def _bytes(thorough: bool) -> _Result:
    shares = workers.run("bytes", thorough=thorough)
    rows = sorted((row for share in shares for row in share["rows"]), key=lambda row: (row["loss"], row["case"]))
    table: list[Sequence[str]] = [
        ("loss", "case", "dtype", "floor, bytes", "by elements", "by sectors", "torch operators", "launches")
    ]
    table += [
        (
            row["loss"],
            row["case"],
            row["dtype"],
            str(row["floor"]),
            f"{row['element_ratio']:.3f}",
            f"{row['sector_ratio']:.3f}",
            str(row["operator_bytes"]),
            " + ".join(map(str, row["launches"])),
        )
        for row in rows
    ]
    return rows, table, [violation for row in rows for violation in row["violations"]]


def _machine_code(thorough: bool) -> _Result:
    shares = workers.run("machine code", thorough=thorough)
    rows = [row for share in shares for row in share["rows"]]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((f"{row['kernel']} {row['formula']}".strip(), row["dtype"]), []).append(row)
    table: list[Sequence[str]] = [
        ("kernel", "dtype", "compiled", "registers", "local bytes", "special", "instructions", "violations")
    ]
    for (kernel, dtype), group in sorted(groups.items()):
        table.append(
            (
                kernel,
                dtype,
                str(len(group)),
                _span(row["registers"] for row in group),
                str(max(row["local_bytes"] for row in group)),
                _span(row["special"] for row in group),
                _span(row["instructions"] for row in group),
                str(sum(len(row["violations"]) for row in group)),
            )
        )
    violations = [violation for row in rows for violation in row["violations"]]
    return rows, table, violations + [failure for share in shares for failure in share["failures"]]


def _span(values: Iterable[float | None]) -> str:
    """Smallest and largest of what was measured."""
    known = sorted({round(value, 2) for value in values if value is not None})
    if not known:
        return "-"
    return f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g} to {known[-1]:g}"


def _limits(thorough: bool) -> _Result:
    rows = [row for share in workers.run("limits") for row in share["rows"]]
    table: list[Sequence[str]] = [LIMIT_TITLES]
    table += [
        limit_cells(row) for row in sorted(rows, key=lambda row: (row["kernel"], row["formula"], row["dtype"], row["label"]))
    ]
    return rows, table, []


def _launches(thorough: bool) -> _Result:
    reports = list(launches.reports())
    table: list[Sequence[str]] = [
        ("loss", "case", "forward: kernels", "torch operators", "backward: kernels", "torch operators")
    ]
    table += [
        (
            r.loss,
            r.case,
            *(
                str(sum(counts.values()))
                for counts in (r.forward.kernels, r.forward.operators, r.backward.kernels, r.backward.operators)
            ),
        )
        for r in reports
    ]
    return [asdict(r) for r in reports], table, [violation for r in reports for violation in r.violations()]


def _synchronisations(thorough: bool) -> _Result:
    reports = synchronisations.reports(thorough=thorough)
    table: list[Sequence[str]] = [("loss", "calls without data", "violations")]
    table += [(r.loss, str(r.calls), str(len(r.violations))) for r in reports]
    return [asdict(r) for r in reports], table, [violation for r in reports for violation in r.violations]


_RUN = {
    "bytes": _bytes,
    "machine code": _machine_code,
    "limits": _limits,
    "launches": _launches,
    "synchronisations": _synchronisations,
}


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns of text, those of figures to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    figures = [all(_is_figure(row[column]) for row in table[1:]) for column in range(len(widths))]
    lines = []
    for row in table:
        cells = (
            cell.rjust(width) if figure else cell.ljust(width)
            for cell, width, figure in zip(row, widths, figures, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_figure(cell: str) -> bool:
    return cell[:1].isdigit() or cell == "-"
