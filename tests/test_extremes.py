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
    single = torch.finfo(torch.float32)
    for part, wanted in zip(found, row.instead or row.limit, strict=True):
        # As half precision holds it, where the operands are of that.
        held = torch.tensor(wanted, dtype=torch.float64).to(row.operands[0].dtype).tolist()
        assert part == pytest.approx(held, rel=4 * single.eps, abs=single.tiny, nan_ok=True)


def test_table_has_a_row_for_each() -> None:
    assert len(table().splitlines()) == 2 + len(EXTREMES)
