"""Profile, count and paths of the properties."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import genloss_kernels as gk
from genloss_kernels.core.backend import INTERPRETED

from . import blocks
from .judging import Loss, Recipe, empty, judge
from .tally import EXAMPLES, FAILED, INVARIANT, NARROW, WHOLE, WIDE, Tally

# Few where nobody asks for more, so that a suite of tests stays quick, and then the same ones each time.
_FEW = 4 if INTERPRETED else 24
_ASKED = int(os.environ.get(EXAMPLES, "0"))

# Shrinking an example would take the interpreter minutes.
_PHASES = (Phase.generate,) if INTERPRETED else (Phase.generate, Phase.shrink)

PROFILE = settings(
    max_examples=_ASKED or _FEW,
    derandomize=not _ASKED,
    database=None,
    deadline=None,
    phases=_PHASES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors],
)


@pytest.fixture(scope="session")
def tally() -> Iterator[Tally]:
    found = Tally()
    yield found
    found.save()


@contextmanager
def _route(path: str, wide: bool, shares: int, built_ins: bool) -> Iterator[None]:
    """Blocks or tiles that a ``wide`` tensor has several of; else torch's own operators or ours on one block."""
    if wide:
        with blocks.small_tiles(shares) if path == "triton" else blocks.small_blocks():
            yield
    elif built_ins:
        yield
    else:
        with blocks.operators_alone():
            yield


ROUTES = {"shares": st.sampled_from((1, 3)), "built_ins": st.booleans()}


@contextmanager
def _counted(tally: Tally, name: str, path: str, kind: str, examples: int) -> Iterator[Callable[[], None]]:
    """What to call for each example that held; in the end there must have been enough."""
    what = name, path, kind
    before = tally.held[what]

    def held() -> None:
        tally.held[what] += 1

    try:
        yield held
        assert tally.held[what] - before >= examples, "too few examples"
    except BaseException:
        tally.held[name, path, FAILED] += 1
        raise


@pytest.fixture
def hold(path: str, device: torch.device, tally: Tally) -> Callable[..., None]:
    """Hold a loss, or a variant of it, against float64 on drawn arguments, wider than a block or not."""

    def run(name: str, loss: Loss, *, wide: bool, variant: Callable[..., Any] | None = None) -> None:
        blocked = loss.blocks or path == "triton"
        kind = INVARIANT if variant is not None else WIDE if wide and blocked else NARROW
        if not blocked:
            tally.held[name, path, WHOLE] += 1
        examples = max(1, PROFILE.max_examples // (4 if kind == INVARIANT else 2))
        with _counted(tally, name, path, kind, examples) as held:

            @settings(PROFILE, max_examples=examples)
            @given(recipe=loss.recipes(wide), **ROUTES)
            def holds(recipe: Recipe, shares: int, built_ins: bool) -> None:
                with _route(path, wide, shares, built_ins), blocks.watched() as walks:
                    judge(loss, recipe, device, variant)
                if kind == WIDE:
                    assume(max(walks, default=0) > 1)
                held()

            holds()

    return run


@pytest.fixture
def explore(path: str, device: torch.device, tally: Tally) -> Callable[..., None]:
    """Check something of a loss on drawn arguments, some of them wider than a block."""

    def run(name: str, loss: Loss, check: Callable[[dict[str, Any]], bool]) -> None:
        examples = max(1, PROFILE.max_examples // 4)
        with _counted(tally, name, path, INVARIANT, examples) as held:

            @settings(PROFILE, max_examples=examples)
            @given(drawn=st.booleans().flatmap(lambda wide: st.tuples(loss.recipes(wide), st.just(wide))), **ROUTES)
            def holds(drawn: tuple[Recipe, bool], shares: int, built_ins: bool) -> None:
                recipe, wide = drawn
                arguments = recipe.arguments(device)
                with _route(path, wide, shares, built_ins), gk.testing.count_launches() as launches:
                    assert check(arguments)
                assert launches or path == "eager" or empty(arguments), "no kernel was launched"
                held()

            holds()

    return run
