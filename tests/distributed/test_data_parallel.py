"""Every loss in a module under DDP and FSDP2, by two processes over gloo."""

from __future__ import annotations

import pytest

from genloss_kernels import functional

from . import parallel, world


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return world.run(parallel.CASES, 2, tmp_path_factory.mktemp("world"))


def test_every_loss_is_there() -> None:
    losses = {name.split()[0] for name in parallel.CASES}
    assert losses == {name for name in functional.__all__ if name[0].islower()}


@pytest.mark.parametrize("name", parallel.CASES)
def test_gradients_are_those_of_one_process(name: str, results: dict[str, list[str]]) -> None:
    failed = [of_rank for of_rank in results[name] if of_rank]
    assert not failed, "\n".join(failed)
