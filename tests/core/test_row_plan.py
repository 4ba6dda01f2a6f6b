"""Plans of a pass over rows: which kernel, which tiles, how wide the loads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genloss_kernels.core import launch, row_plan
from genloss_kernels.core.launch import Tile
from genloss_kernels.core.row_plan import gradient_like, incoming, plan, row_strides


def _aligned(*shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """A tensor that begins ``offset`` elements past a 64-byte boundary."""
    size = torch.Size(shape).numel()
    storage = torch.zeros(size + 64, dtype=dtype)
    start = -storage.data_ptr() % 64 // storage.element_size() + offset
    return storage[start : start + size].view(shape)


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows stay whole unless a test says otherwise, and tiles are what they are here whatever the tuning says."""
    monkeypatch.setattr(row_plan, "multiprocessors", lambda device: 1)
    tiles = {2: (Tile(1024, 4), Tile(4096, 8)), 4: (Tile(512, 4), Tile(2048, 8)), 8: (Tile(256, 4), Tile(1024, 8))}
    monkeypatch.setattr(launch, "_ROW_TILES", tiles)
    monkeypatch.setattr(launch, "_HEAVY_ROW_TILES", {size: (Tile(64, 4), Tile(128, 8)) for size in tiles})
    monkeypatch.setattr(launch, "SHORT_ROW", 256)


# by_rows, block, block_rows, programs, n_splits, split_cols, vec, ragged
ROWS = {
    "aligned": (_aligned(8, 1024), (True, 512, 1, 8, 1, 1024, 4, False)),
    "two bytes": (_aligned(8, 1024, dtype=torch.bfloat16), (True, 1024, 1, 8, 1, 1024, 8, False)),
    "long": (_aligned(8, 2052), (True, 2048, 1, 8, 1, 4096, 4, False)),
    "ragged length": (_aligned(8, 1022), (True, 512, 1, 8, 1, 1024, 4, True)),
    "ragged pitch": (_aligned(8, 1030)[:, :1024], (True, 512, 1, 8, 1, 1024, 4, True)),
    "pitch of whole vectors": (_aligned(8, 1032)[:, :1024], (True, 512, 1, 8, 1, 1024, 4, False)),
    "misaligned base": (_aligned(8, 1024, offset=1), (True, 512, 1, 8, 1, 1024, 1, False)),
    "shortest row of its own": (_aligned(8, 257), (True, 512, 1, 8, 1, 512, 4, True)),
    "one class apart": (_aligned(8, 1024)[:, ::2], (True, 512, 1, 8, 1, 512, 1, False)),
    "short rows": (_aligned(100, 256), (False, 256, 4, 25, 1, 256, 1, False)),
    "short rows, ragged": (_aligned(101, 10), (False, 16, 64, 2, 1, 16, 1, False)),
    "classes in dimension 1": (_aligned(2, 300, 5, 7), (False, 16, 64, 2, 1, 304, 1, False)),
    "few positions": (_aligned(2, 300, 2), (False, 512, 2, 2, 1, 512, 1, False)),
    "strided classes": (_aligned(300, 4).t(), (False, 256, 4, 1, 1, 512, 1, False)),
    "few strided classes": (_aligned(40, 300).t(), (False, 64, 64, 5, 1, 64, 1, False)),
}


@pytest.mark.parametrize("name", ROWS)
def test_plan(name: str) -> None:
    logits, expected = ROWS[name]
    p = plan([logits], torch.zeros(1, dtype=torch.int64).expand(*logits.shape[:1], *logits.shape[2:]))
    assert (p.by_rows, p.block, p.block_rows, p.programs, p.n_splits, p.split_cols, p.vec, p.ragged) == expected
    assert p.n_cols == logits.size(1)
    assert p.n_rows == logits.numel() // logits.size(1)


def test_plan_names_the_rows() -> None:
    logits = torch.zeros(4, 9, 300)[:, :-1].transpose(1, 2)
    target = torch.zeros(4, 9, dtype=torch.int64)[:, 1:]
    p = plan([logits], target)
    assert p.shape == (4, 8)
    assert p.strides == [(2700, 300), (9, 1)]
    assert (p.by_rows, p.n_rows, p.n_cols) == (True, 32, 300)
    merged = plan([torch.zeros(4, 8, 300).transpose(1, 2)], torch.zeros(4, 8, dtype=torch.int64))
    assert merged.shape == (32,)
    assert merged.strides == [(300,), (1,)]


def test_plan_of_probabilities_has_no_strides_for_labels() -> None:
    x = _aligned(8, 1024)
    p = plan([x, x.clone()], None)
    assert p.strides == [(1024,), (1024,), (0,)]


def test_streams_share_their_alignment() -> None:
    x = _aligned(8, 1022)
    assert plan([x, _aligned(8, 1022)], None)[-2:] == (4, True)
    # Rows of the second stream begin elsewhere within a vector.
    assert plan([x, _aligned(8, 1023)[:, :1022]], None)[-2:] == (1, False)
    # Whole vectors in one, ragged in the other.
    assert plan([_aligned(8, 1024), _aligned(8, 1030)[:, :1024]], None)[-2:] == (1, False)
    # The narrowest stream counts.
    assert plan([x, _aligned(8, 1022, dtype=torch.bfloat16)], None)[-2:] == (8, True)
    assert plan([_aligned(8, 1028), _aligned(8, 1028, dtype=torch.bfloat16)], None)[-2:] == (8, True)
    # Classes apart in one stream: no vectors in any.
    assert plan([x, _aligned(1022, 8).t()], None)[-2:] == (1, False)
    assert plan([x, _aligned(8, 1022, offset=2)], None)[-2:] == (1, False)
    # The widest sets the tile.
    assert plan([_aligned(8, 3000, dtype=torch.bfloat16), _aligned(8, 3000)], None).block == 2048


