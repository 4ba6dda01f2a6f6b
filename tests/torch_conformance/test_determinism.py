"""The same input gives the same bits, nothing of the caller's is written to, and any upstream gradient is honoured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels import cases
from genloss_kernels.core.backend import INTERPRETED

from .examples import Draw

# Elements above which the interpreter takes seconds, and those above which it takes ten.
SLOW, SLOWEST = 2**14, 2**20


def _cases(below: float) -> Iterator[pytest.ParameterSet]:
    """Every case of the doctor on the eager path, and those with fewer elements than ``below`` on the kernels'."""
    for case in cases.select(cases.DOCTOR):
        label = f"{case.loss}-{case.name}".replace(" ", "_")
        yield pytest.param(case, torch.float32, "eager", "as is", id=f"eager-{label}")
        yield pytest.param(case, torch.float32, "eager", "blocks", id=f"blocks-{label}")
        yield pytest.param(case, torch.bfloat16, "eager", "as is", id=f"eager-{label}-bfloat16")
        elements = _elements(case.call()) if INTERPRETED else 0
        if elements < below:
            marks = [pytest.mark.interpreter, *([pytest.mark.slow] if elements >= SLOWEST else [])]
            yield pytest.param(case, torch.float32, "triton", "as is", id=f"triton-{label}", marks=marks)


def _elements(call: cases.Call) -> int:
    return max(tensor.numel() for tensor in call.tensors().values())


def every_case(below: float = float("inf")) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("case", "dtype", "path", "small"), list(_cases(below)), indirect=["path", "small"])


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def assert_same_bits(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    assert found.dtype == expected.dtype, what
    assert torch.equal(_bits(found), _bits(expected)), f"{what}: other bits"


def _leaves(call: cases.Call) -> list[Tensor]:
    return [call.arguments[name] for name in call.differentiable]


def _upstream(loss: Tensor) -> Tensor:
    generator = torch.Generator(loss.device).manual_seed(5)
    return torch.randn(loss.shape, generator=generator, device=loss.device).to(loss.dtype)


@every_case()
def test_repeats(case: cases.Case, dtype: torch.dtype, path: str, small: str, device: torch.device) -> None:
    call = case.call(device, dtype)
    leaves = _leaves(call)
    tensors = call.tensors()
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in tensors.items()}

    loss = case.function(**call.arguments)
    upstream = _upstream(loss)
    kept_upstream, kept_loss = upstream.clone(), loss.detach().clone()
    grads = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, upstream)
    for name, one, other in zip(call.differentiable, grads, again, strict=True):
        assert_same_bits(other, one, f"second backward, gradient of {name}")
    for name, (value, version) in before.items():
        assert_same_bits(tensors[name], value, f"{name} after the calls")
        assert tensors[name]._version == version, f"{name} was written to"
    assert_same_bits(upstream, kept_upstream, "upstream gradient after the calls")
    assert_same_bits(loss, kept_loss, "loss after the calls")

    # The largest repeat nothing under the interpreter: smaller ones take the same kernels.
    elements = _elements(call) if path == "triton" and INTERPRETED else 0
    for run in range(10 if elements < SLOW else 3 if elements < SLOWEST else 1):
        if run == 0:
            continue
        loss = case.function(**call.arguments)
        assert_same_bits(loss, kept_loss, f"loss of run {run}")
        for name, one, other in zip(call.differentiable, grads, torch.autograd.grad(loss, leaves, upstream), strict=True):
            assert_same_bits(other, one, f"gradient of {name} in run {run}")


