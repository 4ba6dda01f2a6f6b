"""What interpreted kernels read and write: every load and store, by elements and by memory sectors."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..core import backend
from ..core.launch import observe_launches

# Bytes that a GPU's memory moves at a time.
SECTOR = 32

# An operand this many times smaller than the launch's largest is a broadcast one, or holds a few values a row. Cache
# keeps it, so it counts once a launch, as it does in the floor; streams that are read twice count twice.
SMALL = 16


@dataclass
class Traffic:
    """Bytes of one kernel's loads and stores: of the elements, and of the sectors that each tile access touches."""

    loaded: int = 0
    stored: int = 0
    loaded_sectors: int = 0
    stored_sectors: int = 0
    launches: int = 0

    @property
    def elements(self) -> int:
        return self.loaded + self.stored

    @property
    def sectors(self) -> int:
        return self.loaded_sectors + self.stored_sectors


class _Cached:
    """The small operands of a launch, and which of their bytes it has touched."""

    def __init__(self, arguments: Any) -> None:
        import numpy

        tensors = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor) and t.numel()]
        spans = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        largest = max(spans.values(), default=0)
        small = sorted((start, size) for start, size in spans.items() if size * SMALL <= largest)
        self._starts = [start for start, _ in small]
        # Loads and stores apart, in bytes and in sectors.
        self._touched = [
            {store: (numpy.zeros(size, bool), numpy.zeros(size // SECTOR + 2, bool)) for store in (False, True)}
            for _, size in small
        ]
        self._sizes = [size for _, size in small]

    def fresh(self, places: Any, size: int, store: bool) -> tuple[int, int] | None:
        """Elements and sectors among ``places`` not touched before, or None for an operand that is not small."""
        import numpy

        lowest = int(places.min())
        index = bisect.bisect_right(self._starts, lowest) - 1
        if index < 0 or lowest >= self._starts[index] + self._sizes[index]:
            return None
        start, (elements, sectors) = self._starts[index], self._touched[index][store]
        offsets = numpy.unique(places - start)
        offsets = offsets[~elements[offsets]]
        elements[offsets] = True
        lines = numpy.unique((offsets + start % SECTOR) // SECTOR)
        lines = lines[~sectors[lines]]
        sectors[lines] = True
        return offsets.size, lines.size


class Memory:
    """Counts what interpreted kernels read and write, by kernel."""

    def __init__(self) -> None:
        self.kernels: dict[str, Traffic] = {}
        self._current = Traffic()
        self._cached = _Cached(())

    def take(self) -> dict[str, Traffic]:
        """What was counted since the last call."""
        taken, self.kernels = self.kernels, {}
        return taken

    def run(self, kernel: Any, programs: int, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
        """Run a launch in the launcher's stead: an observer of launches.

        Outside all dispatch modes, since the copies that the interpreter makes of its arguments are not the library's.
        """
        import numpy

        self._current = self.kernels.setdefault(kernel.__name__, Traffic())
        self._current.launches += 1
        self._cached = _Cached((args, keywords))
        with _disable_current_modes(), numpy.errstate(all="ignore"):
            kernel[(programs,)](*args, **keywords)
        return False

    def load(self, pointers: Any, mask: Any) -> None:
        elements, sectors = self._count(pointers, mask, store=False)
        self._current.loaded += elements
        self._current.loaded_sectors += sectors

    def store(self, pointers: Any, mask: Any) -> None:
        elements, sectors = self._count(pointers, mask, store=True)
        self._current.stored += elements
        self._current.stored_sectors += sectors

    def _count(self, pointers: Any, mask: Any, *, store: bool) -> tuple[int, int]:
        import numpy

        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        # The interpreter's masks are integers at times, which would index.
        live = numpy.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        places = pointers.data[live].astype(numpy.int64)
        if not places.size:
            return 0, 0
        fresh = self._cached.fresh(places, size, store)
        if fresh is not None:
            return fresh[0] * size, fresh[1] * SECTOR
        lines = places // SECTOR
        steps = numpy.diff(lines)
        # Sorting is only needed where the addresses do not ascend.
        distinct = numpy.count_nonzero(steps) + 1 if (steps >= 0).all() else numpy.unique(lines).size
        return places.size * size, int(distinct) * SECTOR


@contextmanager
def count_memory() -> Iterator[Memory]:
    """Count the loads and stores of every kernel launched within; needs Triton's interpreter."""
    if not backend.INTERPRETED:
        raise RuntimeError(
            "bytes are counted under Triton's interpreter: set TRITON_INTERPRET=1 before importing genloss_kernels"
        )
    from triton.runtime.interpreter import interpreter_builder as builder

    memory = Memory()
    # Unmasked accesses and descriptors end in the masked ones, in Triton 3.6 as in 3.9, whose later arguments differ.
    plain_load, plain_store = builder.create_masked_load, builder.create_masked_store

    def load(ptrs: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        memory.load(ptrs, mask)
        return plain_load(ptrs, mask, *rest, **keywords)

    def store(ptrs: Any, value: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        memory.store(ptrs, mask)
        return plain_store(ptrs, value, mask, *rest, **keywords)

    overrides = {"create_masked_load": load, "create_masked_store": store}
    overrides |= {name: _refusal(name) for name in dir(builder) if name.startswith("create_atomic")}
    for name, override in overrides.items():
        setattr(builder, name, override)
    try:
        with observe_launches(memory.run):
            yield memory
    finally:
        for name in overrides:
            delattr(builder, name)


def _refusal(name: str) -> Any:
    def refuse(*args: Any, **keywords: Any) -> Any:
        raise NotImplementedError(f"the byte meter does not count {name}: this library's kernels use no atomics")

    return refuse
