"""Shapes, some empty, some of one element, odd, or a power of two; the wide ones of more elements than a block."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from genloss_kernels.core.backend import INTERPRETED

from .blocks import ELEMENTS
from .operands import DTYPES

_SIZES = (2, 1, 3, 4, 5, 7, 8, 0)
_WIDE_SIZES = (2, 1, 3, 5, 8, 16, 17, 31, 64, 65, 129)

# Elements of the largest tensor that is drawn, and classes: the interpreter takes a millisecond a program.
_MOST, _MOST_CLASSES = (150, 129) if INTERPRETED else (700, 200)


@st.composite
def shapes(draw: st.DrawFn, *, wide: bool, least: int = 0, most: int = 4) -> tuple[int, ...]:
    """Of ``least`` to ``most`` dimensions."""
    found: list[int] = []
    for _ in range(draw(st.integers(max(least, int(wide)), most))):
        room = _MOST // max(1, math.prod(found))
        found.append(draw(st.sampled_from([n for n in (_WIDE_SIZES if wide else _SIZES) if n <= room])))
    if wide and math.prod(found) <= 2 * ELEMENTS:
        place = draw(st.integers(0, len(found) - 1))
        rest = math.prod(found) // found[place]
        found[place] = 2 * ELEMENTS // rest + draw(st.integers(1, 9))
    return tuple(found)


@st.composite
def class_shapes(draw: st.DrawFn, *, wide: bool, most: int = 2) -> tuple[int, ...]:
    """(C), (N, C) or (N, C, d1, ...) with up to ``most`` dimensions behind the classes."""
    if not wide:
        n_classes = draw(st.sampled_from((3, 1, 2, 7, 10, 16, 17, 33)))
        if draw(st.integers(0, 7)) == 7:
            return (n_classes,)
        rest = draw(st.lists(st.sampled_from((2, 1, 3, 4, 0)), max_size=most))
        return draw(st.sampled_from((2, 1, 3, 5, 0))), n_classes, *rest
    n_classes = draw(st.sampled_from([n for n in (17, 1, 2, 3, 5, 8, 33, 64, 65, 129, 200) if n <= _MOST_CLASSES]))
    rest = draw(st.lists(st.sampled_from((2, 1, 3, 4)), max_size=most if n_classes < 65 else 1))
    inner = n_classes * math.prod(rest)
    return max(2 * ELEMENTS // inner, 1) + draw(st.integers(1, 3)), n_classes, *rest


@st.composite
def row_shapes(draw: st.DrawFn, *, wide: bool) -> tuple[int, ...]:
    """(V) or (N, ..., V)."""
    shape = draw(class_shapes(wide=wide))
    return shape if len(shape) == 1 else (shape[0], *shape[2:], shape[1])


@st.composite
def narrower(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to ``shape``."""
    first = draw(st.integers(0, len(shape)))
    return tuple(1 if draw(st.integers(0, 2)) == 2 else n for n in shape[first:])


Among = tuple[torch.dtype, ...] | None


@st.composite
def dtypes(draw: st.DrawFn, count: int, among: Among = None) -> tuple[torch.dtype, ...]:
    """Mostly one for all; of those ``among`` which to choose always one."""
    if among is None and draw(st.integers(0, 3)) == 3:
        return tuple(draw(st.sampled_from(DTYPES)) for _ in range(count))
    return (draw(st.sampled_from(among or DTYPES)),) * count
