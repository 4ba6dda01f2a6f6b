"""Two suites in one tree: kernels (marked ``interpreter``) and everything else.

Kernel tests run interpreted on CPU tensors under TRITON_INTERPRET=1, or compiled where there is a GPU; Triton fixes the
mode when the kernels are imported, so one process runs one of the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import genloss_kernels as gk
from genloss_kernels.core import scratch
from genloss_kernels.core.backend import INTERPRETED

from . import edges, refusals
from .torch_conformance import counts

HAS_GPU = torch.cuda.is_available() and not INTERPRETED
if INTERPRETED:
    from .interpreter import remember_builtins

    remember_builtins()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance-counts", type=Path, metavar="FILE", help="write there how many of torch's tests passed")
    parser.addoption("--bad-input-table", type=Path, metavar="FILE", help="write there which calls were refused, and how")
    parser.addoption("--edges-table", type=Path, metavar="FILE", help="write there which edges of each loss were tested")


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--conformance-counts")
    if file is not None:
        before = counts.read(file.read_text(encoding="utf-8")) if file.exists() else {}
        found = counts.merged(before, counts.SEEN, kernels=INTERPRETED or HAS_GPU, eager=not INTERPRETED)
        file.write_text(counts.table(found), encoding="utf-8")
    file = session.config.getoption("--bad-input-table")
    if file is not None:
        before = refusals.read(file.read_text(encoding="utf-8")) if file.exists() else set()
        file.write_text(refusals.table(refusals.SEEN | before), encoding="utf-8")
    file = session.config.getoption("--edges-table")
    if file is not None:
        before = edges.read(file.read_text(encoding="utf-8")) if file.exists() else set()
        file.write_text(edges.table(edges.merged(before, edges.SEEN)), encoding="utf-8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, rather than skip, the tests of the suite that this process does not run."""
    kept, dropped = [], []
    for item in items:
        kernels = item.get_closest_marker("interpreter") is not None
        fits = (INTERPRETED or HAS_GPU) if kernels else not INTERPRETED
        (kept if fits else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(
    params=["eager", pytest.param("triton", marks=pytest.mark.interpreter)],
)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on both paths; on the kernels' a test in which none was launched has failed."""
    with gk.backend(request.param), gk.testing.count_launches() as launches:
        yield request.param
    if request.param == "triton":
        assert launches.total() > 0, "no kernel was launched"
    else:
        assert launches.total() == 0, f"kernels were launched on the eager path: {launches}"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that whatever a kernel leaves unwritten, or takes from a buffer, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    give = scratch._pool.give

    def poisoned(buffer: torch.Tensor) -> None:
        give(buffer.fill_(math.nan if buffer.is_floating_point() else -1))

    monkeypatch.setattr(scratch._pool, "give", poisoned)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
