"""Tensors of any shape, memory layout, dtype and kind of values: drawn as a plan, made from a seed."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Of normal numbers: among them equal ones, close ones, and ones that leave a softmax one class; and of those on a grid.
SCALES = (1.0, 0.0, 2.0**-10, 4.0, 32.0)
UNEVEN_SCALES = SCALES[:1] + SCALES[2:]
GRID_SCALES = SCALES[:1] + SCALES[3:]
OFFSETS = (0.0, 0.0, 40.0, -40.0)


@dataclass(frozen=True)
class Values:
    """``kind`` is a key of ``_KINDS``; the rest is what that reads."""

    kind: str = "normal"
    scale: float = 1.0
    offset: float = 0.0
    dim: int = 0
    classes: int = 1
    ignored: int | None = None

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return _KINDS[self.kind](self, shape, generator)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _normal(values: Values, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64) * values.scale + values.offset


def _grid(values: Values, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers to which float32 adds a small integer exactly."""
    return (_normal(values, shape, generator) * 256.0).round() / 256.0


def _positive(values: Values, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _uniform(shape, generator) * values.scale + 0.25


def _probability(values: Values, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Some of them certain."""
    return (_uniform(shape, generator) * 1.1 - 0.05).clamp(0.0, 1.0)


def _doubt(values: Values, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Probabilities of which none is certain."""
    return _uniform(shape, generator) * 0.9375 + 0.03125


def _distribution(values: Values, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.softmax(_normal(values, shape, generator), values.dim)


def _logarithms(values: Values, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.log_softmax(_normal(values, shape, generator), values.dim)


def _labels(values: Values, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    found = torch.randint(values.classes, shape, generator=generator)
    if values.ignored is not None:
        found[_uniform(shape, generator) < 0.25] = values.ignored
    return found


def _signs(values: Values, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """1 and -1, and now and then 0."""
    found = torch.randint(2, shape, generator=generator) * 2 - 1
    return found.masked_fill_(_uniform(shape, generator) < 0.0625, 0)


def _bits(values: Values, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return _uniform(shape, generator) < 0.75


_KINDS = {
    "normal": _normal,
    "grid": _grid,
    "positive": _positive,
    "probability": _probability,
    "doubt": _doubt,
    "distribution": _distribution,
    "logarithms": _logarithms,
    "labels": _labels,
    "signs": _signs,
    "bits": _bits,
}


@dataclass(frozen=True)
class Layout:
    """Dimensions in the ``order`` of memory, with ``steps`` between elements, or one element all along if ``expanded``."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    expanded: tuple[bool, ...]
    offset: int

    def place(self, content: Tensor) -> Tensor:
        """A copy of ``content``; what lies between its elements must not be read, and is no number or label."""
        sizes = [content.size(d) * self.steps[d] for d in self.order]
        nothing = math.nan
        if not content.is_floating_point():
            nothing = 0 if content.dtype == torch.bool else torch.iinfo(content.dtype).max
        memory = content.new_full((math.prod(sizes) + self.offset,), nothing)[self.offset :].view(sizes)
        memory = memory[tuple(slice(None, None, self.steps[d]) for d in self.order)]
        return memory.permute([self.order.index(d) for d in range(len(self.order))]).copy_(content)


@dataclass(frozen=True)
class Operand:
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Values
    layout: Layout

    def make(self, generator: torch.Generator, device: torch.device) -> Tensor:
        own = tuple(1 if e else n for n, e in zip(self.shape, self.layout.expanded, strict=True))
        content = self.values.draw(own, generator).to(self.dtype).to(device)
        return self.layout.place(content).expand(self.shape)


@st.composite
def operands(
    draw: st.DrawFn,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    values: Values | None = None,
    *,
    expandable: Container[int] = range(8),
) -> Operand:
    """An operand in a drawn layout, half of the time a dense one; normal numbers of a drawn size unless told.

    ``expandable`` are the dimensions that may hold one element all along.
    """
    if values is None:
        values = draw(normal())
    axes = tuple(range(len(shape)))
    layout = Layout(axes, (1,) * len(shape), (False,) * len(shape), 0)
    if draw(st.booleans()):
        expanded = tuple(d in expandable and shape[d] > 0 and draw(st.integers(0, 5)) == 5 for d in axes)
        steps = tuple(draw(st.sampled_from((1, 1, 2, 3))) for _ in shape)
        layout = Layout(tuple(draw(st.permutations(axes))), steps, expanded, draw(st.sampled_from((0, 1, 3))))
    return Operand(shape, dtype, values, layout)


def normal(kind: str = "normal", scales: tuple[float, ...] = SCALES) -> st.SearchStrategy[Values]:
    return st.builds(Values, st.just(kind), st.sampled_from(scales), st.sampled_from(OFFSETS))
