"""The order in which broadcast operands are walked, and where a flat index finds each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from genloss_kernels.core import elementwise
from genloss_kernels.core.elementwise import Operands, divisor_of, walk
from genloss_kernels.core.launch import Tile
from genloss_kernels.core.reduction import Reduction

ABSENT, DENSE, SINGLE, STRIDED = range(4)


def _kinds(path: elementwise.Walk) -> list[int]:
    return [(path.kinds >> (2 * i)) & 3 for i in range(len(path.tensors))]


def _numbers(*shape: int) -> Tensor:
    return torch.arange(int(np.prod(shape)), dtype=torch.float64).reshape(shape)


def _read(path: elementwise.Walk, position: int) -> Tensor:
    """What the kernels read of one operand, in flat order: by the index itself if dense, else by sizes and strides."""
    view, kind = path.tensors[position], _kinds(path)[position]
    assert view is not None
    storage = torch.as_strided(view, (view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)
    flat = torch.arange(view.numel())
    if kind == DENSE:
        return storage[view.storage_offset() + flat]
    if kind == SINGLE:
        return storage[view.storage_offset()].expand(view.numel())
    offset, rest = torch.zeros_like(flat), flat
    for size, stride in reversed(list(zip(path.sizes, path.strides[position], strict=True))):
        offset, rest = offset + rest % size * stride, rest // size
    assert not rest.any()
    return storage[view.storage_offset() + offset]


# name: shape, operands, expected order, sizes and kinds
_x = _numbers(4, 6, 10)
WALKS = {
    "dense": ((4, 6, 10), [_x, _x + 1], (0, 1, 2), (1,), [DENSE, DENSE]),
    "absent and single": ((4, 6, 10), [_x, None, _numbers(1)], (0, 1, 2), (1,), [DENSE, ABSENT, SINGLE]),
    "one row for all": ((4, 6, 10), [_x, _numbers(10)], (0, 1, 2), (24, 10), [DENSE, STRIDED]),
    "one column for all": ((4, 6, 10), [_x, _numbers(4, 1, 1)], (0, 1, 2), (4, 60), [DENSE, STRIDED]),
    "the middle": ((4, 6, 10), [_x, _numbers(6, 1)], (0, 1, 2), (4, 6, 10), [DENSE, STRIDED]),
    "transposed": ((4, 6, 10), [_x.permute(2, 1, 0).contiguous().permute(2, 1, 0)], (2, 1, 0), (1,), [DENSE]),
    "layouts differ": ((4, 6), [_x[0, :4, :6], _numbers(6, 4).t()], (0, 1), (4, 6), [STRIDED, STRIDED]),
    "channels last": (
        (2, 3, 4, 5),
        [_numbers(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), _numbers(3, 1, 1)],
        (0, 2, 3, 1),
        (40, 3),
        [DENSE, STRIDED],
    ),
    "every other": ((4, 6, 5), [_x[:, :, ::2], _numbers(4, 6, 5)], (0, 1, 2), (120,), [STRIDED, DENSE]),
    "gaps between rows": ((4, 6, 9), [_x[:, :, 1:], None], (0, 1, 2), (24, 9), [STRIDED, ABSENT]),
    "first operand broadcasts": ((4, 6), [_numbers(4, 1), _numbers(6, 4).t()], (1, 0), (6, 4), [STRIDED, DENSE]),
    "none of full size": ((4, 6), [_numbers(4, 1), _numbers(6)], (0, 1), (4, 6), [STRIDED, STRIDED]),
}


@pytest.mark.parametrize("name", WALKS)
def test_walk(name: str) -> None:
    shape, tensors, order, sizes, kinds = WALKS[name]
    path = walk(tensors, torch.Size(shape), 4096, by_sample=False)
    assert path.order == order
    assert path.sizes == sizes
    assert _kinds(path) == kinds
    for position, tensor in enumerate(tensors):
        if tensor is not None:
            wanted = tensor.expand(shape).permute(order).flatten()
            assert torch.equal(_read(path, position), wanted), position


def test_walk_of_more_dimensions_than_the_kernels_index() -> None:
    """Five dimensions that do not merge: operands that the flat index does not find are copied."""
    shape = torch.Size((2, 3, 2, 3, 2))
    dense, alternating = _numbers(*shape), _numbers(2, 1, 2, 1, 2)
    path = walk([dense, alternating, _numbers(1), None], shape, 4096, by_sample=False)
    assert _kinds(path) == [DENSE, DENSE, SINGLE, ABSENT]
    assert path.tensors[0] is not None
    assert path.tensors[0].data_ptr() == dense.data_ptr()
    assert torch.equal(_read(path, 1), alternating.expand(shape).flatten())
    # Three dimensions are the most that stay as they are.
    path = walk([_numbers(4, 6, 10), _numbers(4, 1, 10)], torch.Size((4, 6, 10)), 4096, by_sample=False)
    assert _kinds(path) == [DENSE, STRIDED]


def test_walk_by_sample_keeps_dimension_0_first() -> None:
    across = _numbers(6, 4).t()
    path = walk([across, _numbers(4, 6)], torch.Size((4, 6)), 4096, by_sample=True)
    assert path.order == (0, 1)
    assert _kinds(path) == [STRIDED, DENSE]
    within = _numbers(4, 10, 6).transpose(1, 2)
    assert walk([within], torch.Size((4, 6, 10)), 4096, by_sample=True).order == (0, 2, 1)


@pytest.mark.parametrize("block", [512, 1024, 2048])
def test_division_by_multiplication(block: int) -> None:
    """Below a block, floor(n * ceil(2**32 / size) / 2**32) is n // size for every n that a lane can reach."""
    for size in (2, 3, 5, 7, 31, 97, 255, block - 1):
        shape = torch.Size((3, size, 2))
        path = walk([_numbers(*shape), _numbers(size, 1)], shape, block, by_sample=False)
        for dim, (n, magic) in enumerate(zip(path.sizes, path.magics, strict=True)):
            assert (path.small >> dim) & 1, n
            reachable = np.arange(n + block, dtype=np.uint64)
            assert np.array_equal((reachable * np.uint64(magic)) >> np.uint64(32), reachable // np.uint64(n)), n


def test_large_dimensions_are_not_divided_by_multiplication() -> None:
    shape = torch.Size((2, 512))
    path = walk([_numbers(*shape), _numbers(512)], shape, 512, by_sample=False)
    assert path.sizes == (2, 512)
    assert path.small == 0b01
    assert path.magics == (2**31, 1)
    assert walk([_numbers(2, 511), _numbers(511)], torch.Size((2, 511)), 512, by_sample=False).small == 0b11


def test_empty_walk() -> None:
    shape = torch.Size((0, 3))
    path = walk([torch.empty(shape), torch.ones(3)], shape, 512, by_sample=False)
    assert path.sizes == (3, 0)
    assert path.magics == (-(-(2**32) // 3), 1)
    assert path.small == 0b01


@pytest.mark.parametrize(
    ("shape", "itemsize", "by_sample", "expected"),
    [
        pytest.param((5,), 4, False, (1, 1024, 1024, 5, 1), id="less than a tile"),
        pytest.param((3000,), 4, False, (2, 1024, 2048, 3000, 2), id="two tiles and a tail"),
        pytest.param((4096,), 4, False, (1, 1024, 4096, 4096, 1), id="one program's worth"),
        pytest.param((100, 1000), 4, False, (25, 1024, 4096, 100000, 25), id="many programs"),
        pytest.param((100, 1000), 2, False, (13, 2048, 8192, 100000, 13), id="two bytes"),
        pytest.param((100, 1000), 8, False, (49, 512, 2048, 100000, 49), id="eight bytes"),
        pytest.param((3, 5000), 4, True, (6, 1024, 4096, 5000, 2), id="samples of two segments"),
        pytest.param((3, 7), 4, True, (3, 1024, 1024, 7, 1), id="short samples"),
        pytest.param((0, 7), 4, True, (0, 1024, 1024, 0, 0), id="no sample"),
        pytest.param((3, 0), 4, True, (0, 1024, 1024, 0, 0), id="empty samples"),
    ],
)
def test_grid(shape, itemsize, by_sample, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "ELEMENTWISE_TILES", {2: Tile(2048, 4), 4: Tile(1024, 4), 8: Tile(512, 4)})
    grid = elementwise.grid_for(torch.Size(shape), itemsize, by_sample=by_sample)
    assert (grid.programs, grid.block, grid.chunk, grid.sample_size, grid.segments) == expected


def test_divisors() -> None:
    shape = torch.Size((3, 5))
    wanted = {Reduction.MEAN: 15.0, Reduction.BATCHMEAN: 3.0, Reduction.SUM: 1.0, Reduction.NONE: 1.0}
    assert {r: divisor_of(r, shape) for r in wanted} == wanted
    assert divisor_of(Reduction.SAMPLE, shape) == 1.0


def test_dtype_of_arithmetic() -> None:
    half, double = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.float64)
    mask = torch.ones(1, dtype=torch.bool)
    assert elementwise.arithmetic([half, None, mask]) == torch.float32
    assert elementwise.arithmetic([half, double]) == torch.float64
    assert elementwise.widest([half, None, mask]) == 2
    assert elementwise.widest([half, double]) == 8


@pytest.mark.interpreter
def test_dense_results_lie_in_the_order_of_the_walk() -> None:
    """A result of ``reduction="none"`` has the layout of its input, as torch's has."""
    pytest.importorskip("triton")
    from genloss_kernels.losses.gaussian_kl.kernels import gaussian_kl_value

    x = torch.randn(6, 4).t()
    operands = Operands((x, torch.zeros_like(x), None, None), None, x.shape)
    loss, kept = elementwise.forward(gaussian_kl_value, operands, (0.0, 0.0, 0.0), 0, Reduction.NONE, torch.float32)
    assert loss.stride() == x.stride()
    assert kept.shape == (0,)
    torch.testing.assert_close(loss, 0.5 * x * x)


@pytest.mark.interpreter
def test_gradients_by_sample_of_what_needs_them() -> None:
    from genloss_kernels.losses.regression.kernels import mse_gradient

    x, t, upstream = torch.randn(5, 7), torch.randn(5, 7), torch.randn(5)
    operands = Operands((x, t, None, None), None, x.shape)
    none = torch.empty(0)
    for needed in ([True, False, False, False], [False, True, False, False]):
        grads = elementwise.backward(mse_gradient, operands, upstream, none, (0.0, 0.0, 0.0), 0, Reduction.SAMPLE, needed)
        assert [g is not None for g in grads] == needed
        (grad,) = (g for g in grads if g is not None)
        sign = 1.0 if needed[0] else -1.0
        torch.testing.assert_close(grad, sign * 2.0 * (x - t) * upstream.unsqueeze(1))
