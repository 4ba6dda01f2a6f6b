"""Squared error: both paths against torch in fp64, and what torch's weight means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import genloss_kernels as gk
from genloss_kernels.testing import assert_close

SHAPES = {"one tile": (3, 7), "several tiles and a tail": (5, 5003)}
# fp16 keeps the eager path off the built-in, and on the blocks of the reference.
DTYPES = (torch.float32, torch.float16)


def _run(loss, tensors, reduction, upstream=None):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    result = loss(leaves[0], leaves[1], reduction=reduction, weight=leaves[2])
    result.backward(torch.ones_like(result) if upstream is None else upstream.to(result))
    return result.detach(), [t.grad for t in leaves if t is not None]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients(path, device, dtype, shape, weighted, reduction):
    tensors = [torch.rand(shape, device=device).to(dtype) for _ in range(3 if weighted else 2)]
    tensors += [None] * (3 - len(tensors))
    upstream = torch.rand(shape if reduction == "none" else (), device=device)
    wide = [None if t is None else t.double() for t in tensors]
    loss, grads = _run(gk.mse_loss, tensors, reduction, upstream.to(dtype))
    expected, expected_grads = _run(F.mse_loss, wide, reduction, upstream.to(dtype))
    torch_loss, torch_grads = _run(F.mse_loss, tensors, reduction, upstream.to(dtype))
    assert_close(loss, expected, like=torch_loss)
    for grad, wanted, usual in zip(grads, expected_grads, torch_grads, strict=True):
        assert_close(grad, wanted, like=usual)


def test_weighted_mean_divides_by_the_weights(path, device):
    x, t, w = (torch.tensor(v, device=device) for v in ([3.0, 5.0], [1.0, 1.0], [1.0, 3.0]))
    assert gk.mse_loss(x, t, weight=w).item() == (4.0 + 3 * 16.0) / 4.0


def test_broadcast_target_warns_as_torch_does(path, device):
    x, t = torch.tensor([[1.0, 2.0], [3.0, 5.0]], device=device), torch.tensor([1.0, 1.0], device=device)
    t.requires_grad_()
    with pytest.warns(UserWarning, match="target size"):
        loss = gk.mse_loss(x, t, reduction="sum")
    loss.backward()
    assert loss.item() == 0.0 + 1.0 + 4.0 + 16.0
    assert t.grad.tolist() == [-4.0, -10.0]


def test_module():
    module = gk.MSELoss(reduction="sum")
    assert isinstance(module, torch.nn.MSELoss)
    assert module(torch.tensor([3.0]), torch.tensor([1.0])).item() == 4.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2), torch.ones(2), torch.ones(3)), ValueError, "weight"),
        ((torch.ones(2).long(), torch.ones(2), None), NotImplementedError, "input"),
        ((torch.ones(2), [1.0], None), TypeError, "target"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        gk.mse_loss(arguments[0], arguments[1], weight=arguments[2])
    with pytest.raises(ValueError, match="reduction"):
        gk.mse_loss(torch.ones(2), torch.ones(2), reduction="average")
