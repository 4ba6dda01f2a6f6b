"""The cosine embedding loss: margins, labels, sizes of vectors, shapes that broadcast, layouts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import genloss_kernels as gk
from genloss_kernels.core.backend import INTERPRETED
from genloss_kernels.losses.cosine import api, eager, op, reference

from .comparison import DTYPES, check, check_second_derivatives, no_synchronisation

BOTH = ("input1", "input2")


@pytest.fixture(autouse=True)
def _blocks(monkeypatch):
    monkeypatch.setattr(api, "BUILTIN_BELOW", 0)


def _labels(count):
    return torch.tensor([1, -1, -1, 0, 1]).repeat(count)[:count]


def _pairs(n_rows, n_cols, dtype=torch.float32, **options):
    tensors = {name: torch.randn(n_rows, n_cols).to(dtype) for name in BOTH}
    return {**tensors, "target": _labels(n_rows), **options}


def test_by_hand(path):
    x, y = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [1.0, 1.0], [-1.0, 1.0]])
    found = gk.cosine_embedding_loss(x, y, torch.tensor([1, -1, -1]), margin=0.5, reduction="none")
    assert found.tolist() == pytest.approx([0.0, math.sqrt(0.5) - 0.5, 0.0], abs=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "shape", [(3, 7), (70, 33), (2, 2051)], ids=["one tile", "several rows a tile", "several tiles a row"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(path, shape, reduction, dtype):
    arguments = _pairs(*shape, dtype=dtype, margin=-0.25, reduction=reduction)
    check(gk.cosine_embedding_loss, F.cosine_embedding_loss, arguments, BOTH)


@pytest.mark.parametrize("differentiable", BOTH)
def test_one_gradient_alone(path, differentiable):
    check(gk.cosine_embedding_loss, F.cosine_embedding_loss, _pairs(5, 7), (differentiable,))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("first", "second", "target"),
    [((7,), (7,), ()), ((1, 7), (5, 7), (5,)), ((5, 7), (1, 7), (5,)), ((1, 7), (1, 7), (5,)), ((5, 7), (5, 7), (1,))],
)
def test_shapes_that_broadcast(path, first, second, target, reduction):
    tensors = {"input1": torch.randn(first), "input2": torch.randn(second)}
    arguments = {**tensors, "target": torch.ones(target), "reduction": reduction}
    check(gk.cosine_embedding_loss, F.cosine_embedding_loss, arguments, BOTH)


def test_a_single_column_counts_once_in_its_norm():
    arguments = {"input1": torch.randn(5, 7), "input2": torch.randn(5, 1), "target": _labels(5)}
    with gk.backend("eager"):
        check(gk.cosine_embedding_loss, F.cosine_embedding_loss, arguments, BOTH)


LAYOUTS = {
    "columns first": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "rows apart": lambda x: torch.cat([x, x], 1)[:, : x.size(1)],
    "one row": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(path, layout):
    arguments = _pairs(5, 7)
    expected = gk.cosine_embedding_loss(**{**arguments, "input1": layout(arguments["input1"]).contiguous()})
    arguments["input1"] = layout(arguments["input1"])
    torch.testing.assert_close(gk.cosine_embedding_loss(**arguments), expected, rtol=0.0, atol=0.0)
    arguments["target"] = arguments["target"].repeat_interleave(2)[::2]
    check(gk.cosine_embedding_loss, F.cosine_embedding_loss, arguments, BOTH)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float32, torch.bfloat16])
def test_labels_of_any_dtype(path, dtype):
    labels = torch.tensor([1, 255, 0, 1, 2] if dtype == torch.uint8 else [1, -1, 0, -1, 2])
    arguments = {**_pairs(5, 7), "target": labels.to(dtype), "reduction": "none"}
    found = gk.cosine_embedding_loss(**arguments)
    torch.testing.assert_close(found, F.cosine_embedding_loss(**arguments))


def test_operands_of_different_dtypes(path):
    arguments = _pairs(5, 7)
    arguments["input2"] = arguments["input2"].double()
    check(gk.cosine_embedding_loss, F.cosine_embedding_loss, arguments, BOTH, dtype=torch.float64)
    arguments["input2"] = arguments["input2"].bfloat16()
    check(gk.cosine_embedding_loss, F.cosine_embedding_loss, arguments, BOTH, dtype=torch.float32)


# Sizes of vectors that each dtype holds, though not their squares; the rows of a pair differ in size.
SIZES = {
    torch.float16: (1e-4, 300.0, 3e4),
    torch.bfloat16: (1e-4, 1e25, 3e38),
    torch.float32: (1e-4, 1e20, 3e38),
    torch.float64: (1e-4, 1e200, 1e308),
}


@pytest.mark.parametrize(("dtype", "size"), [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes])
def test_squares_that_the_dtype_does_not_hold(path, dtype, size):
    """The loss has the same value at any size, and its gradient one over that size."""
    # Numbers that every dtype holds, of size 1 at most; powers of two away from each other at the sizes.
    x, y = (torch.randint(-8, 9, (5, 40)).double() / 8.0 for _ in range(2))
    factor = 2.0 ** math.floor(math.log2(size))
    leaves = [(x * factor).to(dtype).requires_grad_(), y.to(dtype).requires_grad_()]
    found = gk.cosine_embedding_loss(*leaves, _labels(5), margin=-1.0, reduction="none")
    plain = [x.requires_grad_(), y.requires_grad_()]
    expected = F.cosine_embedding_loss(*plain, _labels(5), margin=-1.0, reduction="none")
    precision = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    if size == 1e-4:
        precision = max(precision, 1e-4)  # epsilon shows
    torch.testing.assert_close(found.double(), expected, rtol=precision, atol=precision)
    grads, wanted = torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), plain)
    torch.testing.assert_close(grads[1].double(), wanted[1], rtol=precision, atol=precision)
    if 1.0 / factor > 2.0 * torch.finfo(dtype).tiny:
        torch.testing.assert_close(grads[0].double() * factor, wanted[0], rtol=precision, atol=precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_grows(path, dtype):
    """What was added up before its largest number came is rescaled."""
    arguments = _pairs(3, 3000, dtype=dtype)
    for name in BOTH:
        arguments[name][:, 2500:] *= 64.0
    check(gk.cosine_embedding_loss, F.cosine_embedding_loss, arguments, BOTH)


# Rows of the first and second input.
CORNERS = {
    "zero": ([0.0, 0.0], [0.0, 0.0]),
    "zero and a vector": ([0.0, 0.0], [1.0, 2.0]),
    "a vector and zero": ([1.0, 2.0], [0.0, 0.0]),
    "as small as epsilon's root": ([1e-6, 2e-6], [-1e-6, 0.0]),
    "smaller": ([1e-9, 2e-9], [1.0, 0.5]),
    "subnormal": ([1e-40, 0.0], [1.0, 0.5]),
    "NaN": ([math.nan, 0.0], [1.0, 0.5]),
    "infinite": ([math.inf, 0.0], [1.0, 0.5]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [1, -1])
@pytest.mark.parametrize("corner", CORNERS)
def test_corners_are_torchs(path, corner, target, dtype):
    results = []
    for function in (gk.cosine_embedding_loss, F.cosine_embedding_loss):
        leaves = [torch.tensor([row], dtype=dtype, requires_grad=True) for row in CORNERS[corner]]
        loss = function(*leaves, torch.tensor([target]), margin=-1.0)
        grads = torch.autograd.grad(loss, leaves)
        results.append([loss.detach(), *(g for g in grads if loss.isfinite())])
    precision = 1e-5 if dtype == torch.float32 else 1e-12
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=precision, atol=precision, equal_nan=True)


@pytest.mark.parametrize("corner", list(CORNERS)[:6])
def test_the_reference_at_corners_is_torchs(corner):
    results = []
    for function in (lambda x, y, t: reference.composed(x, y, t, 0.0, 2), F.cosine_embedding_loss):
        leaves = [torch.tensor([row], dtype=torch.float64, requires_grad=True) for row in CORNERS[corner]]
        loss = function(*leaves, torch.tensor([1]))
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_small_gradients_of_large_vectors_keep_their_digits(path):
    """The product of both inverse norms and the upstream gradient is subnormal."""
    x, y = torch.tensor([[3.0, 4.0, 0.0, 1.0]]), torch.tensor([[1.0, -2.0, 2.0, 5.0]])
    grads = []
    for size in (1.0, 2.0**60):
        leaf = (x * size).requires_grad_()
        loss = gk.cosine_embedding_loss(leaf, y * size, torch.tensor([1]))
        grads.append(torch.autograd.grad(loss, leaf, torch.tensor(2.0**-20))[0] * size)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=0.0)


def test_the_margin_itself(path):
    """There the gradient is that of what lies above, as torch's."""
    results = []
    for function in (gk.cosine_embedding_loss, F.cosine_embedding_loss):
        x = torch.tensor([[1.0, 0.0]], requires_grad=True)
        (grad,) = torch.autograd.grad(function(x, torch.tensor([[0.0, 1.0]]), torch.tensor([-1])), x)
        results.append(grad)
    assert torch.equal(*results)
    assert results[0].any()


