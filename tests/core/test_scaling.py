"""Scaling in place: every factor but 1 reaches every element, and half precision is rounded once."""

from __future__ import annotations

import math

import pytest
import torch

from genloss_kernels.core import scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 2.0, 0.0, -0.3, math.inf])
def test_every_factor(path: str, factor: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_BLOCK", 16)
    tensors = [torch.randn(n).to(dtype) for n in (5, 33, 0)]
    wide = torch.tensor(factor, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = [(t.to(wide.dtype) * wide).to(dtype) for t in tensors]
    scaling.scale_(tensors, wide, triton=path == "triton")
    assert all(map(torch.equal, tensors, wanted))


def test_a_factor_beyond_half_precision(path: str) -> None:
    small = torch.full((4,), 1e-4, dtype=torch.float16)
    wanted = (small.float() * 1e6).half()
    scaling.scale_([small], torch.tensor(1e6), triton=path == "triton")
    assert torch.equal(small, wanted)


def test_memory_with_gaps(path: str) -> None:
    """Of which there is more than elements."""
    padded = torch.randn(40, 128)[:, :3]
    wanted = padded * 2.0
    scaling.scale_([padded], torch.tensor(2.0), triton=path == "triton")
    assert torch.equal(padded, wanted)
