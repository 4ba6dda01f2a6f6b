"""Dtypes of results, torch's deprecated arguments, and the kernel that adds up partial sums."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core import reduction as reducing
from genloss_kernels.core.launch import Tile
from genloss_kernels.core.reduction import accumulator, autocasting, launch_reduction, loss_dtype, parse_reduction

CPU = torch.device("cpu")


def test_accumulator() -> None:
    dtypes = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}
    assert {dtype: accumulator(dtype) for dtype in dtypes} == dtypes


def test_a_device_without_autocast() -> None:
    assert not autocasting(torch.device("meta"))


def test_loss_dtype_under_autocast() -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [loss_dtype(d, CPU) for d in dtypes] == list(dtypes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [loss_dtype(d, CPU) for d in dtypes] == [torch.float32] * 3 + [torch.float64]


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_deprecated_arguments(size_average: bool | None, reduce: bool | None) -> None:
    """The reduction that torch takes them to mean, and a warning that points at the caller."""
    if size_average is None and reduce is None:
        assert parse_reduction("sum", None, None) == "sum"
        return
    logits, target = torch.zeros(2, 3), torch.tensor([0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = torch.nn.functional.cross_entropy(logits, target, size_average=size_average, reduce=reduce)
    with pytest.warns(UserWarning, match="please use reduction=") as caught:
        found = gk.cross_entropy(logits, target, size_average=size_average, reduce=reduce)
    torch.testing.assert_close(found, wanted)
    assert [w.filename for w in caught] == [__file__]


@pytest.fixture
def by_fours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reducing, "REDUCTION_TILE", Tile(4, 4))


@pytest.mark.interpreter
@pytest.mark.parametrize("n", [1, 3, 4, 5, 11])
def test_launch_reduction(by_fours: None, device: torch.device, n: int) -> None:
    """Each of four sums on its own, in blocks of four with and without a tail; what lies behind them is not read."""
    losses = torch.cat([2.0 ** torch.arange(n, device=device), torch.full((8,), 1e9, device=device)])
    counts = torch.cat([torch.arange(1, n + 1, device=device), torch.full((8,), 10**6, device=device)]).int()
    partials = (losses, losses * 4.0, counts, counts * 3)
    total, count = 2.0**n - 1.0, n * (n + 1) // 2

    def outputs() -> tuple[Tensor, ...]:
        floats = [torch.full((), -1.0, device=device) for _ in range(2)]
        return (*floats, *(torch.full((), -1, dtype=torch.int64, device=device) for _ in range(2)))

    given = outputs()
    launch_reduction(partials, given, n, torch.float32, by_normalizer=True)
    assert [o.item() for o in given] == [0.25, 4.0 * total, count, 3 * count]
    given = outputs()
    launch_reduction(partials, given, n, torch.float32, divisor=8.0)
    assert [o.item() for o in given] == [total / 8.0, -1.0, count, 3 * count]
    given = outputs()
    launch_reduction(partials, given, n, torch.float32, divisor=torch.tensor(2.0, device=device))
    assert given[0].item() == total / 2.0
    given = outputs()
    launch_reduction(partials, (given[0], None, None, None), n, torch.float32)
    assert [o.item() for o in given] == [total, -1.0, -1, -1]
    given = outputs()
    launch_reduction(partials, (None, None, given[2], None), n, torch.float32)
    assert [o.item() for o in given] == [-1.0, -1.0, count, -1]


@pytest.mark.interpreter
def test_launch_reduction_in_double(by_fours: None, device: torch.device) -> None:
    """Neither the sum nor the divisor passes through fp32."""
    partials = torch.tensor([1.0, 2.0**-40, 0.0, 0.0, 2.0**-41], dtype=torch.float64, device=device)
    loss = torch.empty((), dtype=torch.float64, device=device)
    launch_reduction((partials, None, None, None), (loss, None, None, None), 5, torch.float64)
    assert loss.item() == 1.0 + 2.0**-40 + 2.0**-41
    launch_reduction(
        (partials, partials, None, None), (loss, loss.clone(), None, None), 5, torch.float64, by_normalizer=True
    )
    assert loss.item() == 1.0


@pytest.mark.interpreter
def test_counts_exceed_32_bits(by_fours: None, device: torch.device) -> None:
    counts = torch.full((9,), 2**31 - 1, dtype=torch.int32, device=device)
    found = torch.zeros((), dtype=torch.int64, device=device)
    launch_reduction((None, None, counts, None), (None, None, found, None), 9, torch.float32)
    assert found.item() == 9 * (2**31 - 1)
