"""Buffers outlive a call where they are small, belong to one user at a time, and are never what a caller keeps."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._subclasses import FakeTensorMode

from genloss_kernels.core import scratch
from genloss_kernels.core.scratch import Scratch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_pool(monkeypatch: pytest.MonkeyPatch) -> scratch._Pool:
    pool = scratch._Pool()
    monkeypatch.setattr(scratch, "_pool", pool)
    return pool


def _take(size: int = 100, dtype: torch.dtype = torch.float32) -> tuple[Scratch, int]:
    user = Scratch()
    return user, user.take("a", (size,), dtype, CPU).data_ptr()


def test_a_call_after_another_uses_its_buffer(empty_pool: scratch._Pool) -> None:
    user, place = _take()
    assert user.take("a", (100,), torch.float32, CPU).data_ptr() == place
    assert user.take("b", (100,), torch.float32, CPU).data_ptr() != place
    del user
    assert empty_pool.bytes == 800
    user = Scratch()
    assert place in {user.take(name, (10, 10), torch.float32, CPU).data_ptr() for name in "ab"}
    assert empty_pool.bytes == 0


def test_two_users_share_nothing() -> None:
    first, place = _take()
    second, other = _take()
    assert place != other
    del first, second


def test_size_and_dtype_are_those_asked_for() -> None:
    user, place = _take()
    del user
    for size, dtype in ((101, torch.float32), (50, torch.float64), (100, torch.int32)):
        user, other = _take(size, dtype)
        assert other != place
        assert user.take("a", (size,), dtype, CPU).dtype == dtype


def test_what_is_kept_is_bounded(empty_pool: scratch._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    _take(scratch.POOLED_BUFFER // 4 + 1)
    assert empty_pool.bytes == 0
    monkeypatch.setattr(scratch, "POOLED", 1000)
    for size in (100, 110, 120):
        _take(size)
    # The first of the three went.
    assert empty_pool.bytes == 920


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode])
def test_not_what_others_cannot_use(mode: type, empty_pool: scratch._Pool) -> None:
    with mode():
        user, _ = _take() if mode is torch.inference_mode else (Scratch(), 0)
        user.take("b", (7,), torch.float32, CPU)
    del user
    assert empty_pool.bytes == 0


def test_buffers_of_ones_own_are_not_watched_by_autograd() -> None:
    user = Scratch()
    user.take("a", (3,), torch.float32, CPU).copy_(torch.ones(3, requires_grad=True))
    del user
    assert not Scratch().take("a", (3,), torch.float32, CPU).requires_grad


def test_compiled_code_makes_one_without_its_init() -> None:
    """Dynamo makes objects without calling ``__init__``; what ``__del__`` raises is a failure under pytest."""
    user = Scratch.__new__(Scratch)
    del user
    gc.collect()

    @torch.compile(backend="eager")
    def traced(x: torch.Tensor) -> torch.Tensor:
        return Scratch().cast("x", x, torch.float64) + 1.0

    assert traced(torch.zeros(3)).tolist() == [1.0] * 3
