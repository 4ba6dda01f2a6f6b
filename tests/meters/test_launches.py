"""How many kernels and operators a loss launches, and that nothing slips in unnoticed."""

from __future__ import annotations

import pytest
import torch

from genloss_kernels import cases, functional
from genloss_kernels.cases import Case
from genloss_kernels.meters import launches

from . import exact

pytest.importorskip("triton", reason="counting launches imports the kernels")


@pytest.mark.parametrize(
    "case",
    [c for c in cases.CASES if c.uses & {cases.DOCTOR, cases.BYTES} and not c.autocast],
    ids=lambda case: f"{case.loss}, {case.name}",
)
def test_few_launches(case: Case) -> None:
    report = launches.count(case, case.dtypes[0])

    assert not report.violations()
    key = exact.launch_key(report)
    assert exact.differences(key, exact.launch_row(report), exact.load()["launches"].get(key)) == []
    assert report.forward.kernels
    assert report.backward.kernels


def _case() -> Case:
    return next(c for c in cases.CASES if c.loss == "cross_entropy")


def test_an_operator_beside_the_kernels_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = functional.cross_entropy
    monkeypatch.setattr(functional, "cross_entropy", lambda input, *args, **kw: clean(input * 1.0, *args, **kw))

    report = launches.count(_case(), torch.float32)

    assert report.forward.operators == {"aten.mul.Tensor": 1}
    assert report.backward.operators == {"aten.mul.Tensor": 1}
    assert len(report.violations()) == 2


def test_a_second_pass_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = functional.cross_entropy
    monkeypatch.setattr(functional, "cross_entropy", lambda *args, **kw: clean(*args, **kw) + clean(*args, **kw))

    assert any("kernels, over" in violation for violation in launches.count(_case(), torch.float32).violations())
