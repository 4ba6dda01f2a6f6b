"""The Kullback-Leibler divergence: values by hand, torch's special values, reductions, shapes, warning."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import genloss_kernels as gk
from genloss_kernels.losses.kl_div import api

from .comparison import DTYPES, check, check_second_derivatives

BOTH = ("input", "target")

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")


@pytest.fixture(autouse=True)
def _blocks(monkeypatch):
    monkeypatch.setattr(api, "BUILTIN_BELOW", 0)
    monkeypatch.setattr(api, "LOGARITHMS_BUILTIN_BELOW", 0)


def _tensors(*shape, dtype=torch.float32, log_target=False, target=None):
    x, t = torch.log_softmax(torch.randn(shape), -1), torch.log_softmax(torch.randn(target or shape), -1)
    return {"input": x.to(dtype), "target": (t if log_target else t.exp()).to(dtype), "log_target": log_target}


def test_by_hand(path):
    x, t = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert gk.kl_div(x, t, reduction="batchmean").item() == pytest.approx(expected, rel=1e-6)
    assert gk.kl_div(x, t.log(), reduction="sum", log_target=True).item() == pytest.approx(expected, rel=1e-6)
    p, q = torch.distributions.Categorical(t[0]), torch.distributions.Categorical(logits=x[0])
    assert torch.distributions.kl_divergence(p, q).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
@pytest.mark.parametrize("shape", [(3, 7), (5, 5003)], ids=["one tile", "several tiles and a tail"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(path, shape, reduction, log_target, dtype):
    arguments = {**_tensors(*shape, dtype=dtype, log_target=log_target), "reduction": reduction}
    check(gk.kl_div, F.kl_div, arguments, BOTH)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "none"])
@pytest.mark.parametrize(("input", "target"), [((4, 5), (5,)), ((5,), (4, 5)), ((1, 5), (4, 1)), ((4, 5), (3, 4, 5))])
def test_shapes_that_broadcast(path, input, target, reduction):
    """``batchmean`` divides by the input's first size."""
    arguments = {**_tensors(*input, target=target), "reduction": reduction}
    check(gk.kl_div, F.kl_div, arguments, BOTH)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("target", [(), (3,)])
def test_a_single_number(path, target, reduction):
    arguments = {"input": torch.tensor(-1.0), "target": torch.rand(target), "reduction": reduction}
    check(gk.kl_div, F.kl_div, arguments, BOTH)


# Input and target: what torch gives is what this gives.
CORNERS = {
    False: [(-1.0, 0.0), (-math.inf, 0.0), (-math.inf, 0.5), (-1.0, -1.0), (-1.0, math.inf), (math.nan, 0.5),
            (-1.0, math.nan), (-1e30, 1e-30), (0.0, 1.0), (math.inf, 0.0), (-2000.0, 1e-44), (-1.0, -0.0)],
    True: [(-1.0, -math.inf), (-math.inf, -math.inf), (-math.inf, -0.5), (-1.0, 1.0), (-1.0, math.inf), (math.nan, -0.5),
           (-1.0, math.nan), (-1.0, -200.0), (0.0, 0.0)],
}  # fmt: skip


@pytest.mark.parametrize("log_target", [False, True])
def test_corners_are_torchs(path, log_target):
    results = []
    for function in (gk.kl_div, F.kl_div):
        x, t = (torch.tensor(column, requires_grad=True) for column in zip(*CORNERS[log_target], strict=True))
        loss = function(x, t, reduction="none", log_target=log_target)
        loss.sum().backward()
        results.append([loss.detach(), x.grad, t.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_the_lowest_logarithm_counts_in_full(path):
    x, t = torch.tensor([-1000.0], dtype=torch.float64), torch.tensor([1e-300], dtype=torch.float64)
    loss = gk.kl_div(x, t, reduction="sum") * 1e300
    assert loss.item() == pytest.approx(1000.0 + math.log(1e-300), rel=1e-12)


@pytest.mark.parametrize("log_target", [False, True])
def test_second_derivatives(path, log_target):
    arguments = {**_tensors(3, 5, log_target=log_target), "reduction": "batchmean"}
    check_second_derivatives(gk.kl_div, F.kl_div, arguments, BOTH)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
@pytest.mark.parametrize(("input", "target"), [((4, 5), (4, 5)), ((1, 5), (4, 5)), ((), ())])
def test_the_built_in_is_what_blocks_are(log_target, reduction, input, target, monkeypatch):
    arguments = {"input": -torch.rand(input), "target": torch.rand(target), "log_target": log_target, "reduction": reduction}
    blocks = check(gk.kl_div, F.kl_div, arguments, BOTH)
    monkeypatch.setattr(api, "BUILTIN_BELOW", 2**17)
    monkeypatch.setattr(api, "LOGARITHMS_BUILTIN_BELOW", math.inf)
    torch.testing.assert_close(check(gk.kl_div, F.kl_div, arguments, BOTH), blocks)


@pytest.mark.parametrize("differentiable", [("input",), ("target",)])
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_gradient_alone(path, dtype, log_target, differentiable):
    arguments = {**_tensors(3, 5, dtype=dtype, log_target=log_target), "reduction": "sum"}
    check(gk.kl_div, F.kl_div, arguments, differentiable)


def test_operands_of_different_dtypes(path):
    arguments = {**_tensors(5, 7), "reduction": "batchmean"}
    arguments["target"] = arguments["target"].double()
    check(gk.kl_div, F.kl_div, arguments, BOTH, dtype=torch.float64)


def test_no_element(path):
    nothing = torch.ones(0, 3)
    with gk.backend("eager"):
        assert gk.kl_div(nothing, nothing, reduction="batchmean").isnan()
    assert gk.kl_div(nothing, nothing, reduction="sum") == 0.0
    # A kernel for the fixture that counts them.
    assert gk.kl_div(torch.zeros(1), torch.ones(1), reduction="sum") == 0.0


@pytest.mark.filterwarnings("error")
def test_the_mean_warns_as_torchs_does():
    x = torch.zeros(2, 3)
    for function in (gk.kl_div, F.kl_div):
        with pytest.warns(UserWarning, match="reduction: 'mean' divides the total loss"):
            function(x, x)
        with pytest.warns(UserWarning, match="size_average and reduce"):
            function(x, x, size_average=True)
        function(x, x, reduction="batchmean")


def test_module(path):
    module = gk.KLDivLoss(reduction="batchmean", log_target=True)
    assert isinstance(module, torch.nn.KLDivLoss)
    x, t = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(module(x, t), torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(x, t))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_known_failure_warning_in_a_compiled_graph() -> None:
    operands = torch.randn(4, 3), torch.rand(4, 3)
    for module in (gk.KLDivLoss(), gk.MSELoss()):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        given = operands if isinstance(module, gk.KLDivLoss) else (operands[0], operands[1][0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = module(*given)
        torch.testing.assert_close(compiled(*given), wanted)
