"""The table of torch's own tests: what it counts, and which rows of an earlier one stay."""

from __future__ import annotations

from collections import defaultdict

import pytest

from . import counts
from .counts import Counts, Key


def _key(path: str, loss: str = "MSELoss") -> Key:
    return Key(loss, "module_db", path)


def test_what_is_left_out_for_time_is_not_inapplicable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "SEEN", defaultdict(Counts))
    counts.left_out(*_key("triton"), 0)
    assert not counts.SEEN
    counts.left_out(*_key("triton"), 3)
    counts.not_applicable(*_key("eager"), 2, "torch documents none")
    assert [(c.not_applicable, c.left_out) for c in counts.SEEN.values()] == [(0, 3), (2, 0)]
    text = counts.table(counts.SEEN)
    assert "| **all** |  |  | 0 | 0 | 2 | 3 |" in text
    assert counts.read(text) == counts.SEEN


@pytest.mark.parametrize(
    ("kernels", "eager", "stay"),
    [(True, False, {"eager", "under patch_torch"}), (False, True, {"triton"}), (True, True, set())],
)
def test_rows_of_tests_that_are_no_more_go(kernels: bool, eager: bool, stay: set[str]) -> None:
    before = {_key(path, "Gone"): Counts(passed=1) for path in ("eager", "under patch_torch", "triton")}
    seen = {_key("triton" if kernels else "eager"): Counts(passed=2)}
    found = counts.merged(before, seen, kernels=kernels, eager=eager)
    assert {key.path for key in found if key.loss == "Gone"} == stay
    assert seen.items() <= found.items()
