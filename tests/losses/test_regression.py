"""Losses of a difference: both paths against torch in fp64, what torch's weights mean, kinks and special values."""

from __future__ import annotations

import functools
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import genloss_kernels as gk
from genloss_kernels.core.backend import INTERPRETED
from genloss_kernels.losses.regression import api
from genloss_kernels.testing import assert_close

from ..refusals import refused

# The keyword of each loss's threshold, if it has one.
THRESHOLDS = {"mse_loss": None, "l1_loss": None, "smooth_l1_loss": "beta", "huber_loss": "delta"}
WEIGHTED = {name for name in THRESHOLDS if "weight" in inspect.signature(getattr(F, name)).parameters}

SHAPES = {"one tile": (3, 7), "several tiles and a tail": (5, 5003)}
# fp16 keeps the eager path off the built-in, and on our own blocks.
DTYPES = (torch.float32, torch.float16)

every_loss = pytest.mark.parametrize("loss", THRESHOLDS)


def _pair(loss, threshold=None):
    """Ours and torch's, with the threshold if they take one."""
    keywords = {THRESHOLDS[loss]: threshold} if THRESHOLDS[loss] and threshold is not None else {}
    return tuple(functools.partial(getattr(home, loss), **keywords) for home in (gk, F))


def _run(loss, tensors, reduction, upstream=None):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    keywords = {} if leaves[2] is None else {"weight": leaves[2]}
    result = loss(leaves[0], leaves[1], reduction=reduction, **keywords)
    result.backward(torch.ones_like(result) if upstream is None else upstream.to(result))
    return result.detach(), [t.grad for t in leaves if t is not None]


def test_torch_weights_three_of_them():
    assert {"mse_loss", "l1_loss", "huber_loss"} == WEIGHTED


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("loss", "weighted"), [*((loss, False) for loss in THRESHOLDS), *((loss, True) for loss in sorted(WEIGHTED))]
)
def test_value_and_gradients(path, device, dtype, shape, weighted, reduction, loss):
    tensors = [torch.rand(shape, device=device).to(dtype) for _ in range(3 if weighted else 2)]
    tensors += [None] * (3 - len(tensors))
    upstream = torch.rand(shape if reduction == "none" else (), device=device)
    wide = [None if t is None else t.double() for t in tensors]
    # Differences of uniform numbers lie on both sides.
    ours, torchs = _pair(loss, 0.3)
    found, grads = _run(ours, tensors, reduction, upstream.to(dtype))
    expected, expected_grads = _run(torchs, wide, reduction, upstream.to(dtype))
    torch_loss, torch_grads = _run(torchs, tensors, reduction, upstream.to(dtype))
    assert_close(found, expected, like=torch_loss)
    for grad, wanted, usual in zip(grads, expected_grads, torch_grads, strict=True):
        assert_close(grad, wanted, like=usual)


# Kinks at 0 and at the threshold of 1, what lies next to it on both sides, and what has no finite difference.
NEXT = 2.0**-10
CORNERS = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.0 + NEXT, -1.0 - NEXT, 1.0 - NEXT, -1.0 + NEXT, 300.0, -300.0]
CORNERS += [math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("loss", "threshold"),
    [(loss, value) for loss, name in THRESHOLDS.items() for value in ((1.0, 1e-3, 1e4, math.inf) if name else (None,))],
)
def test_corners_are_torchs(path, device, dtype, loss, threshold):
    values = CORNERS[: -3 if threshold == math.inf else None]
    x = torch.tensor(values, device=device, dtype=dtype)
    ours, torchs = _pair(loss, threshold)
    found, (dx, dt, *_) = _run(ours, (x, torch.zeros_like(x), None), "none")
    expected, (wanted, opposite, *_) = _run(torchs, (x.double(), torch.zeros_like(x).double(), None), "none")
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-3, atol=0.0, equal_nan=True)
    torch.testing.assert_close(dx, wanted.to(dtype), rtol=1e-3, atol=0.0, equal_nan=True)
    torch.testing.assert_close(dt, opposite.to(dtype), rtol=1e-3, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss"])
def test_gradient_of_learned_weights_in_half_precision_is_rounded_once(path, device, loss):
    """A weighted mean's is (the element's loss - the mean) / the sum of weights; rounded first, these two lose it."""
    x, t, weight = (torch.rand(65, device=device).bfloat16() + offset for offset in (4.0, 0.0, 0.25))
    grads = [
        _run(f, (x.to(d), t.to(d), weight.to(d)), "mean")[1]
        for f, d in zip(_pair(loss), (x.dtype, torch.float64), strict=True)
    ]
    (*_, found), (*_, exact) = grads
    (*_, usual) = _run(getattr(F, loss), (x.float(), t.float(), weight.float()), "mean")[1]
    assert_close(found, exact, like=usual)


def test_gradient_of_l1_at_0_is_0(path, device):
    # Broadcast, so that the eager path is not the built-in.
    x, t = torch.zeros(2, 2, device=device, requires_grad=True), torch.zeros(2, device=device)
    with pytest.warns(UserWarning, match="target size"):
        gk.l1_loss(x, t).backward()
    assert x.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_smooth_l1_without_a_threshold_is_l1(path, device):
    x = torch.tensor([0.0, 1e-30, -2.0], device=device, requires_grad=True)
    loss = gk.smooth_l1_loss(x, torch.zeros_like(x), reduction="none", beta=0)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.0, 1e-30, 2.0], rel=1e-6)
    assert x.grad.tolist() == [0.0, 1.0, -1.0]


