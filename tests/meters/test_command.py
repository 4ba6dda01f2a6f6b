"""The command's tables, file and exit status."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest

from genloss_kernels import meters
from genloss_kernels.meters import command, workers
from genloss_kernels.meters.synchronisations import SynchronisationReport


def _parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    meters.add_arguments(parser)
    return parser.parse_args(arguments)


def test_meters_are_chosen_by_name() -> None:
    assert _parse().only == meters.METERS
    assert _parse("--only", "bytes, machine-code").only == ("bytes", "machine code")
    with pytest.raises(argparse.ArgumentError, match="there is no meter 'speed'"):
        _parse("--only", "speed")


def _synchronisations(monkeypatch: pytest.MonkeyPatch, *violations: str) -> None:
    found = [SynchronisationReport("cross_entropy", 7, list(violations))]
    monkeypatch.setattr(command.synchronisations, "reports", lambda thorough: found)


def test_a_clean_report_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _synchronisations(monkeypatch)
    file = tmp_path / "meters.json"

    assert meters.main(_parse("--only", "synchronisations", "--json", str(file))) == 0

    assert capsys.readouterr().out.endswith("PASS: no gate violated\n")
    row = {"loss": "cross_entropy", "calls": 7, "violations": []}
    assert json.loads(file.read_text()) == {"synchronisations": {"rows": [row], "violations": []}}


def test_a_violation_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _synchronisations(monkeypatch, "cross_entropy, plain: it waits")

    assert meters.main(_parse("--only", "synchronisations")) == 1

    assert capsys.readouterr().out.endswith("cross_entropy, plain: it waits\nFAIL: 1 gates violated\n")


def test_tables_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    _synchronisations(monkeypatch)
    out = io.StringIO()
    meters.report(out, what=("synchronisations",))

    _, _, header, row, *_ = out.getvalue().splitlines()
    assert header.index("calls") == len("cross_entropy  ")
    assert row.split() == ["cross_entropy", "7", "0"]
    assert len(header) == len(row)


def test_rows_of_subprocesses_become_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"kernel": "k", "formula": "", "dtype": "float32", "label": "x", "registers": 40, "local_bytes": 0}
    machine |= {"special": 1.0, "instructions": 15.06, "violations": []}
    compiled: list[dict[str, Any]] = [
        {"rows": [machine], "failures": ["k does not compile"]},
        {"rows": [machine | {"registers": 64, "special": None, "violations": ["k spills"]}], "failures": []},
    ]
    monkeypatch.setattr(workers, "run", lambda meter, thorough: compiled)
    out = io.StringIO()

    assert meters.report(out, what=("machine code",)) == ["k spills", "k does not compile"]
    assert "40 to 64" in out.getvalue()
    assert "FAIL: 2 gates violated" in out.getvalue()


def test_a_worker_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workers._METERS, "nonsense", (workers.byte_rows, {}))
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 1)
    with pytest.raises(RuntimeError, match="measuring nonsense failed"):
        workers.run("nonsense")
