"""Running a loss on the path under test and holding its value and gradients against float64."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.cases import Call
from genloss_kernels.core.launch import observe_launches

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES, torch.float64)


def check(
    loss: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    arguments: dict[str, Any],
    differentiable: Sequence[str] = ("input",),
    dtype: torch.dtype | None = None,
    judge: torch.dtype = torch.float32,
    *,
    products: bool = False,
) -> Tensor:
    """Compare ``loss`` and its gradients with ``oracle`` in float64, for an upstream gradient that differs by element.

    ``oracle`` in the dtype ``judge`` says how far off torch is. Returns the loss, which must be of ``dtype`` (the first
    differentiable argument's).
    """
    dtype = arguments[differentiable[0]].dtype if dtype is None else dtype
    results = check_outputs(
        lambda **given: {"loss": loss(**given)},
        lambda **given: {"loss": oracle(**given)},
        arguments,
        differentiable,
        judge,
        products=products,
    )
    assert results["loss"].dtype == dtype
    return results["loss"]


def check_outputs(
    losses: Callable[..., dict[str, Tensor]],
    oracles: Callable[..., dict[str, Tensor]],
    arguments: dict[str, Any],
    differentiable: Sequence[str],
    judge: torch.dtype = torch.float32,
    *,
    products: bool = False,
) -> dict[str, Tensor]:
    """As :func:`check` for several outputs: the gradient through each alone, then through all of them together."""
    call = Call(arguments, tuple(differentiable))
    exact, own = (_run(oracles, call.fresh(dtype)) for dtype in (torch.float64, judge))
    ours = _run(losses, call.fresh())
    assert ours.keys() == exact.keys()
    for name, result in ours.items():
        if result.dtype == torch.int64:
            assert result == exact[name], name
            continue
        if name.startswith("gradient"):
            assert result.dtype == arguments[name.rpartition(" ")[2]].dtype
        gk.testing.assert_close(result, exact[name], own[name], name, products=products)
    return ours


def check_second_derivatives(
    loss: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    arguments: dict[str, Any],
    differentiable: Sequence[str] = ("input",),
) -> None:
    """Compare the gradient of a squared norm of the gradient, in float64; the graph is used three times over."""
    results = []
    for function in (loss, oracle):
        call = Call(arguments, tuple(differentiable)).fresh(torch.float64)
        leaves = [call.arguments[name] for name in differentiable]
        value = function(**call.arguments).square().sum()
        first = torch.autograd.grad(value, leaves, retain_graph=True)
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        norm = torch.stack([grad.square().sum() for grad in grads]).sum()
        second = torch.autograd.grad(norm, leaves, retain_graph=True)
        again = torch.autograd.grad(value, leaves)
        results.append([*first, *grads, *again, *second])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def upstream_for(result: Tensor) -> Tensor:
    """An upstream gradient whose elements differ, in numbers that every dtype holds."""
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(result.shape, generator=generator, device="cpu") + 0.25).bfloat16().to(result)


def _run(function: Callable[..., dict[str, Tensor]], call: Call) -> dict[str, Tensor]:
    """Outputs and gradients by name; a gradient that is not there counts as 0."""
    results = function(**call.arguments)
    leaves = [call.arguments[name] for name in call.differentiable]
    outputs = {name: (result, upstream_for(result)) for name, result in results.items() if result.requires_grad}
    groups = [(name, [pair]) for name, pair in outputs.items()]
    if len(groups) > 1:
        groups.append(("everything", list(outputs.values())))
    found = {name: result.detach() for name, result in results.items()}
    for output, pairs in groups:
        gradients = torch.autograd.grad(
            [result for result, _ in pairs], leaves, [upstream for _, upstream in pairs],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        for name, leaf, gradient in zip(call.differentiable, leaves, gradients, strict=True):
            found[f"gradient of {output} in {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def aligned(*shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """Normal numbers in memory that begins ``offset`` elements past a 64-byte boundary."""
    size = torch.Size(shape).numel()
    storage = torch.zeros(size + 64, dtype=dtype)
    start = -storage.data_ptr() % 64 // storage.element_size() + offset
    return storage[start : start + size].view(shape).copy_(torch.randn(shape) * 2.0)


def untouched(elements: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros that take no memory until they are written: the pages behind them are mapped, not reserved."""
    if torch.get_default_device().type != "cpu":
        return torch.zeros(elements, dtype=dtype)
    size = elements * torch.empty((), dtype=dtype).element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


@contextmanager
def no_synchronisation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail on whatever makes the host wait for a GPU; kernels are counted but not run."""

    def forbidden(name: str) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            raise AssertionError(f"{name} waits for the device")

        return call

    names = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__")
    with ExitStack() as stack, monkeypatch.context() as patch:
        for name in names:
            patch.setattr(Tensor, name, forbidden(f"Tensor.{name}"))
        for name in ("equal", "allclose", "nonzero"):
            patch.setattr(torch, name, forbidden(f"torch.{name}"))
        stack.enter_context(gk.testing.device_semantics())
        stack.enter_context(observe_launches(lambda *_: False))
        yield
