"""Binary cross entropy on probabilities: both clamps, certainties right and wrong, and what lies outside [0, 1]."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import genloss_kernels as gk
from genloss_kernels.core.backend import INTERPRETED
from genloss_kernels.losses.binary_cross_entropy import api

from .comparison import DTYPES, HALVES, check, check_second_derivatives, no_synchronisation


@pytest.fixture(autouse=True)
def _blocks(monkeypatch):
    monkeypatch.setattr(api, "PROBABILITIES_BUILTIN_BELOW", 0)


def _tensors(*shape, dtype=torch.float32):
    return {name: torch.rand(shape).clamp(0.01, 0.99).to(dtype) for name in ("input", "target")}


def test_by_hand(path):
    loss = gk.binary_cross_entropy(torch.tensor([0.25, 0.5]), torch.tensor([1.0, 0.3]), reduction="none")
    assert loss.tolist() == pytest.approx([math.log(4.0), math.log(2.0)], rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, (5, 1), (7,), ()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(path, weight, reduction, dtype):
    arguments = {**_tensors(5, 7, dtype=dtype), "reduction": reduction}
    if weight is not None:
        arguments["weight"] = (torch.rand(weight) + 0.5).to(dtype)
    check(gk.binary_cross_entropy, F.binary_cross_entropy, arguments, ("input", "target"))


def test_several_tiles_and_a_tail(path):
    check(gk.binary_cross_entropy, F.binary_cross_entropy, _tensors(5, 5003), ("input", "target"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_built_in_is_what_blocks_are(dtype, reduction, monkeypatch):
    arguments = {**_tensors(5, 7, dtype=dtype), "weight": torch.rand(7), "reduction": reduction}
    blocks = check(gk.binary_cross_entropy, F.binary_cross_entropy, arguments, ("input", "target"))
    monkeypatch.setattr(api, "PROBABILITIES_BUILTIN_BELOW", 2**15)
    torch.testing.assert_close(gk.binary_cross_entropy(**arguments), blocks)


@pytest.mark.parametrize("differentiable", ["input", "target"])
def test_one_gradient_alone(path, differentiable):
    check(gk.binary_cross_entropy, F.binary_cross_entropy, _tensors(5, 7), (differentiable,))


@pytest.mark.parametrize("weight", [torch.int64, torch.float64, torch.bfloat16])
def test_the_loss_has_the_dtype_of_the_input(path, weight):
    arguments = {**_tensors(3, 4), "weight": torch.tensor([1, 2, 3, 4], dtype=weight)}
    found = check(gk.binary_cross_entropy, F.binary_cross_entropy, arguments)
    assert found.dtype == F.binary_cross_entropy(**arguments).dtype


def test_autocast_on_a_cpu_is_fp32_as_torchs():
    arguments = _tensors(3, 4, dtype=torch.bfloat16)
    with gk.backend("eager"):
        for target in (arguments["target"], arguments["target"].float()):
            with torch.autocast("cpu", torch.bfloat16):
                found = gk.binary_cross_entropy(arguments["input"], target)
                expected = F.binary_cross_entropy(arguments["input"], target)
            assert found.dtype == expected.dtype == torch.float32
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_on_a_gpu_is_an_error_as_torchs(dtype, monkeypatch):
    """Which does not ask for the dtype of the operands."""
    tensors = {name: tensor.to("meta") for name, tensor in _tensors(3, 4, dtype=dtype).items()}
    assert gk.binary_cross_entropy(**tensors).dtype == dtype
    monkeypatch.setattr(api, "autocasting", lambda device: True)
    with pytest.raises(RuntimeError, match="binary_cross_entropy is unsafe to autocast"):
        gk.binary_cross_entropy(**tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_torch_refuses_autocast_on_a_gpu():
    tensors = _tensors(3, 4)
    for function in (gk.binary_cross_entropy, F.binary_cross_entropy):
        with torch.autocast("cuda"), pytest.raises(RuntimeError, match="unsafe to autocast"):
            function(**tensors)


def test_second_derivatives(path):
    arguments = {**_tensors(3, 5), "weight": torch.rand(5)}
    check_second_derivatives(gk.binary_cross_entropy, F.binary_cross_entropy, arguments, ("input", "target"))


# Input and target: certainties right and wrong, and what is so close to them that a logarithm or a variance is clamped.
CORNERS = [
    (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.25), (1.0, 0.25), (1e-44, 0.5), (1e-30, 1.0), (1e-13, 0.5),
    (1e-9, 0.0), (1e-20, 0.0), (1.0 - 2.0**-24, 0.0), (1.0 - 2.0**-24, 1.0), (0.5, 0.5),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_corners_are_torchs(path, dtype):
    results = []
    for function, wide in ((gk.binary_cross_entropy, dtype), (F.binary_cross_entropy, torch.float64)):
        # Both take the values that the narrow dtype has.
        columns = (torch.tensor(column).to(dtype).to(wide) for column in zip(*CORNERS, strict=True))
        x, t = (column.requires_grad_() for column in columns)
        loss = function(x, t, reduction="none")
        loss.sum().backward()
        results.append([value.to(dtype) for value in (loss.detach(), x.grad, t.grad)])
    precision = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=precision, atol=0.0)


def test_small_probabilities_keep_their_digits(path):
    """Where 1 - x rounds to 1."""
    x = torch.tensor([1e-9, 1e-12, 3e-5], requires_grad=True)
    loss = gk.binary_cross_entropy(x, torch.zeros(3), reduction="none")
    assert loss.tolist() == pytest.approx([1e-9, 1e-12, -math.log1p(-3e-5)], rel=1e-5)


OUTSIDE = [-0.5, 1.5, -1e-30, 1.0 + 2.0**-20, math.nan, math.inf]


@pytest.mark.parametrize("bad", OUTSIDE)
@pytest.mark.parametrize("name", ["input", "target"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_no_probability_raises_where_it_may_be_read(backend, dtype, name, bad, monkeypatch):
    monkeypatch.setenv("GENLOSS_DEBUG", "1")
    arguments = _tensors(3, dtype=dtype)
    arguments[name][1] = bad
    if dtype == torch.bfloat16 and bad == 1.0 + 2.0**-20:
        arguments[name][1] = 1.0078125
    message = f"all elements of {name} should be between 0 and 1, got"
    with gk.backend(backend), pytest.raises(RuntimeError, match=message):
        gk.binary_cross_entropy(**arguments)


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="a GPU's semantics, on the CPU")
@pytest.mark.parametrize("bad", OUTSIDE)
@pytest.mark.parametrize("name", ["input", "target"])
def test_no_probability_is_nan_on_a_device(name, bad):
    arguments = _tensors(3)
    arguments[name][1] = bad
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    with gk.backend("triton"), gk.testing.device_semantics():
        loss = gk.binary_cross_entropy(**arguments, reduction="none")
        results = [loss, *torch.autograd.grad(loss.sum(), leaves, create_graph=False, retain_graph=True)]
        # By the reference, as a second derivative needs them.
        results += torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    for result in results:
        assert result.isnan().tolist() == [False, True, False]


@pytest.mark.interpreter
def test_nothing_waits_for_a_device(monkeypatch):
    arguments = {name: tensor.requires_grad_() for name, tensor in _tensors(5, 7).items()}
    with gk.backend("triton"), no_synchronisation(monkeypatch):
        gk.binary_cross_entropy(**arguments).backward()


def test_no_element(path):
    nothing = torch.ones(0, 3)
    with gk.backend("eager"):
        assert gk.binary_cross_entropy(nothing, nothing).isnan()
    assert gk.binary_cross_entropy(nothing, nothing, reduction="sum") == 0.0
    # A kernel for the fixture that counts them.
    assert gk.binary_cross_entropy(torch.ones(1), torch.ones(1)) == 0.0


def test_module(path):
    module = gk.BCELoss(torch.tensor([1.0, 3.0]), reduction="sum")
    assert isinstance(module, torch.nn.BCELoss)
    assert set(module.state_dict()) == {"weight"}
    found = module(torch.full((2, 2), 0.5), torch.rand(2, 2))
    assert found.item() == pytest.approx(8.0 * math.log(2.0), rel=1e-6)