@pytest.mark.parametrize(
    ("streams", "vec"),
    [
        ([_aligned(100, 64)], 4),
        ([_aligned(100, 64, dtype=torch.bfloat16)], 8),
        ([_aligned(100, 100, dtype=torch.bfloat16)], 4),
        ([_aligned(100, 37)], 1),
        ([_aligned(100, 64)[:, :62]], 2),
        ([_aligned(100, 66)[:, :64]], 2),
        ([_aligned(100, 64), _aligned(100, 64, dtype=torch.bfloat16)], 4),
        ([_aligned(100, 64), _aligned(100, 65)[:, 1:]], 1),
        ([_aligned(100, 64, offset=1)], 1),
        ([_aligned(100, 128)[:, ::2]], 1),
        ([_aligned(100, 129)], 1),
    ],
)
def test_whole_rows_are_read_by_what_divides_them(streams: list[Tensor], vec: int) -> None:
    """Up to 16 bytes of the widest stream; without that, or in rows of 129, lane by lane."""
    p = plan(streams, None, whole=True)
    assert (p.by_rows, p.vec) == (False, vec)
    whole = p.n_cols <= 128 and all(s.stride(1) == 1 for s in streams)
    assert (p.chunks, p.block * p.block_rows) == ((16 // vec, 2048) if whole else (1, 1024))
    assert plan(streams, None).vec == 1


def test_heavy_rows_have_tiles_of_their_own() -> None:
    assert plan([_aligned(8, 1024)], None, heavy=True).block == 128
    assert plan([_aligned(8, 1024)], None).block == 512


def test_rows_are_split_to_fill_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_plan, "multiprocessors", lambda device: 132)
    p = plan([_aligned(2, 50257)], None)
    assert (p.n_splits, p.split_cols) == (9, 6144)
    assert (p.n_splits - 1) * p.split_cols < p.n_cols <= p.n_splits * p.split_cols
    assert plan([_aligned(2, 2000)], None)[9:11] == (2, 1024)
    assert plan([_aligned(265, 2000)], None)[9:11] == (1, 2048)
    # Tiles of 16 columns, 63 of them: a share holds at least sixteen.
    p = plan([_aligned(1, 1000, 64)], None)
    assert (p.by_rows, p.block, p.programs, p.n_splits, p.split_cols) == (False, 16, 1, 3, 336)


def test_plan_of_nothing() -> None:
    p = plan([_aligned(0, 1000)], None)
    assert (p.n_rows, p.programs) == (0, 0)
    p = plan([_aligned(3, 0)], None)
    assert (p.n_rows, p.n_cols) == (0, 0)
    p = plan([torch.zeros(0, 5, 4)], None)
    assert (p.n_rows, p.programs) == (0, 0)


def test_row_strides() -> None:
    assert row_strides(torch.empty(2, 3, 4, 5)) == (60, 5, 1)
    assert row_strides(torch.empty(2, 3)) == (3,)


@pytest.mark.parametrize(
    ("tensor", "strides"),
    [
        pytest.param(torch.empty(4, 6), (6, 1), id="dense"),
        pytest.param(torch.empty(6, 4).t(), (1, 4), id="transposed"),
        pytest.param(torch.empty(4, 8)[:, :6], (8, 1), id="small gaps stay"),
        pytest.param(torch.empty(4, 10)[:, :6], (10, 1), id="as large as gaps may be"),
        pytest.param(torch.empty(4, 11)[:, :6], (6, 1), id="large gaps go"),
        pytest.param(torch.empty(4, 6)[:, ::2], (3, 1), id="every other"),
        pytest.param(torch.empty(1, 6).expand(4, 6), (6, 1), id="expanded"),
        pytest.param(torch.empty(5, 9, 7)[:, :-1].transpose(1, 2), (63, 1, 7), id="next-token view"),
        pytest.param(torch.empty(12).as_strided((4, 3), (2, 1)), (3, 1), id="overlapping"),
        pytest.param(torch.empty(40).as_strided((2, 2, 6), (18, 2, 1)), (12, 6, 1), id="overlapping, with gaps"),
        pytest.param(torch.empty(0, 6), (6, 1), id="empty"),
    ],
)
def test_gradient_like(tensor: Tensor, strides: tuple[int, ...]) -> None:
    grad = gradient_like(tensor)
    assert grad.shape == tensor.shape
    assert grad.stride() == strides
    assert grad.dtype == tensor.dtype
    assert grad.data_ptr() != tensor.data_ptr() or tensor.numel() == 0


def test_incoming() -> None:
    assert incoming(None) == (None, 0)
    scalar = torch.ones(())
    assert incoming(scalar)[1] == 0
    spread = torch.ones(()).expand(3, 4)
    assert incoming(spread)[1] == 0
    assert incoming(torch.ones(1, 1))[1] == 0
    grad, stride = incoming(torch.arange(6.0).view(3, 2).t())
    assert stride == 1
    assert grad is not None
    assert grad.is_contiguous()
    assert grad.flatten().tolist() == [0, 2, 4, 1, 3, 5]
    partly = torch.arange(3.0).unsqueeze(1).expand(3, 2)
    grad, stride = incoming(partly)
    assert (stride, grad.flatten().tolist() if grad is not None else None) == (1, [0, 0, 1, 1, 2, 2])
