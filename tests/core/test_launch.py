"""Counting and observing launches, and the table of tiles."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

import genloss_kernels as gk
from genloss_kernels.core import launch as launching
from genloss_kernels.core.launch import RowsTile, launch, observe_launches, row_tile, rows_tile, splits, whole_rows_tile

CPU = torch.device("cpu")


class _Kernel:
    """Stands in for a kernel and records how it was launched."""

    def __init__(self, name: str = "_kernel") -> None:
        self.__name__ = name
        self.calls: list = []

    def __getitem__(self, grid):
        return lambda *args, **keywords: self.calls.append((grid, args, keywords))


def test_launch_passes_grid_and_arguments() -> None:
    kernel = _Kernel()
    launch(kernel, 3, CPU, 1, "two", BLOCK=4)
    assert kernel.calls == [((3,), (1, "two"), {"BLOCK": 4})]


def test_no_programs_is_no_launch() -> None:
    kernel = _Kernel()
    with gk.testing.count_launches() as launches, observe_launches(lambda *_: pytest.fail("observed")):
        launch(kernel, 0, CPU)
    assert kernel.calls == []
    assert launches.total() == 0


def test_counters_nest_and_end() -> None:
    with gk.testing.count_launches() as outer:
        launch(_Kernel("a"), 1, CPU)
        with gk.testing.count_launches() as inner:
            launch(_Kernel("b"), 1, CPU)
            launch(_Kernel("b"), 7, CPU)
        launch(_Kernel("a"), 1, CPU)
    launch(_Kernel("a"), 1, CPU)
    assert dict(outer) == {"a": 2, "b": 2}
    assert dict(inner) == {"b": 2}


def test_counter_ends_with_an_error_and_equal_counters_are_told_apart() -> None:
    with gk.testing.count_launches() as outer:
        with pytest.raises(RuntimeError, match="stop"), gk.testing.count_launches():
            raise RuntimeError("stop")
        launch(_Kernel(), 1, CPU)
    assert outer.total() == 1


def test_counting_sees_every_thread() -> None:
    """Every launch of many threads is counted, none twice."""
    with gk.testing.count_launches() as launches:
        threads = [threading.Thread(target=lambda: [launch(_Kernel(), 1, CPU) for _ in range(200)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert launches == {"_kernel": 1600}


def test_observers_see_launches_and_may_drop_them() -> None:
    kernel, seen = _Kernel(), []

    def drop(*call) -> bool:
        seen.append(call)
        return False

    with observe_launches(lambda *_: True), gk.testing.count_launches() as launches:
        launch(kernel, 1, CPU, "kept")
        with observe_launches(drop):
            launch(kernel, 2, CPU, "dropped", FLAG=True)
        launch(kernel, 1, CPU, "kept")
    assert seen == [(kernel, 2, ("dropped",), {"FLAG": True})]
    assert [args for _, args, _ in kernel.calls] == [("kept",), ("kept",)]
    assert launches.total() == 3


def test_every_observer_is_called() -> None:
    seen: list[int] = []
    with observe_launches(lambda *_: bool(seen.append(1))), observe_launches(lambda *_: bool(seen.append(2))):
        launch(_Kernel(), 1, CPU)
    assert seen == [1, 2]


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_row_tile(itemsize: int, heavy: bool) -> None:
    """The short tile up to four of them a row."""
    short, long = (launching._HEAVY_ROW_TILES if heavy else launching._ROW_TILES)[itemsize]
    for n_cols, tile in ((1, short), (4 * short.block, short), (4 * short.block + 1, long), (10**6, long)):
        assert row_tile(n_cols, itemsize, heavy=heavy) == tile


def _tiles(values: Iterable[Any]) -> Iterator[launching.Tile]:
    for value in values:
        if isinstance(value, launching.Tile):
            yield value
        elif type(value) in (dict, tuple):
            yield from _tiles(value.values() if isinstance(value, dict) else value)


def test_tiles_are_powers_of_two() -> None:
    tiles = list(_tiles(vars(launching).values()))
    assert {launching.REDUCTION_TILE, launching.SCATTERED_PAIR_ROW_TILE, *launching.PAIR_ROW_TILES.values()} <= set(tiles)
    assert all(n & (n - 1) == 0 for tile in tiles for n in tile)
    assert all(16 <= tile.block <= 32 * 32 * tile.num_warps for tile in tiles)


@pytest.mark.parametrize(
    ("n_cols", "n_inner", "contiguous", "tile"),
    [
        (1, 5, True, RowsTile(64, 16, 4)),
        (16, 5, True, RowsTile(64, 16, 4)),
        (17, 5, True, RowsTile(32, 32, 4)),
        (256, 5, True, RowsTile(4, 256, 4)),
        (5000, 5, True, RowsTile(4, 256, 4)),
        (1000, 4096, False, RowsTile(128, 8, 4)),
        (1000, 128, False, RowsTile(128, 8, 4)),
        (1000, 64, False, RowsTile(64, 16, 4)),
        (1000, 33, False, RowsTile(64, 16, 4)),
        (1000, 2, False, RowsTile(2, 512, 4)),
        (129, 4096, False, RowsTile(128, 8, 4)),
        (128, 4096, False, RowsTile(32, 128, 8)),
        (21, 4096, False, RowsTile(128, 32, 8)),
        (19, 2, False, RowsTile(2, 32, 4)),
        (3, 1, False, RowsTile(1, 8, 4)),
    ],
)
def test_rows_tile(n_cols, n_inner, contiguous, tile) -> None:
    assert rows_tile(n_cols, n_inner, contiguous) == tile


@pytest.mark.parametrize(
    ("n_cols", "itemsize", "vec", "expected"),
    [
        (128, 2, 8, (RowsTile(16, 128, 4), 2)),
        (100, 2, 4, (RowsTile(16, 128, 4), 4)),
        (100, 4, 4, (RowsTile(16, 128, 4), 4)),
        (101, 4, 1, (RowsTile(16, 128, 4), 16)),
        (17, 4, 1, (RowsTile(64, 32, 4), 16)),
        (3, 4, 1, (RowsTile(128, 16, 4), 16)),
        (100, 8, 2, (RowsTile(8, 128, 4), 4)),
        (2, 8, 2, (RowsTile(128, 8, 4), 4)),
    ],
)
def test_whole_rows_tile(n_cols, itemsize, vec, expected) -> None:
    """As many elements in each thread whatever the length, up to 128 rows."""
    assert whole_rows_tile(n_cols, itemsize, vec) == expected


@pytest.mark.parametrize(
    ("programs", "tiles", "processors", "expected"),
    [
        pytest.param(2, 25, 132, 12, id="bounded by the tiles, two a share"),
        pytest.param(2, 4, 132, 2, id="four tiles make two shares"),
        pytest.param(2, 3, 132, 1, id="three tiles stay whole"),
        pytest.param(10, 1000, 132, 26, id="two programs a multiprocessor"),
        pytest.param(264, 1000, 132, 1, id="enough programs"),
        pytest.param(1000, 1000, 132, 1, id="more than enough"),
        pytest.param(0, 1000, 132, 264, id="no program"),
        pytest.param(1, 0, 132, 1, id="no tile"),
    ],
)
def test_splits(programs, tiles, processors, expected) -> None:
    assert splits(programs, tiles, processors) == expected


@pytest.mark.parametrize(
    ("tile", "itemsize", "sizes"),
    [
        (launching.held_row_tile, 2, {2048: 4, 4096: 8, 8192: 16}),
        (launching.held_row_tile, 4, {2048: 4, 4096: 8, 8192: 16}),
        (launching.held_row_tile, 8, {1024: 4, 2048: 8}),
        (launching.held_loss_tile, 2, {1024: 4, 2048: 4, 4096: 4, 8192: 8, 16384: 16, 32768: 32}),
        (launching.held_loss_tile, 4, {1024: 4, 2048: 4, 4096: 4, 8192: 8, 16384: 16, 32768: 32}),
        (launching.held_loss_tile, 8, {1024: 4, 2048: 8, 4096: 16, 8192: 32}),
    ],
)
def test_tiles_that_hold_a_row(tile, itemsize, sizes) -> None:
    assert tile(3, itemsize) == launching.Tile(*next(iter(sizes.items())))
    for block, num_warps in sizes.items():
        assert tile(block, itemsize) == launching.Tile(block, num_warps)
        following = tile(block + 1, itemsize)
        assert following is None if block == max(sizes) else following.block == 2 * block
