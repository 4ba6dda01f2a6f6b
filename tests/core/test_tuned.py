"""Entries of the launch table for a device: which holds where, and that they change launches alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import genloss_kernels as gk
from genloss_kernels.core import elementwise, launch, tuned
from genloss_kernels.core.launch import Tile, observe_launches, row_tile
from genloss_kernels.losses.linear_cross_entropy import chunks

CPU, GPU, OTHER_GPU = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)

ROW = "long row, 4 bytes"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[torch.device]]:
    """A table with entries for one of two devices; yields a live list of whose names were asked for."""
    asked: list[torch.device] = []

    def name(device: torch.device) -> str:
        asked.append(device)
        return "a GPU" if device == GPU else "another"

    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"a GPU": {ROW: [4096, 16]}}))
    monkeypatch.setattr(tuned, "FILE", file)
    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    for cached in (tuned.shipped, tuned._measured):
        cached.cache_clear()
    yield asked
    for cached in (tuned.shipped, tuned._measured):
        cached.cache_clear()


def test_an_entry_holds_on_its_device_alone(table: list[torch.device]) -> None:
    default = row_tile(10**5, 4)
    assert row_tile(10**5, 4, device=GPU) == Tile(4096, 16) != default
    for device in (OTHER_GPU, CPU, torch.device("meta"), None):
        assert row_tile(10**5, 4, device=device) == default


def test_an_entry_holds_for_its_class_alone(table: list[torch.device]) -> None:
    for n_cols, itemsize, kind in ((2048, 4, {}), (10**5, 2, {}), (10**5, 4, {"heavy": True}), (10**5, 4, {"twice": True})):
        assert row_tile(n_cols, itemsize, device=GPU, **kind) == row_tile(n_cols, itemsize, **kind)


def test_a_device_is_asked_for_its_name_once(table: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    row_tile(10**5, 4, device=GPU)
    monkeypatch.setattr(tuned, "FILE", None)
    assert row_tile(10**5, 4, device=GPU) == Tile(4096, 16)
    assert table == [GPU]


def test_the_interpreter_asks_for_no_name(table: list[torch.device]) -> None:
    row_tile(10**5, 4, device=CPU)
    elementwise.grid_for(torch.Size((5, 7)), 4, by_sample=False, device=CPU)
    assert table == []


def test_entries_in_force_end_with_an_error_and_nest() -> None:
    default = row_tile(10**5, 4, device=CPU)
    with tuned.in_force({ROW: [64, 1]}):
        with tuned.in_force({}):
            assert row_tile(10**5, 4, device=CPU) == default
        with pytest.raises(RuntimeError, match="stop"), tuned.in_force({}):
            raise RuntimeError("stop")
        assert row_tile(10**5, 4, device=CPU) == Tile(64, 1)
    assert row_tile(10**5, 4, device=CPU) == default


def test_what_is_shipped_can_be_launched() -> None:
    for entries in tuned.shipped().values():
        for name, value in entries.items():
            numbers = value if isinstance(value, list) else [value]
            assert all(n > 0 and n & (n - 1) == 0 for n in numbers), name
            if isinstance(value, list):
                assert 16 <= value[0] <= 32 * 32 * value[1], name


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).requires_grad_()


# A call, and entries that it looks up.
_LAUNCHED: dict[str, tuple[Any, dict[str, list[int]]]] = {
    "a row": (lambda: gk.cross_entropy(_normal(3, 2500), torch.arange(3)), {ROW: [256, 2]}),
    "rows read twice": (
        lambda: gk.linear_cross_entropy(_normal(3, 4), _normal(2500, 4), torch.arange(3), softcap=8.0),
        {"long row read twice, 4 bytes": [256, 2]},
    ),
    "a heavy row": (
        lambda: gk.kl_div_with_logits(_normal(2, 2500), _normal(2, 2500)), {"long heavy row, 4 bytes": [256, 2]},
    ),
    "a pair of rows": (
        lambda: gk.js_div_with_logits(_normal(2, 8704), _normal(2, 8704)),
        {"long heavy row, 4 bytes": [256, 2], "pair of rows, 4 bytes": [256, 2]},
    ),
    "elements": (lambda: gk.mse_loss(_normal(3000), torch.zeros(3000)), {"elementwise, 4 bytes": [256, 2]}),
    "elements of a pair of terms": (
        lambda: gk.vae_loss(_normal(2, 3000), torch.zeros(2, 3000), _normal(2, 4), _normal(2, 4))[0],
        {"elementwise, 4 bytes": [256, 2]},
    ),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", _LAUNCHED)
def test_an_entry_reaches_forward_and_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And changes no other compile-time value, and no result beyond the order of its sums."""
    # Among how many programs a row is shared follows from its tile.
    monkeypatch.setattr(launch, "splits", lambda *_: 1)
    make, entries = _LAUNCHED[name]
    untuned, first = _run(make)
    with tuned.in_force(entries):
        launched, second = _run(make)
    assert [kernel for kernel, _ in launched] == [kernel for kernel, _ in untuned]
    changed = [after for (_, before), (_, after) in zip(untuned, launched, strict=True) if before != after]
    assert len(changed) >= (1 if name == "rows read twice" else 2)
    for (_, before), (_, after) in zip(untuned, launched, strict=True):
        assert after in (before, before | {"BLOCK": 256, "num_warps": 2})
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def _run(make: Any) -> tuple[list[tuple[str, dict[str, Any]]], list[torch.Tensor]]:
    """Kernels with the keywords of their launches, and the loss with its gradients."""
    torch.manual_seed(0)
    launched: list[tuple[str, dict[str, Any]]] = []

    def observe(kernel: Any, programs: int, args: Any, keywords: dict[str, Any]) -> bool:
        launched.append((kernel.__name__, keywords))
        return True

    leaves: list[torch.Tensor] = []
    with gk.backend("triton"), observe_launches(observe):
        loss = make()
        _leaves(loss.grad_fn, leaves)
        return launched, [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _leaves(node: Any, found: list[torch.Tensor]) -> None:
    for parent, _ in node.next_functions:
        if hasattr(parent, "variable"):
            found.append(parent.variable)
        elif parent is not None:
            _leaves(parent, found)


@pytest.mark.interpreter
def test_tiles_of_a_program() -> None:
    programs = []
    x = _normal(2**13)
    for n in (1, 2, 8):
        with tuned.in_force({"tiles a program, 4 bytes": n}), gk.backend("triton"):
            with observe_launches(lambda kernel, count, *_: not programs.append(count)):
                gk.mse_loss(x, torch.zeros(2**13))
            programs.pop()
    assert programs == [8, 4, 1]


@pytest.mark.parametrize(("options", "rows"), [({}, 32), ({"batch_chunk_size": 64}, 64)])
def test_rows_of_a_chunk(options: dict[str, int], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that the caller gave is the caller's."""
    found: list[int] = []
    cut = chunks.equal_chunks

    def watched(n_rows: int, most: int) -> Iterator[slice]:
        found.append(most)
        return cut(n_rows, most)

    monkeypatch.setattr(chunks, "equal_chunks", watched)
    chosen = gk.LinearCrossEntropyOptions(**options) if options else None
    given = _normal(300, 4), _normal(5000, 4), torch.arange(300)
    with tuned.in_force({"rows of a chunk, 4 bytes": 32}), gk.backend("eager"):
        gk.linear_cross_entropy(*given, options=chosen).backward()
    assert found == [rows]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_calls_look_up_where_they_run() -> None:
    """Not where they are traced: the entry holds in a graph that was made without it."""
    torch._dynamo.reset()
    found: list[str] = []
    compiled = torch.compile(gk.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    given = _normal(300, 4), _normal(5000, 4), torch.arange(300)
    for entries in ({}, _Watching(found)):
        with tuned.in_force(entries):
            compiled(*given).backward()
    assert found == ["rows of a chunk, 4 bytes"]


class _Watching(dict[str, Any]):
    def __init__(self, asked: list[str]) -> None:
        super().__init__()
        self._asked = asked

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.append(key)
        return default