@pytest.mark.parametrize("margin", [-1.0, 0.25])
def test_second_derivatives(path, margin):
    arguments = _pairs(4, 5, margin=margin)
    check_second_derivatives(gk.cosine_embedding_loss, F.cosine_embedding_loss, arguments, BOTH)


def test_blocks_of_any_size(monkeypatch):
    """Of one row, of several, with a tail."""
    arguments = _pairs(11, 7, margin=-0.25, reduction="none")
    with gk.backend("eager"):
        for elements in (1, 14, 28):
            monkeypatch.setattr(eager, "_BLOCK_ELEMENTS", elements)
            check(gk.cosine_embedding_loss, F.cosine_embedding_loss, arguments, BOTH)
            large = {**arguments, "input1": arguments["input1"] * 2.0**80}
            found = gk.cosine_embedding_loss(**large)
            torch.testing.assert_close(found, F.cosine_embedding_loss(**arguments))


@pytest.mark.parametrize("learned", [BOTH, BOTH[:1]])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_built_in_is_what_blocks_are(reduction, learned, monkeypatch):
    arguments = _pairs(5, 7, reduction=reduction)
    blocks = check(gk.cosine_embedding_loss, F.cosine_embedding_loss, arguments, learned)
    monkeypatch.setattr(api, "BUILTIN_BELOW", 2**19)
    torch.testing.assert_close(check(gk.cosine_embedding_loss, F.cosine_embedding_loss, arguments, learned), blocks)