@every_case(below=SLOW)
def test_upstream_gradients(case: cases.Case, dtype: torch.dtype, path: str, small: str, device: torch.device) -> None:
    call = case.call(device, dtype)
    leaves = _leaves(call)
    loss = case.function(**call.arguments)

    def gradients(upstream: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, leaves, upstream, retain_graph=True)

    ones = gradients(torch.ones_like(loss))
    # With one class there is nothing to learn.
    assert any(grad.any() for grad in ones) or "one class" in case.name
    expanded = gradients(torch.ones((), dtype=loss.dtype, device=device).expand(loss.shape))
    for name, one, other in zip(call.differentiable, ones, expanded, strict=True):
        assert_same_bits(other, one, f"gradient of {name}, stride 0")
    # A power of two: scaling by it rounds nothing. Zeros change their sign.
    for name, one, other in zip(call.differentiable, ones, gradients(torch.full_like(loss, -4.0)), strict=True):
        assert torch.equal(other, one * -4.0), f"gradient of {name} does not scale with the upstream gradient"
    zeros = gradients(torch.zeros_like(loss))
    assert not any(grad.any() for grad in zeros)
    total = loss.sum() * 1.0
    total.backward()
    for name, one in zip(call.differentiable, ones, strict=True):
        assert_same_bits(call.gradients()[name], one, f"gradient of {name} by .sum().backward()")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_upstream_element_reaches_its_row(reduction: str, path: str, device: torch.device) -> None:
    """A gradient of one row alone leaves the others 0, in every memory layout of the upstream gradient."""
    draw = Draw(device, torch.float64)
    logits, target = draw.normal(4, 5, 3).requires_grad_(), draw.labels(5, 4, 3)
    loss = gk.cross_entropy(logits, target, reduction=reduction)
    if reduction == "mean":
        (grad,) = torch.autograd.grad(loss, logits)
        assert (grad.abs().sum(1) > 0).equal(target != -100)
        return
    dense = draw.normal(4, 3)
    (expected,) = torch.autograd.grad(loss, logits, dense, retain_graph=True)
    for upstream in (dense.t().contiguous().t(), draw.normal(8, 6)[::2, ::2].copy_(dense)):
        (grad,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
        assert_same_bits(grad, expected, f"strides {upstream.stride()}")
    single = torch.zeros_like(dense)
    single[2, 0] = dense[2, 0]
    assert target[2, 0] >= 0
    (grad,) = torch.autograd.grad(loss, logits, single)
    assert torch.equal(grad[2, :, 0], expected[2, :, 0])
    grad[2, :, 0] = 0.0
    assert not grad.any()


def _statistics_oracle(logits: Tensor, target: Tensor, transform: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    y = transform(logits)
    log_p = torch.log_softmax(y, 1)
    if target.is_floating_point():
        loss, log_prob = F.cross_entropy(y, target, reduction="none"), (target * log_p).sum(1)
        valid = torch.ones_like(loss, dtype=torch.bool)
    else:
        loss, valid = F.cross_entropy(y, target, reduction="none"), target != -100
        log_prob = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    rows = {"lse": torch.logsumexp(y, 1), "log_prob": log_prob, "entropy": -(log_p.exp() * log_p).sum(1)}
    return {"loss": loss, **{name: row * valid for name, row in rows.items()}}


_NAMES = ("loss", "lse", "log_prob", "entropy")


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("capped", [False, True], ids=["plain", "softcap"])
@pytest.mark.parametrize("columns", [7, 300])
def test_partial_statistics(columns: int, capped: bool, soft: bool, path: str, device: torch.device) -> None:
    """The gradient of any selection of the statistics, against autograd through their definitions."""
    draw = Draw(device, torch.float64)
    logits = draw.normal(4, columns).requires_grad_()
    target = draw.probabilities(4, columns) if soft else draw.labels(columns, 4)
    options = {"softcap": 2.0, "logit_scale": 0.5} if capped else {}

    def transform(x: Tensor) -> Tensor:
        return 2.0 * torch.tanh(0.5 * x / 2.0) if capped else x

    stats = gk.cross_entropy(logits, target, reduction="none", return_stats=True, **options)
    exact = _statistics_oracle(logits, target, transform)
    weights = {name: draw.normal(4) for name in _NAMES}
    selections = [s for size in (1, 2, 4) for s in itertools.combinations(_NAMES, size)]
    for selection in selections:
        found = sum(((weights[n] * getattr(stats, n)).sum() for n in selection), torch.zeros((), device=device))
        wanted = sum(((weights[n] * exact[n]).sum() for n in selection), torch.zeros((), device=device))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        (grad,) = torch.autograd.grad(found, logits, retain_graph=True)
        (expected,) = torch.autograd.grad(wanted, logits, retain_graph=True)
        torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-12, msg=lambda m, s=selection: f"{s}: {m}")


def test_counts_take_no_gradient(path: str, device: torch.device) -> None:
    draw = Draw(device, torch.float32)
    stats = gk.cross_entropy(
        draw.normal(4, 5).requires_grad_(), torch.tensor([0, 1, -100, 2], device=device), return_stats=True
    )
    assert stats.n_valid.item() == 3
    for name in ("n_valid", "n_correct"):
        count = getattr(stats, name)
        assert not count.requires_grad
        assert count.dtype == torch.int64
        assert count.dim() == 0
