"""The byte meter: what it counts, by hand, and that no loss moves much more than it must."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from genloss_kernels import cases, functional
from genloss_kernels.cases import Case
from genloss_kernels.core import backend
from genloss_kernels.core import launch as launch_table
from genloss_kernels.core.backend import INTERPRETED
from genloss_kernels.core.launch import launch
from genloss_kernels.losses.cross_entropy import made, op
from genloss_kernels.meters.bytes import measure
from genloss_kernels.meters.operators import Operators
from genloss_kernels.meters.traffic import Traffic, count_memory
from genloss_kernels.meters.workers import BYTE_DTYPES, byte_figures

from . import exact

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="loads and stores are counted by Triton's interpreter"),
]

CPU = torch.device("cpu")


def _measurable() -> Iterator[Any]:
    for case in cases.select(cases.BYTES):
        for dtype in BYTE_DTYPES:
            if dtype in case.dtypes:
                yield pytest.param(case, dtype, id=f"{case.loss}, {case.name}, {dtype}")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), list(_measurable()))
def test_a_loss_moves_no_more_than_its_floor_and_a_little(case: Case, dtype: torch.dtype) -> None:
    report = measure(case, CPU, dtype)

    assert not report.violations()
    figures = byte_figures(report)
    key = exact.byte_key(figures)
    assert exact.differences(key, exact.byte_row(figures), exact.load()["bytes"].get(key)) == []
    assert report.element_ratio > 0.9, "less than must move: something was not counted"
    assert report.forward.launches > 0
    assert report.backward.launches > 0


def _plain() -> Case:
    return next(c for c in cases.select(cases.BYTES, ("cross_entropy",)) if c.name.startswith("next-token"))


def test_a_stray_copy_of_the_logits_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = functional.cross_entropy
    before = measure(_plain(), CPU, torch.float32)

    monkeypatch.setattr(functional, "cross_entropy", lambda input, *args, **kw: clean(input.clone(), *args, **kw))
    after = measure(_plain(), CPU, torch.float32)

    # Three passes over the logits became five: one more is read, and one written.
    assert before.element_ratio == pytest.approx(1.0, abs=0.01)
    assert after.element_ratio - before.element_ratio == pytest.approx(2 / 3, abs=0.01)
    assert after.violations()


@pytest.mark.parametrize("held", [True, False])
def test_a_gradient_made_in_the_forward_saves_a_pass(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes over the logits, or three of which the second finds them in the cache; the meter itself watches."""
    monkeypatch.setattr(made, "unwatched", lambda _: True)
    if not held:
        monkeypatch.setattr(launch_table, "held_loss_tile", lambda *_: None)
        monkeypatch.setattr(op, "held_loss_tile", lambda *_: None)
    with backend.gradient_in_forward():
        report = measure(_plain(), CPU, torch.float32)
    assert report.element_ratio == pytest.approx(2 / 3 if held else 1.0, abs=0.01)
    assert (report.forward.launches, report.backward.launches) == (5, 1)


def test_a_copy_inside_an_operator_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = op._launch_forward
    monkeypatch.setattr(op, "_launch_forward", lambda logits, *args: clean(logits.clone(), *args))

    report = measure(_plain(), CPU, torch.float32)

    assert [operation.name for operation in report.forward.operations] == ["aten.clone.default"]
    assert report.element_ratio == pytest.approx(5 / 3, abs=0.01)


def _traffic(kernel: Any, programs: int, *args: Any, **keywords: Any) -> Traffic:
    with count_memory() as memory:
        launch(kernel, programs, CPU, *args, **keywords)
        (traffic,) = memory.take().values()
    return traffic


def test_whole_sectors_of_a_contiguous_copy() -> None:
    from .kernels import copy_kernel

    source, out = torch.zeros(4096), torch.zeros(4096)
    traffic = _traffic(copy_kernel, 4, source, out, 4096, 1, BLOCK=1024)

    assert torch.equal(source, out)
    assert traffic == Traffic(4096 * 4, 4096 * 4, 4096 * 4, 4096 * 4, 1)


def test_masked_lanes_move_nothing() -> None:
    from .kernels import copy_kernel

    traffic = _traffic(copy_kernel, 1, torch.zeros(1024), torch.zeros(1024), 9, 1, BLOCK=1024)

    # 36 bytes are a sector and four bytes of the next.
    assert traffic == Traffic(36, 36, 64, 64, 1)


def test_a_strided_kernel_looks_perfect_by_elements_and_bad_by_sectors() -> None:
    from .kernels import copy_kernel

    source, out = torch.zeros(64 * 1024), torch.zeros(64 * 1024)
    traffic = _traffic(copy_kernel, 64, source, out, 64 * 1024, 64, BLOCK=1024)

    assert traffic.elements == 2 * source.nbytes
    assert traffic.sectors == 8 * traffic.elements


def test_a_broadcast_operand_counts_once_a_launch() -> None:
    from .kernels import add_row_kernel

    rows, row, out = torch.zeros(64, 256), torch.zeros(256), torch.zeros(64, 256)
    traffic = _traffic(add_row_kernel, 64, rows, row, out, BLOCK=256)

    assert traffic.loaded == traffic.loaded_sectors == rows.nbytes + row.nbytes
    assert traffic.stored == traffic.stored_sectors == out.nbytes


def test_a_stream_that_is_read_twice_counts_twice() -> None:
    from .kernels import add_row_kernel

    rows, out = torch.zeros(64, 256), torch.zeros(64, 256)
    traffic = _traffic(add_row_kernel, 64, rows, rows, out, BLOCK=256)

    assert traffic.loaded == 2 * rows.nbytes


def test_atomics_are_refused() -> None:
    from .kernels import atomic_kernel

    with pytest.raises(Exception, match="does not count create_atomic"):
        _traffic(atomic_kernel, 1, torch.zeros(16))


def test_the_interpreter_is_left_as_it_was() -> None:
    from triton.runtime.interpreter import interpreter_builder

    before = dict(vars(interpreter_builder))
    with count_memory():
        assert vars(interpreter_builder) != before
    assert vars(interpreter_builder) == before


def _operations(function: Any, *tensors: Tensor) -> list[tuple[str, int]]:
    with Operators() as operators:
        function(*tensors)
    return [tuple(operation) for operation in operators.operations]


def test_views_metadata_and_allocations_cost_nothing() -> None:
    x = torch.zeros(8, 4)
    assert not _operations(lambda x: x.t()[1:].reshape(-1, 2).expand(3, -1, -1), x[:, :2].contiguous())
    assert not _operations(lambda x: (torch.empty_like(x), x.new_empty(3), x.is_contiguous(), x.contiguous()), x)


def test_operators_cost_what_they_read_and_write() -> None:
    x = torch.zeros(8, 4)
    assert _operations(lambda x: x + x.sum(0), x) == [("aten.sum.dim_IntList", 128 + 16), ("aten.add.Tensor", 272)]
    assert _operations(lambda x: x.t().contiguous(), x) == [("aten.clone.default", 256)]
    assert _operations(lambda x: x.expand(5, -1, -1).clone(), x) == [("aten.clone.default", 128 + 640)]
