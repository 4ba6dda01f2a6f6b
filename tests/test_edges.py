"""Every loss at every edge, on both paths: what a fault elsewhere would reach, and where it must not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core import backend

from .edges import INF, LAYOUTS, LOSSES, NAN, SEEN, Loss, Seen, read
from .losses.comparison import untouched, upstream_for
from .properties.blocks import operators_alone
from .properties.judging import vanish

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:Using a target size")

# Memory that is small enough to compare whole.
_SMALL = 2**20

FAR = 2**30

# As small tensors have it, by torch's own functions and plain formulas, and as large ones do.
EAGER = {"eager": nullcontext, "eager in blocks": operators_alone}

TABLE = Path(__file__).parents[1] / "benchmarks" / "results" / "edges.md"


def _bits(tensor: Tensor) -> Tensor:
    """A copy of all that the memory holds where it is small, of what the tensor does elsewhere."""
    storage = tensor.untyped_storage()
    if storage.nbytes() > _SMALL:
        return _content(tensor)
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage).clone()


def _content(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _same(found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(_content(found), _content(wanted))


def _loss(result: Any) -> Tensor:
    if isinstance(result, dict):
        return result["loss"]
    return result if isinstance(result, Tensor) else result.loss


def _called(
    function: Callable[..., Any], arguments: dict[str, Any], learned: Iterable[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The loss, and the gradients of those ``learned`` and of no other operand; nothing was written to."""
    given = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            cast = dtype if dtype is not None and value.is_floating_point() else value.dtype
            given[name] = value.detach().to(cast).requires_grad_(name in learned)
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    before = {name: _bits(value) for name, value in tensors.items()}
    value = _loss(function(**given))
    results = {"loss": value.detach()}
    assert value.requires_grad == any(tensor.requires_grad for tensor in tensors.values())
    if value.requires_grad:
        value.backward(upstream_for(value))
    for name, tensor in tensors.items():
        assert torch.equal(_bits(tensor), before[name]), f"{name} was written to"
        assert (tensor.grad is not None) == tensor.requires_grad, f"gradient of {name}: {tensor.grad}"
        if tensor.grad is not None:
            assert tensor.grad.shape == tensor.shape
            results[name] = tensor.grad
    return results


