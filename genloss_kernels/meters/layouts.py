"""Where rows of classes can lie in memory: one view for each row of the launch tables and each kind of alignment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import launch
from ..core.backend import DEFAULT_MULTIPROCESSORS

# Many rows: no sharing of a row among programs. Few: long rows are shared.
MANY, _FEW = 4 * DEFAULT_MULTIPROCESSORS, 16

_META = torch.device("meta")


class Layout(NamedTuple):
    """Where rows of classes lie: logits (N, C, d1, ...) as a view of an allocation, and how fully it is exercised.

    ``depth`` 2: with each option alone, the fullest and the plain call; 1: plain and fullest; 0: plain.
    """

    name: str
    logits: Tensor
    depth: int


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def shifted(*shape: int, dtype: torch.dtype) -> Tensor:
    """Contiguous, but one element off the alignment of an allocation."""
    size = torch.Size(shape).numel()
    return empty(size + 1, dtype=dtype)[1:].view(shape)


def _row_tiles(columns: int, itemsize: int) -> tuple[launch.Tile, ...]:
    return tuple(launch.row_tile(columns, itemsize, heavy=heavy, device=_META) for heavy in (False, True))


def _row_lengths(itemsize: int) -> list[int]:
    """Row lengths, multiples of 16, that between them use every tile of the table."""
    lengths = {_row_tiles(2**exponent, itemsize): 2**exponent for exponent in range(launch.SHORT_ROW.bit_length(), 18)}
    return list(lengths.values())


def _shared(columns: int, tile: launch.Tile) -> bool:
    return launch.splits(_FEW, columns // tile.block, DEFAULT_MULTIPROCESSORS) > 1


def _row_layouts(dtype: torch.dtype) -> Iterator[Layout]:
    itemsize = dtype.itemsize
    lengths = _row_lengths(itemsize)
    for columns in lengths:
        longest = columns == max(lengths)
        name = f"rows of {columns}"
        # Ragged rows run all of the aligned rows' code and more.
        yield Layout(f"{name}, ragged", empty(MANY, columns - 1, dtype=dtype), 1 + longest)
        yield Layout(f"{name}, aligned", empty(MANY, columns, dtype=dtype), 1 if longest else 0)
        yield Layout(f"{name}, unaligned", shifted(MANY, columns, dtype=dtype), 0)
        if any(_shared(columns, tile) for tile in _row_tiles(columns, itemsize)):
            yield Layout(f"{name}, shared, ragged", empty(_FEW, columns - 1, dtype=dtype), 1 if longest else 0)
            yield Layout(f"{name}, shared, aligned", empty(_FEW, columns, dtype=dtype), 0)
        if not longest:
            continue
        yield Layout(f"{name}, shared, unaligned", shifted(_FEW, columns, dtype=dtype), 0)
        yield Layout(f"{name}, whole vectors", empty(MANY, columns + 16 // itemsize, dtype=dtype), 0)
        yield Layout(f"{name}, strided classes", empty(MANY, 2 * columns, dtype=dtype)[:, ::2], 0)
        yield Layout(f"{name}, one row", empty(1, columns, dtype=dtype), 0)
        for extra, kind in ((0, "aligned"), (1, "ragged")):
            view = empty(MANY, 9, columns + extra, dtype=dtype)[:, :-1].transpose(1, 2)
            yield Layout(f"{name}, {kind}, in two dimensions", view, extra)
            view = empty(MANY, 3, 9, columns + extra, dtype=dtype)[:, :-1, :-1].permute(0, 3, 1, 2)
            yield Layout(f"{name}, {kind}, in three dimensions", view, 0)


def _rows_tiles(columns: int, inner: int, itemsize: int, *, contiguous: bool) -> tuple[launch.RowsTile, ...]:
    return tuple(launch.rows_tile(columns, inner, contiguous, itemsize, heavy=heavy) for heavy in (False, True))


def _tile_layouts(dtype: torch.dtype) -> Iterator[Layout]:
    seen: set[tuple[tuple[launch.RowsTile, ...], bool]] = set()
    for columns in (2**exponent for exponent in range(launch.SHORT_ROW.bit_length())):
        tiles = _rows_tiles(columns, 1, dtype.itemsize, contiguous=True)
        if (tiles, True) not in seen:
            seen.add((tiles, True))
            tile = tiles[0]
            name = f"tile {tile.rows} x {tile.cols}, contiguous classes"
            yield Layout(name, empty(2**14, tile.cols, dtype=dtype), 0)
            depth = {launch.SHORT_ROW: 2, launch.WHOLE_ROW: 1}.get(columns, 0)
            yield Layout(f"{name}, ragged", empty(2**14, tile.cols - 3, dtype=dtype), depth)
    # Triton takes an argument equal to 1 for a constant, so these are kernels of their own.
    yield Layout("one class", empty(MANY, 1, dtype=dtype), 0)
    yield Layout("one short row", empty(1, 10, dtype=dtype), 0)
    yield Layout("one number", empty(1, 1, dtype=dtype), 1)
    for columns in (2**exponent for exponent in range(3, launch.WHOLE_ROW.bit_length())):
        tiles = _rows_tiles(columns, 2**12, dtype.itemsize, contiguous=False)
        if (tiles, False) not in seen:
            seen.add((tiles, False))
            name = f"tile {tiles[0].rows} x {tiles[0].cols}, strided classes"
            yield Layout(name, empty(MANY, columns, 2**12, dtype=dtype), 0)
            yield Layout(f"{name}, ragged", empty(MANY, columns - 1, 2**12 - 1, dtype=dtype), 1)
            for inner in (2, 16):
                yield Layout(f"{name}, {inner} positions", empty(MANY, columns, inner, dtype=dtype), 0)
    finest = _rows_tiles(1024, 2**12, dtype.itemsize, contiguous=False)
    for inner in (2**exponent for exponent in range(12, 0, -1)):
        tiles = _rows_tiles(1024, inner, dtype.itemsize, contiguous=False)
        if (tiles, False) not in seen:
            seen.add((tiles, False))
            tile = tiles[0]
            name = f"tile {tile.rows} x {tile.cols}, strided classes"
            yield Layout(name, empty(MANY, 1024, inner, dtype=dtype), 0)
            if tiles == finest:
                yield Layout(f"{name}, ragged", empty(MANY, 1003, inner - 1, dtype=dtype), 2)
                yield Layout(f"{name}, shared", empty(1, 2**14, inner, dtype=dtype), 1)
                view = empty(MANY, 1024, 8, 2 * inner, dtype=dtype)[..., ::2]
                yield Layout(f"{name}, rows in two dimensions", view, 0)


def layouts(dtype: torch.dtype) -> Iterator[Layout]:
    """Layouts that between them reach every row of the launch tables."""
    yield from _row_layouts(dtype)
    yield from _tile_layouts(dtype)
