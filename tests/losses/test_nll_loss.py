"""Negative log-likelihood on both paths against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core.launch import ELEMENTWISE_TILES
from genloss_kernels.losses.nll_loss import reference

from .comparison import DTYPES, aligned, check, check_second_derivatives, no_synchronisation, untouched

BLOCK = ELEMENTWISE_TILES[4].block


def _arguments(x: Tensor, ignored: int | None = 3, **options: Any) -> dict[str, Any]:
    """Log-probabilities (N, C, d1, ...) with labels, the first and last class among them, every third ignored."""
    target = torch.randint(x.size(1), (x.size(0), *x.shape[2:]))
    target.view(-1)[:1], target.view(-1)[-1:] = x.size(1) - 1, 0
    if ignored is not None:
        target.view(-1)[1::ignored] = -100
    return {"input": x, "target": target, **options}


def _oracle(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """torch's own, whose backward takes no layout but the contiguous one."""
    return F.nll_loss(input.contiguous(), target, **options)


LAYOUTS = {
    "one row": lambda: aligned(1, 7),
    "one class": lambda: aligned(5, 1),
    "one block": lambda: aligned(BLOCK, 3),
    "two blocks and one more row": lambda: aligned(2 * BLOCK + 1, 2),
    "long rows": lambda: aligned(4, 1003),
    "classes in dimension 1": lambda: aligned(2, 19, 9, 7),
    "next-token view": lambda: aligned(2, 4, 51)[:, :-1].transpose(1, 2),
    "channels last": lambda: aligned(2, 19, 5, 7).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: aligned(70, 5).t(),
    "sliced": lambda: aligned(9, 40)[::2, 3:],
    "every other class": lambda: aligned(9, 40)[:, ::2],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(path: str, name: str) -> None:
    check(gk.nll_loss, _oracle, _arguments(LAYOUTS[name]()))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reduction(path: str, reduction: str, weighted: bool) -> None:
    options = {"weight": torch.rand(19) + 0.5} if weighted else {}
    check(gk.nll_loss, F.nll_loss, _arguments(aligned(3, 19, 4), reduction=reduction, **options))
    check(gk.nll_loss, F.nll_loss, _arguments(aligned(BLOCK + 7, 19), reduction=reduction, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(path: str, dtype: torch.dtype) -> None:
    x = aligned(40, 19, dtype=dtype)
    for reduction in ("mean", "none"):
        arguments = _arguments(x, weight=torch.rand(19).to(dtype), reduction=reduction)
        # The eager path is torch's own, which adds halves up in halves.
        check(gk.nll_loss, F.nll_loss, arguments, judge=torch.float32 if path == "triton" else dtype)


def test_one_sample(path: str) -> None:
    for reduction in ("mean", "none"):
        arguments = {"input": aligned(7), "target": torch.tensor(3), "reduction": reduction}
        assert check(gk.nll_loss, F.nll_loss, arguments).shape == ()
    assert gk.nll_loss(torch.arange(5.0), torch.tensor([3])).item() == -3.0


def test_labels_of_one_byte(path: str) -> None:
    x = aligned(9, 200)
    target = torch.randint(200, (9,)).to(torch.uint8)
    target[4] = 255
    check(gk.nll_loss, F.nll_loss, {"input": x, "target": target, "ignore_index": 255})


def test_any_label_may_be_the_ignored_one(path: str) -> None:
    for ignore_index in (3, 2**40, -(2**40)):
        arguments = _arguments(aligned(9, 10), ignored=None, ignore_index=ignore_index)
        arguments["target"][4] = ignore_index
        check(gk.nll_loss, F.nll_loss, arguments)


def test_strided_labels_and_upstream(path: str) -> None:
    x, target = aligned(3, 19, 4), torch.randint(19, (4, 6)).t()[::2]
    factors = torch.rand(4, 3).t()
    for combine in (lambda rows: (rows * factors).sum(), lambda rows: rows.sum()):
        check(
            lambda combine=combine, **given: combine(gk.nll_loss(**given, reduction="none")),
            lambda combine=combine, **given: combine(F.nll_loss(**given, reduction="none")),
            {"input": x, "target": target},
        )


def test_all_ignored(path: str) -> None:
    x = aligned(5, 10).requires_grad_()
    target = torch.full((5,), -100)
    loss = gk.nll_loss(x, target)
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.equal(grad, torch.zeros_like(grad))
    for reduction in ("sum", "none"):
        assert not gk.nll_loss(x, target, reduction=reduction).any()


def test_ignored_rows_may_hold_anything(path: str) -> None:
    x = aligned(5, 10)
    x[1] = math.nan
    x.requires_grad_()
    loss = gk.nll_loss(x, torch.tensor([0, -100, 2, 3, 4]))
    assert loss.isfinite()
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.isfinite().all()


def test_weights_of_0(path: str) -> None:
    weight = torch.ones(10)
    weight[3] = 0.0
    assert gk.nll_loss(aligned(2, 10), torch.tensor([3, 3]), weight).isnan()
    assert gk.nll_loss(aligned(2, 10), torch.tensor([3, 3]), weight, reduction="sum") == 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(reduction: str) -> None:
    for name in ("eager", "auto"):
        with gk.backend(name):
            x = torch.zeros(0, 10, requires_grad=True)
            loss = gk.nll_loss(x, torch.zeros(0, dtype=torch.int64), reduction=reduction)
        wanted = F.nll_loss(x, torch.zeros(0, dtype=torch.int64), reduction=reduction)
        torch.testing.assert_close(loss, wanted, equal_nan=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_by_the_kernels(reduction: str) -> None:
    for shape in ((0, 10), (4, 10, 0)):
        x, target = torch.zeros(shape, requires_grad=True), torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
        with gk.backend("triton"):
            loss = gk.nll_loss(x, target, reduction=reduction)
        torch.testing.assert_close(loss, F.nll_loss(x, target, reduction=reduction), equal_nan=True)
        loss.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape


def test_known_failure_first_rows_upstream_gradient(path: str) -> None:
    """With reduction="none" the first row's upstream gradient served every row (Liger #968, #1298)."""
    x = aligned(4, 10).requires_grad_()
    rows = gk.nll_loss(x, torch.tensor([3, 1, 4, 1]), reduction="none")
    (grad,) = torch.autograd.grad(rows, x, torch.tensor([0.0, 2.0, 3.0, 4.0]))
    assert grad.sum(1).tolist() == [0.0, -2.0, -3.0, -4.0]


def test_known_failure_retained_graph_and_double_backward(path: str) -> None:
    """retain_graph failed, and a second derivative was silently wrong (QuACK #209, Liger JSD)."""

    def after(function: Any) -> Any:
        return lambda input, target, **options: function(torch.log_softmax(input, 1), target, **options)

    for reduction in ("mean", "sum", "none"):
        arguments = _arguments(aligned(40, 10), weight=torch.rand(10), reduction=reduction)
        check_second_derivatives(after(gk.nll_loss), after(F.nll_loss), arguments)


@pytest.mark.parametrize("shape", [(7, 20), (3, 5, 2)])
def test_known_failure_target_out_of_range(path: str, shape: tuple[int, ...]) -> None:
    """A bad label was silent, had loss 0 with a gradient, or was stored out of bounds (Liger FLCE, flash-attn)."""
    x = aligned(*shape).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    labels = target.clone()
    labels.view(-1)[:6] = torch.tensor([-100, shape[1], -1, 2**40, -(2**40), 0])
    where = (labels != -100) & ((labels < 0) | (labels >= shape[1]))
    for bad in (shape[1], -1):
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            gk.nll_loss(x, torch.full_like(target, bad))
    for weight in (None, torch.rand(shape[1])):
        with gk.testing.device_semantics():
            rows = gk.nll_loss(x, labels, weight, reduction="none")
            (grad,) = torch.autograd.grad(rows.sum(), x)
            assert gk.nll_loss(x, labels, weight).isnan()
        clean = gk.nll_loss(x, labels.masked_fill(where, -100), weight, reduction="none")
        (wanted,) = torch.autograd.grad(clean.sum(), x)
        assert torch.equal(rows.isnan(), where)
        assert torch.equal(rows[~where], clean[~where])
        assert torch.equal(grad.nan_to_num(), wanted)
        # A bad label leaves no row without a NaN.
        assert torch.equal(grad.isnan().any(1), where)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["rows", "strided classes"])
def test_known_failure_int32_offsets(name: str) -> None:
    """Elements past 2**31 were addressed modulo 2**32 (pytorch #111484, fla #1080, trl #7266)."""
    size, stride = {"rows": ((4, 3), (2**30, 1)), "strided classes": ((2, 5), (1, 2**30))}[name]
    extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    x = untouched(2**32 + extent).as_strided(size, stride, 2**32)
    values = aligned(*size, dtype=torch.bfloat16)
    x.copy_(values)
    target = torch.full(size[:1], size[1] - 1)
    with gk.backend("triton"):
        assert torch.equal(gk.nll_loss(x, target, reduction="none"), -values[:, -1])


@pytest.mark.interpreter
def test_known_failure_host_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step waited for the device to read a value (.item(), torch.equal; Liger)."""
    x = aligned(5, 10).requires_grad_()
    arguments = _arguments(x.detach(), weight=torch.rand(10)) | {"input": x}
    with gk.backend("triton"), gk.testing.count_launches() as launches, no_synchronisation(monkeypatch):
        gk.nll_loss(**arguments).backward()
    assert launches.total() == 3


def test_reference_of_one_class_with_a_label_out_of_range() -> None:
    x = torch.full((3, 1), -1.0, requires_grad=True)
    loss = reference.nll_loss(x, torch.tensor([0, 4, -100]), None, -100, "none", checked=False)
    assert loss.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert grad.isnan().flatten().tolist() == [False, True, False]


def test_class_weights_in_any_layout(path: str) -> None:
    """The kernels read the elements between those of a strided weight."""
    x, target, weight = torch.log_softmax(aligned(4, 5), 1), torch.arange(4), torch.rand(10)[::2]
    for strided in (weight, weight[:1].expand(5)):
        assert torch.equal(gk.nll_loss(x, target, strided), gk.nll_loss(x, target, strided.contiguous()))
