"""Profile, count and paths of the properties."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from genloss_kernels.core.backend import INTERPRETED

from . import blocks
from .judging import Loss, Recipe, judge
from .tally import EXAMPLES, Tally

# Few where nobody asks for more, so that a suite of tests stays quick, and then the same ones each time.
_FEW = 4 if INTERPRETED else 20

settings.register_profile(
    "properties",
    max_examples=EXAMPLES or _FEW,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors],
)
PROFILE = settings.get_profile("properties")

Variant = Callable[..., Any]


@pytest.fixture(scope="session")
def tally() -> Iterator[Tally]:
    found = Tally()
    yield found
    found.save()


@pytest.fixture
def hold(path: str, device: torch.device, tally: Tally) -> Callable[..., None]:
    """Hold a loss, or a variant of it, against float64 on drawn arguments, wider than a block or not."""

    def run(name: str, loss: Loss, *, wide: bool, variant: Variant | None = None, share: int = 1) -> None:
        examples, before = PROFILE.max_examples // share, tally.held.total()
        kind = "wider than a block" if wide else "within a block"

        @settings(PROFILE, max_examples=examples)
        @given(loss.recipes(wide), st.sampled_from((1, 3)), st.booleans())
        def holds(recipe: Recipe, shares: int, built_ins: bool) -> None:
            with ExitStack() as stack:
                if wide:
                    stack.enter_context(blocks.small_tiles(shares) if path == "triton" else blocks.small_blocks())
                elif not built_ins:
                    stack.enter_context(blocks.operators_alone())
                walks = stack.enter_context(blocks.watched())
                judge(loss, recipe, device, variant)
                if wide and (loss.blocks or path == "triton"):
                    assume(max(walks, default=0) > 1)
            tally.add(name, path, kind if variant is None else "variants")

        holds()
        assert tally.held.total() - before >= examples, "too few examples"

    return run