def test_a_threshold_that_is_almost_0(path, device):
    x = torch.tensor([0.0, 1.0, -2.0], device=device, requires_grad=True)
    loss = gk.smooth_l1_loss(x, torch.zeros_like(x), reduction="none", beta=1e-44)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1.0, 2.0]
    assert x.grad.tolist() == [0.0, 1.0, -1.0]


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_gradient_of_a_threshold_whose_reciprocal_overflows(path, device):
    x = torch.tensor([[1.0, -1.0, 2.0]], device=device, requires_grad=True)
    for target in (torch.zeros(3, device=device), torch.zeros(1, 3, device=device)):
        (gradient,) = torch.autograd.grad(gk.smooth_l1_loss(x, target, beta=1e-40, reduction="sum"), x)
        assert gradient.tolist() == [[1.0, -1.0, 1.0]]


def test_half_precision_does_not_overflow_on_its_way(path, device):
    x = torch.tensor([300.0, 0.0, 0.0, 0.0], device=device, dtype=torch.float16)
    assert gk.mse_loss(x, torch.zeros_like(x)).item() == 22496.0
    assert gk.huber_loss(x, torch.zeros_like(x), delta=1000.0).item() == 11248.0


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("mse_loss", (4.0 + 3.0 * 16.0) / 4.0),
        ("l1_loss", (2.0 + 3.0 * 4.0) / 4.0),
        ("huber_loss", (1.5 + 3.0 * 3.5) / 2.0),
    ],
)
def test_weighted_mean_divides_as_torchs(path, device, loss, expected):
    """By the weights, but Huber's by the count."""
    x, t, w = (torch.tensor(v, device=device) for v in ([3.0, 5.0], [1.0, 1.0], [1.0, 3.0]))
    ours, torchs = _pair(loss)
    assert ours(x, t, weight=w).item() == expected
    assert torchs(x, t, weight=w).item() == expected


@every_loss
def test_broadcast_target_warns_as_torch_does(path, device, loss):
    x, t = torch.tensor([[1.0, 2.0], [3.0, 5.0]], device=device), torch.tensor([1.0, 1.0], device=device)
    t.requires_grad_()
    with pytest.warns(UserWarning, match="target size") as caught:
        found = getattr(gk, loss)(x, t, reduction="sum")
    assert sum("target size" in str(warning.message) for warning in caught) == 1
    found.backward()
    expected, slope = {
        "mse_loss": (21.0, [-4.0, -10.0]),
        "l1_loss": (7.0, [-1.0, -2.0]),
        "smooth_l1_loss": (0.5 + 1.5 + 3.5, [-1.0, -2.0]),
        "huber_loss": (0.5 + 1.5 + 3.5, [-1.0, -2.0]),
    }[loss]
    assert found.item() == expected
    assert t.grad.tolist() == slope


@every_loss
def test_operands_of_different_dtypes(path, device, loss):
    x, t = torch.rand(3, 5, device=device), torch.rand(3, 5, device=device, dtype=torch.float64)
    ours, torchs = _pair(loss, 0.3)
    found, (dx, dt) = _run(ours, (x, t, None), "mean")
    expected, (wanted, opposite) = _run(torchs, (x.double(), t, None), "mean")
    assert (found.dtype, dx.dtype, dt.dtype) == (torch.float64, torch.float32, torch.float64)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dx.double(), wanted, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(dt, opposite)