@pytest.mark.parametrize(("first", "second"), [(1e20, 1.0), (1.0, 1e20), (1e10, 1e10)])
def test_the_built_in_does_not_take_what_it_gets_wrong(first, second, monkeypatch):
    monkeypatch.setattr(api, "BUILTIN_BELOW", 2**19)
    x = torch.tensor([[3.0, 4.0]])
    assert gk.cosine_embedding_loss(x * first, x * second, torch.tensor([1])).item() == pytest.approx(0.0, abs=1e-6)


def test_autocast_on_a_cpu_is_fp32_as_torchs():
    arguments = _pairs(5, 7, dtype=torch.bfloat16)
    with gk.backend("eager"), torch.autocast("cpu", torch.bfloat16):
        found, expected = gk.cosine_embedding_loss(**arguments), F.cosine_embedding_loss(**arguments)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="a GPU's semantics, on the CPU")
def test_nothing_waits_for_a_device(monkeypatch):
    arguments = _pairs(5, 7)
    for name in BOTH:
        arguments[name].requires_grad_()
    with gk.backend("triton"), no_synchronisation(monkeypatch):
        gk.cosine_embedding_loss(**arguments).backward()


def test_a_tile_is_as_wide_as_its_rows():
    """Or as wide as it holds."""
    tiles = {n: op._tile(torch.empty(10, n), torch.empty(10, n))[1:3] for n in (3, 16, 17, 768, 5000)}
    assert tiles == {3: (64, 16), 16: (64, 16), 17: (32, 32), 768: (1, 1024), 5000: (1, 1024)}


def test_no_element(path):
    with gk.backend("eager"):
        assert gk.cosine_embedding_loss(torch.ones(0, 3), torch.ones(0, 3), torch.ones(0)).isnan()
    arguments = torch.ones(0, 3, requires_grad=True), torch.ones(0, 3, requires_grad=True)
    loss = gk.cosine_embedding_loss(*arguments, torch.ones(0), reduction="sum")
    assert loss == 0.0
    assert [g.shape for g in torch.autograd.grad(loss, arguments)] == [(0, 3), (0, 3)]
    # Vectors without elements have cosine 0.
    assert gk.cosine_embedding_loss(torch.ones(2, 0), torch.ones(2, 0), torch.tensor([1, -1]), reduction="sum") == 1.0


def test_the_reference_of_vectors_without_elements():
    assert reference.composed(torch.ones(2, 0), torch.ones(2, 0), torch.tensor([1, -1]), 0.0, 2).item() == 1.0


def test_module(path):
    module = gk.CosineEmbeddingLoss(margin=0.3, reduction="sum")
    assert isinstance(module, torch.nn.CosineEmbeddingLoss)
    x, y, labels = torch.randn(5, 4), torch.randn(5, 4), _labels(5)
    torch.testing.assert_close(module(x, y, labels), torch.nn.CosineEmbeddingLoss(0.3, reduction="sum")(x, y, labels))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_no_pairs(dtype: torch.dtype) -> None:
    x = torch.randn(0, 3, dtype=dtype).requires_grad_()
    (found,) = torch.autograd.grad(gk.cosine_embedding_loss(x, x.detach(), torch.ones(0)), x)
    assert found.shape == x.shape


def test_off_the_cpu_no_value_is_read() -> None:
    arguments = {name: value.to("meta") for name, value in _pairs(5, 7).items() if isinstance(value, torch.Tensor)}
    leaves = [arguments[name].requires_grad_() for name in BOTH]
    with gk.backend("eager"):
        loss = gk.cosine_embedding_loss(**arguments)
        assert [g.shape for g in torch.autograd.grad(loss, leaves)] == [(5, 7), (5, 7)]
