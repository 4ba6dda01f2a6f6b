"""Merging dimensions, memory order and blocks, against what they stand for."""

from __future__ import annotations

import pytest
import torch

from genloss_kernels.core.layout import (
    broadcast_shape,
    collapse,
    contiguous_strides,
    empty_in_order,
    memory_order,
    row_blocks,
)


@pytest.mark.parametrize(
    ("shape", "strides", "sizes", "merged"),
    [
        pytest.param((2, 3, 4), [(12, 4, 1)], (24,), [(1,)], id="contiguous"),
        pytest.param((2, 3, 4), [(12, 4, 2)], (6, 4), [(4, 2)], id="gap after the last"),
        pytest.param((2, 3, 4), [(1, 2, 6)], (2, 3, 4), [(1, 2, 6)], id="reversed"),
        pytest.param((2, 3, 4), [(12, 4, 1), (3, 1, 0)], (6, 4), [(4, 1), (1, 0)], id="one operand broadcasts"),
        pytest.param((2, 3, 4), [(0, 0, 0), (12, 4, 1)], (24,), [(0,), (1,)], id="a single element follows"),
        pytest.param((2, 3, 4), [(12, 4, 1), (12, 4, 3)], (6, 4), [(4, 1), (4, 3)], id="operands disagree"),
        pytest.param((1, 3, 1, 4, 1), [(7, 4, 9, 1, 5)], (12,), [(1,)], id="ones have no stride"),
        pytest.param((1, 1), [(5, 7), (1, 1)], (1,), [(0,), (0,)], id="all ones"),
        pytest.param((), [(), ()], (1,), [(0,), (0,)], id="no dimension"),
        pytest.param((0, 3), [(3, 1)], (0,), [(1,)], id="empty"),
    ],
)
def test_collapse(shape, strides, sizes, merged) -> None:
    assert collapse(shape, strides) == (sizes, merged)


def test_broadcast_shape() -> None:
    x, row, column = torch.empty(4, 3), torch.empty(3), torch.empty(4, 1)
    assert broadcast_shape([x, None, x]) == (4, 3)
    assert broadcast_shape([None, row, column]) == (4, 3)
    assert broadcast_shape([torch.empty(())]) == ()
    with pytest.raises(RuntimeError):
        broadcast_shape([x, torch.empty(4)])


@pytest.mark.parametrize(
    ("shape", "strides"), [((), ()), ((5,), (1,)), ((2, 3, 4), (12, 4, 1)), ((2, 0, 4), (0, 4, 1)), ((4, 1), (1, 1))]
)
def test_contiguous_strides(shape, strides) -> None:
    assert contiguous_strides(shape) == strides


def test_empty_in_order() -> None:
    found = empty_in_order((2, 3, 4, 5), (0, 2, 3, 1), torch.float64, torch.device("cpu"))
    assert found.shape == (2, 3, 4, 5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.dtype == torch.float64
    assert not found._is_view()
    # No stride of 0, by which elements that are none would lie in one place.
    nothing = empty_in_order((3, 0), (0, 1), torch.float32, torch.device("cpu"))
    assert nothing.mul_(2.0).stride() == torch.empty(3, 0).stride()


def test_memory_order() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert memory_order(x) == (0, 1, 2, 3)
    assert memory_order(x.contiguous(memory_format=torch.channels_last)) == (0, 2, 3, 1)
    assert memory_order(x.permute(3, 1, 0, 2)) == (2, 1, 3, 0)
    # A broadcast dimension has no place in memory, so nothing moves.
    assert memory_order(torch.empty(4, 3).t().unsqueeze(1).expand(3, 2, 4)) == (0, 1, 2)
    # A dimension of size 1 goes last whatever its stride, and even where that is 0.
    assert memory_order(torch.empty(12).as_strided((3, 1, 4), (1, 0, 3))) == (2, 0, 1)
    assert memory_order(torch.empty(12).as_strided((1, 3, 4), (99, 4, 1))) == (1, 2, 0)


@pytest.mark.parametrize(
    ("shape", "elements", "expected"),
    [
        ((10, 3), 9, [(slice(0, 3),), (slice(3, 6),), (slice(6, 9),), (slice(9, 12),)]),
        ((2, 7), 3, [(slice(0, 1),), (slice(1, 2),)]),
        ((5,), 2, [(slice(0, 2),), (slice(2, 4),), (slice(4, 6),)]),
        ((0, 7), 3, []),
        ((3, 0), 2, [(slice(0, 2),), (slice(2, 4),)]),
        ((3, 4, 5), 20, [(slice(0, 1),), (slice(1, 2),), (slice(2, 3),)]),
        ((3, 4, 5), 40, [(slice(0, 2),), (slice(2, 4),)]),
        ((2, 4, 5), 19, [(0, slice(0, 3)), (0, slice(3, 6)), (1, slice(0, 3)), (1, slice(3, 6))]),
        ((1, 2, 2, 3), 5, [(0, 0, slice(0, 1)), (0, 0, slice(1, 2)), (0, 1, slice(0, 1)), (0, 1, slice(1, 2))]),
    ],
)
def test_row_blocks(shape, elements, expected) -> None:
    assert list(row_blocks(shape, elements)) == expected


def test_row_blocks_cover_every_element_once() -> None:
    for shape, elements in (((7, 5, 3), 4), ((7, 5, 3), 15), ((2, 3, 4, 5), 21), ((9,), 4)):
        seen = torch.zeros(shape)
        for index in row_blocks(shape, elements):
            seen[index] += 1
        assert bool((seen == 1).all()), (shape, elements)