@every_loss
def test_no_element(path, device, loss):
    ours, _ = _pair(loss)
    x = torch.ones(0, 3, device=device, requires_grad=True)
    with gk.backend("eager"):
        assert ours(x, x.detach()).isnan()
    assert ours(x, x.detach(), reduction="sum").item() == 0.0
    assert ours(x, x.detach(), reduction="none").shape == (0, 3)
    # A kernel for the fixture that counts them.
    assert ours(torch.ones(1, device=device), torch.ones(1, device=device)).item() == 0.0


@pytest.mark.parametrize(
    ("module", "options", "expected"),
    [
        ("MSELoss", {}, 4.0),
        ("L1Loss", {}, 2.0),
        ("SmoothL1Loss", {"beta": 4.0}, 0.5),
        ("HuberLoss", {"delta": 0.5}, 0.5 * 1.75),
    ],
)
def test_modules(module, options, expected):
    ours = getattr(gk, module)(reduction="sum", **options)
    assert isinstance(ours, getattr(torch.nn, module))
    assert ours(torch.tensor([3.0]), torch.tensor([1.0])).item() == expected


BAD = [
    ({"input": torch.ones(2).long()}, NotImplementedError, "input"),
    ({"input": torch.ones(2, dtype=torch.complex64)}, NotImplementedError, "input"),
    ({"target": [1.0]}, TypeError, "target must be a Tensor, not list"),
    ({"target": torch.ones(2, device="meta")}, RuntimeError, "target must be on the input's device"),
    ({"reduction": "average"}, ValueError, "average is not a valid value for reduction"),
    ({"reduction": None}, ValueError, "reduction"),
]
BAD_WEIGHT = [
    ({"weight": torch.ones(3)}, ValueError, r"weight must have the shape \[2\] of the input, got \[3\]"),
    ({"weight": torch.ones(2).long()}, NotImplementedError, "weight"),
    ({"weight": torch.ones(2, device="meta")}, RuntimeError, "weight must be on the input's device"),
]
BAD_THRESHOLD = [
    ("smooth_l1_loss", {"beta": -1.0}, RuntimeError, "beta must not be negative, got -1.0"),
    ("smooth_l1_loss", {"beta": math.nan}, RuntimeError, "beta must not be negative, got nan"),
    ("smooth_l1_loss", {"beta": "1"}, TypeError, "beta must be a number"),
    ("huber_loss", {"delta": 0}, RuntimeError, "delta must be positive, got 0"),
    ("huber_loss", {"delta": math.nan}, RuntimeError, "delta must be positive, got nan"),
    ("huber_loss", {"delta": None}, TypeError, "delta must be a number"),
]
ROWS = [(loss, *row) for loss in THRESHOLDS for row in BAD]
ROWS += [(loss, *row) for loss in sorted(WEIGHTED) for row in BAD_WEIGHT] + BAD_THRESHOLD


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize(("loss", "arguments", "error", "message"), ROWS)
def test_bad_input(loss, arguments, error, message, backend, device):
    if not INTERPRETED and backend == "triton":
        arguments = {n: v.to(device) if isinstance(v, torch.Tensor) and not v.is_meta else v for n, v in arguments.items()}
    good = {"input": torch.ones(2, device=device), "target": torch.ones(2, device=device)}
    with gk.backend(backend):
        with refused(loss, arguments, error, message):
            getattr(gk, loss)(**(good | arguments))
        assert getattr(gk, loss)(**good).item() == 0.0


@pytest.mark.parametrize("loss", sorted(WEIGHTED))
def test_small_weighted_losses_are_those_of_blocks(loss, monkeypatch):
    """Plain operators and blocks of them; only the first are differentiated by autograd."""
    tensors = [torch.rand(300), torch.rand(300), torch.rand(300)]
    ours, _ = _pair(loss, 0.3)
    plain, grads = _run(ours, tensors, "mean")
    monkeypatch.setattr(api, "PLAIN_BELOW", 0)
    blocks, others = _run(ours, tensors, "mean")
    torch.testing.assert_close((plain, grads), (blocks, others))
