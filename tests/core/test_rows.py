"""Addresses of rows, and the cut of a row at its aligned elements."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from genloss_kernels.core.rows import aligned_row, edge_columns, row_offset

pytestmark = pytest.mark.interpreter


@triton.jit
def _offset_kernel(rows_ptr, out_ptr, shape, strides, N: tl.constexpr):
    for i in tl.static_range(N):
        tl.store(out_ptr + i, row_offset(tl.load(rows_ptr + i), shape, strides))


@triton.jit
def _block_offset_kernel(out_ptr, shape, strides, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tl.store(out_ptr + rows, row_offset(rows, shape, strides))


@triton.jit
def _aligned_kernel(out_ptr, offset, n_cols, VEC: tl.constexpr, RAGGED: tl.constexpr):
    head, first, body = aligned_row(tl.cast(offset, tl.int64), n_cols, VEC, RAGGED)
    tl.store(out_ptr, head.to(tl.int64))
    tl.store(out_ptr + 1, first)
    tl.store(out_ptr + 2, body)


@triton.jit
def _edge_kernel(out_ptr, head, body, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane, edge_columns(lane, head, body))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((7,), (3,)), ((2, 3), (100, 7)), ((2, 3, 4), (1000, 5, 70)), ((3, 1), (0, 5)), ((2, 3, 2, 2), (9, 1, 50, 7))],
)
def test_row_offset(device: torch.device, shape, strides) -> None:
    n = int(np.prod(shape))
    out = torch.full((64,), -1, dtype=torch.int64, device=device)
    _block_offset_kernel[(1,)](out, shape, strides, BLOCK=64)
    index = np.unravel_index(np.arange(n), shape)
    wanted = sum(i * s for i, s in zip(index, strides, strict=True))
    assert out[:n].tolist() == wanted.tolist()


def test_known_failure_int32_row_offsets(device: torch.device) -> None:
    """Offsets of 2**31 elements and more wrapped around in int32 (pytorch #111484, fla #1080, trl #7266)."""
    shape, strides = (5, 70000), (50257 * 70000, 50257)
    rows = [0, 1, 42729, 42730, 69999, 70000, 349999]
    out = torch.empty(len(rows), dtype=torch.int64, device=device)
    _offset_kernel[(1,)](torch.tensor(rows, device=device), out, shape, strides, N=len(rows))
    assert out.tolist() == [row * 50257 for row in rows]


@pytest.mark.parametrize(
    ("offset", "n_cols", "vec", "expected"),
    [
        pytest.param(0, 50, 8, (0, 0, 48), id="aligned row of a ragged length"),
        pytest.param(1, 50, 8, (7, 8, 40), id="one past an aligned element"),
        pytest.param(15, 50, 8, (1, 16, 48), id="one before an aligned element"),
        pytest.param(3, 4, 8, (4, 7, 0), id="a row that ends before any aligned element"),
        pytest.param(2, 6, 4, (2, 4, 4), id="ends on a vector"),
        pytest.param(2**31 + 1, 50257, 4, (3, 2**31 + 4, 50252), id="far out"),
    ],
)
def test_aligned_row(device: torch.device, offset, n_cols, vec, expected) -> None:
    out = torch.empty(3, dtype=torch.int64, device=device)
    _aligned_kernel[(1,)](out, offset, n_cols, VEC=vec, RAGGED=True)
    assert tuple(out.tolist()) == expected


def test_a_row_of_whole_vectors_has_no_edges(device: torch.device) -> None:
    out = torch.empty(3, dtype=torch.int64, device=device)
    _aligned_kernel[(1,)](out, 24, 48, VEC=8, RAGGED=False)
    assert out.tolist() == [0, 24, 48]


def test_edges_and_body_cover_a_row_once(device: torch.device) -> None:
    for offset, n_cols in ((5, 50), (0, 51), (3, 4), (6, 2)):
        cut = torch.empty(3, dtype=torch.int64, device=device)
        _aligned_kernel[(1,)](cut, offset, n_cols, VEC=8, RAGGED=True)
        head, first, body = cut.tolist()
        edges = torch.empty(16, dtype=torch.int32, device=device)
        _edge_kernel[(1,)](edges, head, body, BLOCK=16)
        columns = [head + c for c in edges.tolist() if c < n_cols - head] + [head + c for c in range(body)]
        assert sorted(columns) == list(range(n_cols)), (offset, n_cols)
        assert first == offset + head
