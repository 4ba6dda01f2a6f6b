"""The Gaussian negative log-likelihood: hand-worked values, clamped and special variances, shapes, and no waiting."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import genloss_kernels as gk
from genloss_kernels.losses.gaussian_nll import api

from ..refusals import refused
from .comparison import DTYPES, check, no_synchronisation

NAMES = ("input", "target", "var")


@pytest.fixture(autouse=True)
def _blocks(monkeypatch):
    monkeypatch.setattr(api, "PLAIN_BELOW", 0)


def _tensors(*shape, dtype=torch.float32, var=None):
    x, t = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    return {"input": x, "target": t, "var": (torch.rand(var or shape) + 0.1).to(dtype)}


def _oracle(input, target, var, full=False, eps=1e-6, reduction="mean"):
    """Torch's, with its check taken out of the way of a variance that broadcasts."""
    return F.gaussian_nll_loss(input, target, var, full=full, eps=eps, reduction=reduction)


def test_by_hand(path):
    loss = gk.gaussian_nll_loss(
        torch.tensor([1.0, 5.0]), torch.tensor([3.0, 5.0]), torch.tensor([2.0, 1.0]), reduction="none"
    )
    assert loss.tolist() == pytest.approx([0.5 * (math.log(2.0) + 2.0), 0.0], abs=1e-7)
    one = torch.ones(3, dtype=torch.float64)
    full = gk.gaussian_nll_loss(one, one, one, full=True, reduction="sum")
    assert full.item() == pytest.approx(1.5 * math.log(2.0 * math.pi), rel=1e-15)
    normal = torch.distributions.Normal(torch.tensor(1.0), torch.tensor(0.5))
    loss = gk.gaussian_nll_loss(torch.tensor(1.0), torch.tensor(2.5), torch.tensor(0.25), full=True)
    assert loss.item() == pytest.approx(-normal.log_prob(torch.tensor(2.5)).item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(3, 7), (5, 5003)], ids=["one tile", "several tiles and a tail"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(path, shape, reduction, dtype):
    arguments = {**_tensors(*shape, dtype=dtype), "full": True, "reduction": reduction}
    check(gk.gaussian_nll_loss, _oracle, arguments, NAMES)


@pytest.mark.parametrize("var", [(4, 6, 1), (4, 6), (4, 1, 5), (1, 6, 5)])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_shared_variances(path, var, dtype):
    check(gk.gaussian_nll_loss, _oracle, _tensors(4, 6, 5, dtype=dtype, var=var), NAMES)


def test_a_target_that_broadcasts(path):
    arguments = {**_tensors(4, 5), "target": torch.randn(3, 4, 1)}
    check(gk.gaussian_nll_loss, _oracle, arguments, NAMES)


@pytest.mark.parametrize("var", [0.3, 0.0, 1e-9])
def test_one_number_for_all(path, var):
    arguments = {**_tensors(4, 5), "var": var, "eps": 1e-3}
    check(gk.gaussian_nll_loss, _oracle, arguments, ("input", "target"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamped_variances_take_a_gradient(path, dtype):
    """That at the clamped variance, as in torch, whose clamp autograd does not see."""
    arguments = {**_tensors(4, 50, dtype=dtype), "eps": 0.5}
    assert (arguments["var"] < 0.5).any()
    check(gk.gaussian_nll_loss, _oracle, arguments, NAMES)
    x = torch.tensor(3.0, requires_grad=True)
    var = torch.tensor(0.0, requires_grad=True)
    gk.gaussian_nll_loss(x, torch.tensor(1.0), var, eps=0.5).backward()
    assert x.grad == 4.0
    assert var.grad == 0.5 * (2.0 - 16.0)


# Mean, target 0 and variance: what torch gives is what this gives.
CORNERS = [
    (1.0, 0.0), (0.0, 0.0), (1.0, 1e-9), (math.inf, 1.0), (-math.inf, 1.0), (1.0, math.inf), (math.inf, math.inf),
    (math.nan, 1.0), (1.0, math.nan), (1e20, 1.0), (1e-20, 1.0),
]  # fmt: skip


@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_corners_are_torchs(path, eps):
    # Without a least variance the slope at 0 is a difference of infinities in torch.
    corners = [corner for corner in CORNERS if eps or corner != (1.0, 0.0)]
    results = []
    for function in (gk.gaussian_nll_loss, F.gaussian_nll_loss):
        x, var = (torch.tensor(column, requires_grad=True) for column in zip(*corners, strict=True))
        loss = function(x, torch.zeros(len(corners)), var, eps=eps, reduction="none")
        loss.sum().backward()
        results.append([loss.detach(), x.grad, var.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_no_element(path):
    nothing = torch.ones(0, 3)
    with gk.backend("eager"):
        assert gk.gaussian_nll_loss(nothing, nothing, nothing).isnan()
    assert gk.gaussian_nll_loss(nothing, nothing, nothing, reduction="sum") == 0.0
    # A kernel for the fixture that counts them.
    assert gk.gaussian_nll_loss(torch.ones(1), torch.ones(1), torch.ones(1)) == 0.0


def test_small_inputs_are_those_of_blocks(path, monkeypatch):
    arguments = {**_tensors(5, 7), "eps": 0.5}
    blocks = check(gk.gaussian_nll_loss, _oracle, arguments, NAMES)
    monkeypatch.setattr(api, "PLAIN_BELOW", 2**15)
    torch.testing.assert_close(check(gk.gaussian_nll_loss, _oracle, arguments, NAMES), blocks)


@pytest.mark.parametrize("worst", [[1.0, -1e-6], [math.nan, -1.0]], ids=str)
def test_negative_variances_raise_where_they_may_be_read(worst):
    with pytest.raises(ValueError, match="var has a negative entry"):
        gk.gaussian_nll_loss(torch.ones(2), torch.ones(2), torch.tensor(worst))


@pytest.mark.interpreter
def test_nothing_waits_for_a_device(monkeypatch):
    arguments = {name: tensor.requires_grad_() for name, tensor in _tensors(5, 7).items()}
    with gk.backend("triton"), no_synchronisation(monkeypatch):
        gk.gaussian_nll_loss(**arguments).backward()
        gk.gaussian_nll_loss(arguments["input"], arguments["target"], 0.5).backward()


@pytest.mark.interpreter
def test_negative_variances_count_as_eps_on_a_device():
    with gk.backend("triton"), gk.testing.device_semantics():
        found = gk.gaussian_nll_loss(torch.ones(2), torch.zeros(2), torch.tensor([-1.0, 0.5]), eps=0.5, reduction="none")
    assert found[0] == found[1]


def test_module(path):
    module = gk.GaussianNLLLoss(full=True, eps=0.5, reduction="sum")
    assert isinstance(module, torch.nn.GaussianNLLLoss)
    arguments = _tensors(3, 4)
    expected = torch.nn.GaussianNLLLoss(full=True, eps=0.5, reduction="sum")(*arguments.values())
    torch.testing.assert_close(module(*arguments.values()), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input must be a Tensor"),
        ({"input": torch.ones(4, 5).long()}, NotImplementedError, "input"),
        ({"target": 1.0}, TypeError, "target must be a Tensor"),
        ({"target": torch.ones(4, 5, dtype=torch.complex64)}, NotImplementedError, "target"),
        ({"target": torch.ones(4, 3)}, RuntimeError, r"input \[4, 5\], target \[4, 3\]"),
        ({"var": torch.ones(4, 3)}, ValueError, r"var is of incorrect size: .* \[4, 5\] .* got \[4, 3\]"),
        ({"var": torch.ones(5)}, ValueError, "var is of incorrect size"),
        ({"var": torch.ones(1, 1)}, ValueError, "var is of incorrect size"),
        ({"var": 1}, TypeError, "var must be a Tensor"),
        ({"var": -1.0}, ValueError, "var has a negative entry"),
        ({"var": torch.ones(4, 5).long()}, NotImplementedError, "var"),
        ({"var": torch.ones(4, 5, device="meta")}, RuntimeError, "var must be on the input's device"),
        ({"eps": "1"}, TypeError, "eps must be a number"),
        ({"reduction": "batchmean"}, ValueError, "batchmean is not a valid value for reduction"),
    ],
)
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_bad_input(arguments, error, message, backend):
    good = {name: torch.ones(4, 5) for name in NAMES}
    with gk.backend(backend):
        with refused("gaussian_nll_loss", arguments, error, message):
            gk.gaussian_nll_loss(**(good | arguments))
        assert gk.gaussian_nll_loss(**good) == 0.0
