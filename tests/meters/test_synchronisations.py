"""No call makes the host wait for a GPU: each runs without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from genloss_kernels import cases, functional
from genloss_kernels.meters import synchronisations
from genloss_kernels.meters.configurations import Configuration

from . import exact

pytest.importorskip("triton", reason="running the launchers imports the kernels")


def test_no_call_synchronises() -> None:
    reports = synchronisations.reports()

    assert {r.loss for r in reports} == {c.loss for c in cases.CASES}
    violations = [violation for r in reports for violation in r.violations]
    assert violations == []
    assert len(violations) == exact.load()["synchronisations"]


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: torch.equal(x, x),
        lambda x: x.numpy(),
    ],
    ids=["item", "cpu", "bool", "nonzero", "boolean index", "tolist", "equal", "numpy"],
)
def test_a_look_at_the_values_is_found(look: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    clean = functional.cross_entropy

    def looking(input: Tensor, target: Tensor) -> Tensor:
        look(input.detach())
        return clean(input, target)

    monkeypatch.setattr(functional, "cross_entropy", looking)
    arguments = {"input": torch.empty(4, 8, device="meta"), "target": torch.empty(4, dtype=torch.int64, device="meta")}
    call = Configuration("looks", "cross_entropy", arguments, ("input",))

    (report,) = synchronisations.check([call]).values()

    assert report.calls == len(report.violations) == 1
