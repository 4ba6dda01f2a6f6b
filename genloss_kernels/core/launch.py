"""Launching kernels: the one place through which every launch goes, and the tile and warp table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from . import forks, tuned

_lock = forks.lock()
_counters: list[Counter[str]] = []
_observers: list[Callable[[Any, int, tuple[Any, ...], dict[str, Any]], bool]] = []


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Yield a live ``collections.Counter`` of kernel launches by kernel name, over all threads, backward included.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> with gk.backend("eager"), gk.testing.count_launches() as launches:
        ...     _ = gk.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> launches.total()
        0
    """
    counter: Counter[str] = Counter()
    with _lock:
        _counters.append(counter)
    try:
        yield counter
    finally:
        with _lock:
            _counters[:] = [c for c in _counters if c is not counter]


@contextmanager
def observe_launches(observer: Callable[[Any, int, tuple[Any, ...], dict[str, Any]], bool]) -> Iterator[None]:
    """Call ``observer(kernel, programs, args, keywords)`` before each launch, which is dropped where that returns False."""
    with _lock:
        _observers.append(observer)
    try:
        yield
    finally:
        with _lock:
            _observers.remove(observer)


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **keywords: Any) -> None:
    """Launch ``kernel`` on a one-dimensional grid on ``device``; a grid of no programs is no launch."""
    if programs == 0:
        return
    if _counters:
        with _lock:
            for counter in _counters:
                counter[kernel.__name__] += 1
    if _observers:
        # Every observer sees the launch, also where an earlier one drops it.
        wanted = [observer(kernel, programs, args, keywords) for observer in list(_observers)]
        if not all(wanted):
            return
    with _running_on(device):
        kernel[(programs,)](*args, **keywords)


def _running_on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cuda":
        return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    import numpy

    # The interpreter is NumPy, which warns where a GPU computes inf or NaN as it should.
    return numpy.errstate(all="ignore")


class Tile(NamedTuple):
    """Elements that one program holds at once, and the warps that hold them."""

    block: int
    num_warps: int


# 16 elements of 2 bytes or 8 of 4 in a thread are two 16-byte loads in flight; more than 8 warps lengthens the final
# reduction of a row without adding bytes in flight on a multiprocessor that already holds several programs.
_ROW_TILES = {2: (Tile(1024, 4), Tile(4096, 8)), 4: (Tile(512, 4), Tile(2048, 8)), 8: (Tile(256, 4), Tile(1024, 8))}

# With probabilities or statistics a lane carries up to ten numbers: 16 elements in a thread spill, 8 (4 in fp64) do not.
_HEAVY_ROW_TILES = {
    2: (Tile(512, 4), Tile(2048, 8)),
    4: (Tile(512, 4), Tile(2048, 8)),
    8: (Tile(256, 4), Tile(1024, 8)),
}

# With both passes in one kernel 16 elements in each of 256 threads spill, for labels as well, and with coefficients 8 do.
_TWICE_ROW_TILES = {**_ROW_TILES, 2: (Tile(1024, 4), Tile(1024, 4))}
_HEAVY_TWICE_ROW_TILES = {**_HEAVY_ROW_TILES, 2: (Tile(512, 4), Tile(1024, 4))}

# Rows shorter than this share a program: a whole program for 256 columns would leave most lanes masked.
SHORT_ROW = 256

# Rows up to this length fit in one tile in any layout, and nothing of the forward's size is saved for their backward.
WHOLE_ROW = 128

# Tall enough tiles of whole rows for full sectors where the classes are strided, over 8 warps where 4 would spill.
_WHOLE_ELEMENTS, _HEAVY_WHOLE_ELEMENTS = 4096, 2048

# 8 elements in a thread, or 4 where a lane carries more than maximum and total.
_SHORT_ELEMENTS, _HEAVY_SHORT_ELEMENTS = 1024, 512

# 8 elements of each operand in a thread: four operands make enough loads in flight, and twice as many spill.
ELEMENTWISE_TILES = {2: Tile(1024, 4), 4: Tile(1024, 4), 8: Tile(512, 4)}

REDUCTION_TILE = Tile(1024, 4)


def row_tile(
    n_cols: int, itemsize: int, *, heavy: bool = False, twice: bool = False, device: torch.device | None = None
) -> Tile:
    """Tile for one row of ``n_cols`` elements of ``itemsize`` bytes, as tuned for ``device`` if one is given.

    ``heavy`` rows carry more than maximum and total; a kernel that goes over the row ``twice`` keeps both passes' numbers.
    """
    tables = (_ROW_TILES, _TWICE_ROW_TILES), (_HEAVY_ROW_TILES, _HEAVY_TWICE_ROW_TILES)
    short, long = tables[heavy][twice][itemsize]
    kind = f"{'heavy ' if heavy else ''}row{' read twice' if twice else ''}"
    # What counts as short is the default's affair, so that an entry holds for the rows that it was measured on.
    if n_cols <= 4 * short.block:
        return Tile(*tuned.entry(device, f"short {kind}", itemsize, short))
    return Tile(*tuned.entry(device, f"long {kind}", itemsize, long))


