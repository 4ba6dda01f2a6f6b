"""One loss on drawn arguments, held against float64 by the package's rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core.backend import INTERPRETED
from genloss_kernels.testing import tolerance

from .operands import Operand

# The rule excuses what torch's own errors excuse, and by chance a few results may have none at all. So torch's are those of
# this many draws, of which ours is compared in the first.
POPULATION = 16


@dataclass(frozen=True)
class Recipe:
    """Arguments of a call; those ``learned`` get a gradient, from an ``upstream`` one of ones or of normal numbers."""

    operands: dict[str, Operand]
    options: dict[str, Any]
    learned: tuple[str, ...]
    upstream: str
    seed: int

    def arguments(self, device: torch.device, draw: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed * POPULATION + draw)
        return {name: operand.make(generator, device) for name, operand in self.operands.items()} | self.options

    def upstream_of(self, result: Tensor, place: int) -> Tensor:
        """In numbers that every dtype holds; ones have stride 0."""
        if self.upstream == "ones":
            return torch.ones((), dtype=result.dtype, device=result.device).expand(result.shape)
        generator = torch.Generator().manual_seed(self.seed + place)
        return (torch.randn(result.shape, generator=generator) + 0.25).bfloat16().to(result)


@st.composite
def recipes(
    draw: st.DrawFn,
    operands: dict[str, st.SearchStrategy[Operand]],
    options: dict[str, st.SearchStrategy[Any]],
    differentiable: tuple[str, ...],
) -> Recipe:
    found = {name: draw(operand) for name, operand in operands.items()}
    chosen = {name: draw(option) for name, option in options.items()}
    able = [name for name in differentiable if name in found]
    learned = tuple(able) if draw(st.booleans()) else tuple(name for name in able if draw(st.booleans()))
    return Recipe(found, chosen, learned, draw(st.sampled_from(("normal", "ones"))), draw(st.integers(0, 2**32 - 1)))


Edges = Callable[..., Iterable[Tensor]]

WIDTHS = pytest.mark.parametrize("wide", [False, True], ids=["within a block", "wider than a block"])


@dataclass(frozen=True)
class Loss:
    """A public function with its definition in torch's operators, and what it is drawn from, wide or not.

    Its results have the dtype to which the operands ``typed`` promote, and the digits of the first of them where
    ``precise`` is False. ``products``: results are sums of terms that may nearly cancel, see ``testing.assert_close``.
    ``edges`` are distances from where the gradient jumps, which rounding may cross. ``blocks``: the eager path has blocks of
    its own. ``judge``: in which dtype torch's own error is measured, where that is not float32.
    """

    function: Callable[..., Any]
    oracle: Callable[..., Any]
    recipes: Callable[[bool], st.SearchStrategy[Recipe]]
    typed: tuple[str, ...]
    precise: bool = True
    products: bool = False
    edges: Edges | None = None
    blocks: bool = True
    judge: dict[torch.dtype, torch.dtype] = field(default_factory=dict)


def judge(loss: Loss, recipe: Recipe, device: torch.device, variant: Callable[..., Any] | None = None) -> None:
    """Compare outputs and gradients of ``loss``, or of a ``variant`` that should not differ, with the oracle in float64."""
    arguments = recipe.arguments(device)
    if loss.edges is not None:
        in_float64 = _leaves(arguments, (), torch.float64)
        assume(all(bool((edge.abs() > 1e-5).all()) for edge in loss.edges(**in_float64)))
    kept = {name: _bits(t) for name, t in arguments.items() if isinstance(t, Tensor)}
    with gk.testing.count_launches() as launches:
        ours = _results(variant or loss.function, arguments, recipe, again=not INTERPRETED)
    assert launches or gk.core.backend.current() != "triton" or empty(arguments), "no kernel was launched"
    for name, bits in kept.items():
        assert torch.equal(_bits(arguments[name]), bits), f"{name} was written to"
    dtype = _promoted(arguments, loss.typed)
    arithmetic = torch.promote_types(_promoted(arguments, loss.typed if loss.precise else loss.typed[:1]), torch.float32)
    judged = loss.judge.get(dtype, torch.float32)
    every = [
        [_results(loss.oracle, recipe.arguments(device, draw), recipe, dtype=d) for draw in range(POPULATION)]
        for d in (torch.float64, judged)
    ]
    for name, result in ours.items():
        exact, own = ([found[name] for found in population] for population in every)
        if not result.is_floating_point():
            # Rounding may make ties.
            assert result in (exact[0], own[0]), f"{name} is {result}, not {exact[0]}"
            continue
        of = name.removeprefix("gradient of ")
        wanted = arguments[of].dtype if of != name else arithmetic if name in _STATISTICS else dtype
        assert result.dtype == wanted, f"{name} is {result.dtype}, not {wanted}"
        compared = arithmetic if result.dtype == torch.float64 else result.dtype
        every_draw = torch.stack([(result if draw == 0 else e).to(compared) for draw, e in enumerate(exact)])
        gk.testing.assert_close(every_draw, torch.stack(exact), torch.stack(own), name, products=loss.products)


_STATISTICS = ("lse", "log_prob", "entropy")


def _named(result: Any) -> dict[str, Tensor]:
    if isinstance(result, dict):
        return result
    return {"loss": result} if isinstance(result, Tensor) else result._asdict()


def _results(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    recipe: Recipe,
    *,
    dtype: torch.dtype | None = None,
    again: bool = False,
) -> dict[str, Tensor]:
    """Outputs, and the gradients through all of them together; one that is not there counts as 0.

    ``again``: the graph is used twice and must give the same bits.
    """
    arguments = _leaves(arguments, recipe.learned, dtype)
    found = _named(function(**arguments))
    results = {name: result.detach() for name, result in found.items()}
    leaves = [arguments[name] for name in recipe.learned]
    if not leaves:
        return results
    upstreams = [recipe.upstream_of(result, place) for place, result in enumerate(found.values()) if result.requires_grad]
    asked = [result for result in found.values() if result.requires_grad]
    gradients: list[tuple[Tensor | None, ...]] = [(None,) * len(leaves)]
    if asked:
        gradients = [
            torch.autograd.grad(asked, leaves, upstreams, retain_graph=True, allow_unused=True)
            for _ in range(2 if again else 1)
        ]
    for name, leaf, first, *others in zip(recipe.learned, leaves, *gradients, strict=True):
        results[f"gradient of {name}"] = torch.zeros_like(leaf) if first is None else first
        for other in others:
            assert (first is None) == (other is None)
            assert first is None or torch.equal(_bits(first), _bits(other)), f"the gradient of {name} came out otherwise"
    return results


def _leaves(arguments: dict[str, Any], learned: tuple[str, ...], dtype: torch.dtype | None) -> dict[str, Any]:
    """The arguments as leaves of a graph, in ``dtype`` and then with no trace of their layout."""

    def leaf(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        if dtype is not None:
            value = value.to(dtype).contiguous() if value.is_floating_point() else value.contiguous()
        return value.requires_grad_(name in learned)

    return {name: leaf(name, value) for name, value in arguments.items()}


def _promoted(arguments: dict[str, Any], names: tuple[str, ...]) -> torch.dtype:
    found = [arguments[name].dtype for name in names if isinstance(arguments.get(name), Tensor)]
    dtype = found[0]
    for other in found[1:]:
        if other.is_floating_point:
            dtype = torch.promote_types(dtype, other)
    return dtype


def empty(arguments: dict[str, Any]) -> bool:
    return any(isinstance(t, Tensor) and not t.numel() for t in arguments.values())


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    """A copy that equals another where the bits do, those of NaN and of the zeros' signs included."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(_INTEGERS[tensor.element_size()])


def vanish(rows: Tensor, size: float) -> bool:
    """Whether ``rows`` sum to 0 but for the rounding of each element, made of terms that sum to ``size`` a row."""
    row = tolerance(rows.dtype)
    wide = rows.detach().double()
    return bool((wide.sum(-1).abs() <= row.storage * wide.abs().sum(-1) + 4 * row.arithmetic * size).all())
