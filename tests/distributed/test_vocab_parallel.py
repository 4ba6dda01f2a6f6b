"""Vocabulary-parallel losses over gloo, on 2 and on 4 ranks: each world starts once, and runs every case."""

from __future__ import annotations

import pytest

from genloss_kernels.core.backend import INTERPRETED

from . import cases, world

WORLDS = (2, 4)


@pytest.fixture(scope="module", params=WORLDS, ids="{}ranks".format)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return world.run(cases.CASES, request.param, tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", cases.CASES)
def test_on_ranks(name: str, results: dict[str, list[str]]) -> None:
    failed = [of_rank for of_rank in results[name] if of_rank]
    assert not failed, "\n".join(failed)


@pytest.fixture(scope="module")
def kernel_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    if not INTERPRETED:
        pytest.skip("the ranks' tensors are on the CPU")
    return world.run(cases.KERNELS, 2, tmp_path_factory.mktemp("world"))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", cases.KERNELS)
def test_kernels_on_ranks(name: str, kernel_results: dict[str, list[str]]) -> None:
    failed = [of_rank for of_rank in kernel_results[name] if of_rank]
    assert not failed, "\n".join(failed)
