"""At infinities and extremes both paths give the exact limit, where torch's own and the usual formulas may not."""

from __future__ import annotations

import pytest
import torch

import genloss_kernels as gk

from .extremes import EXTREMES, Extreme, results, table


@pytest.mark.parametrize("row", EXTREMES, ids=str)
@pytest.mark.parametrize("path", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_limit(row: Extreme, path: str) -> None:
    with gk.backend(path), gk.testing.count_launches() as launches:
        found = results(row.ours, row.operands)
    assert (launches.total() > 0) == (path == "triton")
    for part, limit in zip(found, row.limit, strict=True):
        assert part == pytest.approx(limit, rel=4 * torch.finfo(torch.float32).eps, abs=torch.finfo(torch.float32).tiny)


def test_table_has_a_row_for_each() -> None:
    assert len(table().splitlines()) == 2 + len(EXTREMES)
