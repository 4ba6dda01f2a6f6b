"""At infinities and extremes both paths give the exact limit, or what is documented, where the usual way may not."""

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
    # Half precision is rounded once.
    precision = max(torch.finfo(operand.dtype).eps for operand in row.operands)
    rel = 4 * precision if precision < 1e-6 else 0.5 * precision
    for part, wanted in zip(found, row.instead or row.limit, strict=True):
        assert part == pytest.approx(wanted, rel=rel, abs=torch.finfo(torch.float32).tiny, nan_ok=True)


def test_table_has_a_row_for_each() -> None:
    assert len(table().splitlines()) == 2 + len(EXTREMES)
