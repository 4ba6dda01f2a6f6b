"""The file of exact figures: that it has each row once and no others, and what is said where one differs."""

from __future__ import annotations

import json

from genloss_kernels import cases
from genloss_kernels.meters.workers import BYTE_DTYPES

from . import exact


def test_the_file_has_a_row_for_each_case_and_no_others() -> None:
    counted = {
        f"{case.loss}, {str(dtype).removeprefix('torch.')}: {case.name}"
        for case in cases.select(cases.BYTES)
        for dtype in case.dtypes
        if dtype in BYTE_DTYPES
    }
    launching = {
        f"{case.loss}: {case.name}" for case in cases.CASES if case.uses & {cases.DOCTOR, cases.BYTES} and not case.autocast
    }
    file = exact.load()

    assert set(file["bytes"]) == counted, exact.REGENERATE
    assert set(file["launches"]) == launching, exact.REGENERATE
    assert exact.text(file) == exact.FILE.read_text(encoding="utf-8")


def test_nothing_is_said_of_equal_tables() -> None:
    table = {"a": {"registers": 40, "loads": "2 x 16"}}
    assert exact.compare(table, json.loads(json.dumps(table))) == []


def test_each_difference_is_said_and_which_way_it_goes() -> None:
    found = {"a": {"registers": 41, "special": 1.0, "launches": [2, 1], "loads": "8 x 2"}, "b": {"registers": 16}}
    expected = {"a": {"registers": 40, "special": 2.0, "launches": [2, 2], "loads": "1 x 16"}, "c": {"registers": 16}}

    said = [line.removesuffix(f"; {exact.REGENERATE}") for line in exact.compare(found, expected)]

    assert said == [
        "a: registers 41, was 40 (WORSE)",
        "a: special 1.0, was 2.0 (better)",
        "a: launches [2, 1], was [2, 2] (better)",
        "a: loads 8 x 2, was 1 x 16",
        "b: new",
        "c: gone",
    ]


def test_widths_are_counted() -> None:
    machine = {"kernel": "k", "formula": "f", "dtype": "bfloat16", "label": "a call"}
    machine |= {"registers": 32, "local_bytes": 0, "shared_bytes": 0, "instructions": 15.06251, "special": None}
    machine |= {"loads": [16, 4, 16], "stores": []}

    (row,) = exact.machine_code([{"main": [machine]}]).values()

    assert row["loads"] == "2 x 16 + 1 x 4"
    assert row["stores"] == ""
    assert (row["instructions"], row["special"]) == (15.063, None)
