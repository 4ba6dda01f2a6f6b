"""Vocabulary-parallel losses over gloo, on 2 and on 4 ranks: each world starts once, and runs every case."""

from __future__ import annotations

import pytest

from . import cases, world

WORLDS = (2, 4)


@pytest.fixture(scope="module", params=WORLDS, ids="{}ranks".format)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return world.run(cases.CASES, request.param, tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", cases.CASES)
def test_on_ranks(name: str, results: dict[str, list[str]]) -> None:
    failed = [of_rank for of_rank in results[name] if of_rank]
    assert not failed, "\n".join(failed)