# Rows of two operands held in registers: elements of each in a warp, and the most warps that do not spill.
_HELD_ROWS = {2: (512, 16), 4: (512, 16), 8: (256, 8)}

# For two passes over two operands: other tiles with 16-byte loads spill.
PAIR_ROW_TILES = {2: Tile(2048, 8), 4: Tile(512, 4), 8: Tile(512, 4)}

# The same where the elements of a thread do not lie together: the address of each takes registers.
SCATTERED_PAIR_ROW_TILE = Tile(512, 8)


def held_row_tile(n_cols: int, itemsize: int) -> Tile | None:
    """Tile that holds a whole row of each of two operands; None where no program can."""
    elements, most = _HELD_ROWS[itemsize]
    block = max(_power_of_two(n_cols), 4 * elements)
    return Tile(block, block // elements) if block <= most * elements else None


# A row whose exponentials are held between its loss and its gradient, by up to 1024 threads: twice as long rows spill.
_HELD_ROW = {2: (1024, 32), 4: (1024, 32), 8: (256, 32)}

# Both passes over a row that nothing can hold, labels only: one program fills a multiprocessor, so that the rows under way
# (256 kB each for 128k classes in half precision) fit into the second-level cache, 50 MB on an H200. By itemsize, for rows
# that are aligned and for ragged ones, which carry more; none in fp64, where arithmetic and not memory is the limit.
_LONG_ROW_TILES = {2: (Tile(16384, 32), Tile(8192, 32)), 4: (Tile(8192, 32), Tile(8192, 32)), 8: (None, None)}


def held_loss_tile(n_cols: int, itemsize: int) -> Tile | None:
    """Tile that holds a whole row of logits for loss and gradient; None where no program can."""
    elements, most = _HELD_ROW[itemsize]
    block = max(_power_of_two(n_cols), 1024)
    return Tile(block, max(4, block // elements)) if block <= most * elements else None


def long_row_tile(n_cols: int, itemsize: int, *, ragged: bool, device: torch.device) -> Tile | None:
    """Tile for both passes over a row that is too long to hold; None for others."""
    tile = None if held_loss_tile(n_cols, itemsize) else _LONG_ROW_TILES[itemsize][ragged]
    kind = "ragged row read twice, too long to hold" if ragged else "row read twice, too long to hold"
    return tile and Tile(*tuned.entry(device, kind, itemsize, tile))


class RowsTile(NamedTuple):
    """Rows and columns that one program holds at once."""

    rows: int
    cols: int
    num_warps: int


def rows_tile(n_cols: int, n_inner: int, contiguous_cols: bool, itemsize: int = 4, *, heavy: bool = False) -> RowsTile:
    """Tile for many short rows, or for classes that are not the fastest dimension in memory."""
    elements = _HEAVY_SHORT_ELEMENTS if heavy else _SHORT_ELEMENTS
    if contiguous_cols:
        cols = max(16, _power_of_two(min(n_cols, SHORT_ROW)))
    elif n_cols <= WHOLE_ROW:
        cols = max(8, _power_of_two(n_cols))
        elements = (_HEAVY_WHOLE_ELEMENTS if heavy else _WHOLE_ELEMENTS) // (2 if itemsize == 8 else 1)
        elements = min(elements, cols * _power_of_two(n_inner))
        return RowsTile(min(max(1, elements // cols), 128), cols, 8 if elements >= 1024 else 4)
    else:
        # 128 neighbouring positions are 256 to 512 bytes of each class: whole sectors, two to four a warp.
        cols = max(8, elements // min(128, _power_of_two(n_inner)))
        cols = min(cols, max(8, _power_of_two(n_cols)))
    return RowsTile(min(max(1, elements // cols), 128), cols, 4)


# Bytes of each operand's row in a thread in the dtype of arithmetic, 16 elements of fp32: by as many is divided what is done
# for a row, about 100 instructions and 3 shuffles a reduction, in 48 to 72 registers.
_HELD_BYTES = 64


def whole_rows_tile(n_cols: int, itemsize: int, vec: int) -> tuple[RowsTile, int]:
    """Tile of short contiguous rows, each held by few threads, and the chunks of a row that each of these reads."""
    elements = _HELD_BYTES // max(4, itemsize)
    cols = max(elements, _power_of_two(n_cols))
    return RowsTile(min(4 * 32 * elements // cols, 128), cols, 4), elements // vec


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def splits(n_programs: int, n_tiles: int, multiprocessors: int) -> int:
    """Programs among which to share a row's tiles so that few long rows still fill the chip.

    Two programs a multiprocessor, and at least two tiles a program, so that merging stays cheap beside the reading.
    """
    return max(1, min(2 * multiprocessors // max(1, n_programs), n_tiles // 2))