def _judged(loss: Loss, arguments: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By the definition, exact and in the call's own dtype."""
    exact = _called(loss.oracle, arguments, loss.differentiable, torch.float64)
    return exact, _called(loss.oracle, arguments, loss.differentiable)


def _close(loss: Loss, found: Tensor, exact: Tensor, own: Tensor, at: str) -> None:
    """``own``: a result of the same dtype, whose error is excused twice."""
    gk.testing.assert_close(found, exact, own, at, products=loss.products)


def _as_defined(loss: Loss, arguments: dict[str, Any]) -> dict[str, Tensor]:
    exact, own = _judged(loss, arguments)
    found = _called(loss.function, arguments, loss.differentiable)
    for name, result in found.items():
        _close(loss, result, exact[name], own[name], f"{name} of {arguments['reduction']}")
    return found


def _spread(rows: Tensor, result: Tensor) -> Tensor:
    """The elements of a result that are of some of the loss's."""
    return rows if rows.shape == result.shape else rows.view(-1, *[1] * (result.dim() - 1)).expand(result.shape)


def poison(value: float) -> Callable[[Loss, torch.device], str | None]:
    def check(loss: Loss, device: torch.device) -> str | None:
        eager = backend.current() == "eager"
        calls = {reduction: loss.arguments(loss.size, reduction, device) for reduction in ("none", "sum")}
        clean = {reduction: _called(loss.function, given, loss.differentiable) for reduction, given in calls.items()}
        names = [name for name in loss.rows if name not in loss.finite or isnan(value)]
        for reduction, name in itertools.product(calls, names):
            operand = calls[reduction][name]
            places = {(1,)} if reduction == "sum" else {(1,), (1, *[2] * (operand.dim() - 1))}
            for place in sorted(places):
                where = torch.zeros_like(operand, dtype=torch.bool)
                where[place] = True
                rows = where if where.shape == clean["none"]["loss"].shape else where.flatten(1).any(1)
                arguments = calls[reduction] | {name: operand.masked_fill(where, value)}
                try:
                    exact, own = _judged(loss, arguments)
                except (RuntimeError, ValueError) as refused:
                    with pytest.raises(type(refused)):
                        _called(loss.function, arguments, loss.differentiable)
                    continue
                torchs = own if loss.torchs is None else _called(loss.torchs, arguments, loss.differentiable)
                for part, result in _called(loss.function, arguments, loss.differentiable).items():
                    at = f"{part} of {reduction}, {value} at {list(place)} of {name}"
                    hit = torch.ones_like(result, dtype=torch.bool)
                    if part in loss.rows or (part == "loss" and reduction == "none"):
                        hit = _spread(rows, result)
                        _close(loss, result[~hit], exact[part][~hit], own[part][~hit], f"other rows' {at}")
                        # The eager path may take another way.
                        assert eager or _same(result[~hit], clean[reduction][part][~hit]), f"other rows' {at}"
                    hit = hit & ~(result.isnan() & torchs[part].isnan())
                    _close(loss, result[hit], exact[part][hit], own[part][hit], at)
        return None

    return check


def ignored(loss: Loss, device: torch.device) -> str | None:
    if isinstance(loss.ignored, str):
        return loss.ignored
    for reduction, added in itertools.product(loss.reductions, (0.0, NAN)):
        arguments = loss.arguments(loss.size, reduction, device)
        arguments |= {name: torch.full_like(arguments[name], fill) for name, fill in loss.ignored.items()}
        exact, own = _judged(loss, arguments)
        arguments[loss.rows[0]] = arguments[loss.rows[0]] + added
        for name, result in _called(loss.function, arguments, loss.differentiable).items():
            at = f"{name} of {reduction} with {added} added: {result}"
            if name == "loss":
                _close(loss, result, exact[name], own[name], at)
            else:
                assert not result.any(), f"gradient of {at}"
    return None


def empty(loss: Loss, device: torch.device) -> str | None:
    for reduction in loss.reductions:
        for size in loss.refused:
            with pytest.raises(RuntimeError, match="is empty"):
                loss.function(**loss.arguments(size, reduction, device))
        for size in loss.empty:
            _as_defined(loss, loss.arguments(size, reduction, device))
    return None


def single(loss: Loss, device: torch.device) -> str | None:
    for size, reduction in itertools.product(loss.single, loss.reductions):
        arguments = loss.arguments(size, reduction, device)
        exact, own = _judged(loss, arguments)
        terms = exact["loss"].abs().sum().item()
        for name, result in _called(loss.function, arguments, loss.differentiable).items():
            if name != "loss" and exact[name].any() and vanish(exact[name].float().view(1, -1), terms):
                # Of one element a weighted mean, or a direction, does not change: what is left is rounding.
                assert vanish(result.view(1, -1), terms), f"{name} of {reduction}: {result}"
            else:
                _close(loss, result, exact[name], own[name], f"{name} of {reduction}")
    return None


def laid_out(layout: str) -> Callable[[Loss, torch.device], str | None]:
    def check(loss: Loss, device: torch.device) -> str | None:
        size = loss.image if layout == "channels last" else loss.size
        if isinstance(size, str):
            return size
        _hold_placed(loss, size, device, LAYOUTS[layout])
        return None

    return check


def _hold_placed(
    loss: Loss,
    size: tuple[int, ...],
    device: torch.device,
    place: Callable[[Tensor], Tensor],
    stored: Callable[[Any], Any] = lambda value: value,
) -> None:
    """Each operand placed in turn gives what contiguous copies do, and so do all of them in the second reduction."""
    for reduction in loss.reductions[:2]:
        arguments = {name: stored(value) for name, value in loss.arguments(size, reduction, device).items()}
        names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
        for chosen in [[name] for name in names] if reduction == "none" else [names]:
            placed = arguments | {name: place(arguments[name]) for name in chosen}
            dense = arguments | {name: placed[name].clone(memory_format=torch.contiguous_format) for name in chosen}
            exact = _called(loss.oracle, dense, loss.differentiable, torch.float64)
            own = _called(loss.function, dense, loss.differentiable)
            for part, result in _called(loss.function, placed, loss.differentiable).items():
                _close(loss, result, exact[part], own[part], f"{part} of {reduction}, {' and '.join(chosen)} placed")


def _far(content: Tensor, dim: int) -> Tensor:
    """A copy with ``FAR`` between elements along ``dim``, after as much memory as an offset that wraps around goes back."""
    strides, rest = [FAR] * content.dim(), 1
    for d in reversed(range(content.dim())):
        if d != dim % content.dim():
            strides[d], rest = rest, rest * content.size(d)
    extent = 1 + sum((n - 1) * s for n, s in zip(content.shape, strides, strict=True))
    return untouched(2**31 + extent, content.dtype).as_strided(content.shape, strides, 2**31).copy_(content)


def _small(value: Any) -> Any:
    """In the smallest dtype that the losses take."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return value
    if value.is_floating_point():
        return value.bfloat16()
    return value.to(torch.int8 if bool((value < 0).any()) else torch.uint8)


def far_apart(loss: Loss, device: torch.device) -> str | None:
    for dim in (0, -1):
        _hold_placed(loss, loss.size, device, lambda content, dim=dim: _far(content, dim), _small)
    return None


def learned(loss: Loss, device: torch.device) -> str | None:
    for reduction in loss.reductions[1:2]:
        arguments = loss.arguments(loss.size, reduction, device)
        every = _as_defined(loss, arguments)
        exact = _called(loss.oracle, arguments, loss.differentiable, torch.float64)
        for count in range(len(loss.differentiable)):
            for names in itertools.combinations(loss.differentiable, count):
                for part, result in _called(loss.function, arguments, names).items():
                    _close(loss, result, exact[part], every[part], f"{part} of {reduction} with gradients for {names}")
    return None


class Edge(NamedTuple):
    check: Callable[[Loss, torch.device], str | None]
    checked: str
    launches: bool = True


_POISONED = "other rows as without it, to the bit on the kernels; the row, and what is shared, as defined"
_AS_CONTIGUOUS = "each operand so in turn, then all: value and gradients those of contiguous ones"

EDGES: dict[str, Edge] = {
    "NaN": Edge(poison(NAN), _POISONED),
    "inf": Edge(poison(INF), _POISONED),
    "-inf": Edge(poison(-INF), _POISONED),
    "all ignored": Edge(ignored, "torch's value; gradients 0, though the input hold NaN"),
    "empty": Edge(empty, "value and gradients as defined; refused where the documentation says so", launches=False),
    "one element": Edge(single, "value and gradients as defined"),
    "offsets from 2**31": Edge(far_apart, "each operand so in turn, then all: value and gradients those of near ones"),
    **{layout: Edge(laid_out(layout), _AS_CONTIGUOUS) for layout in LAYOUTS},
    "each subset learned": Edge(learned, "gradients for these alone, equal to those of all, which are as defined"),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("path", [*EAGER, pytest.param("triton", marks=pytest.mark.interpreter)])
def test_edge(loss: str, edge: str, path: str, device: torch.device) -> None:
    check, checked, expected = EDGES[edge]
    chosen = EAGER.get(path, nullcontext)
    with chosen(), gk.backend(path.split(maxsplit=1)[0]), gk.testing.count_launches() as launches:
        reason = check(LOSSES[loss], device)
    if path in EAGER:
        assert not launches, f"kernels were launched on the eager path: {launches}"
    else:
        assert launches or reason or not expected, "no kernel was launched"
    SEEN.add(Seen(loss, edge, path, checked, f"not applicable: {reason}" if reason else "passed"))


def test_torch_has_no_negative_strides() -> None:
    with pytest.raises(RuntimeError, match="Negative strides are not supported"):
        torch.zeros(4).as_strided((4,), (-1,), 3)


def test_table_has_every_edge() -> None:
    rows = {row[:3] for row in read(TABLE.read_text(encoding="utf-8"))}
    assert rows == set(itertools.product(LOSSES, EDGES, (*EAGER, "triton")))
