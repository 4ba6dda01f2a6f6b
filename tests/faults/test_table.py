"""Every edit of the table still fits, and every test that it names exists."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .table import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_the_edit_fits_and_its_tests_exist(fault: Fault) -> None:
    compile(fault.mutated(ROOT), fault.path, "exec")
    for test in fault.tests:
        file, _, name = test.partition("::")
        functions = [n.name for n in ast.parse((ROOT / file).read_bytes()).body if isinstance(n, ast.FunctionDef)]
        assert not name or name in functions, f"{file} has no {name}"


def test_no_edit_stands_twice() -> None:
    edits = [(fault.file, fault.old, fault.new) for fault in FAULTS]
    assert len(edits) == len(set(edits))
