"""Tuning: what a candidate is held to, what enters the table, and that a run can be stopped and gone on with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tune

from genloss_kernels import cases, functional, info
from genloss_kernels.bench.timing import Limit, Samples
from genloss_kernels.cases.draws import scores
from genloss_kernels.core import launch, tuned
from genloss_kernels.core.launch import Tile, observe_launches

CPU = torch.device("cpu")
CLASS, CANDIDATE = "elementwise, 4 bytes", [512, 2]
DEFAULT = list(launch.ELEMENTWISE_TILES[4])


def _small_calls(*losses: str) -> list[tune.Timed]:
    """Of losses of two operands, over a few tiles."""
    found = [next(iter(cases.select(cases.DOCTOR, (loss,)))) for loss in losses]
    few = scores({}, input=(2500,), target=(2500,))
    return tune.calls_of([replace(case, name="few elements", make=few, dtypes=(torch.float32,)) for case in found])


def _state() -> dict[str, Any]:
    return {"device": "a GPU", "entries": {}, "classes": {}}


class _Rigged:
    """A race in which one candidate takes half the time of the others."""

    calls: list[str] = []  # noqa: RUF012

    def __init__(self, runners: list[Any], call: Any, device: torch.device) -> None:
        self.samples = {runner.name: Samples() for runner in runners}
        _Rigged.calls.append(", ".join(self.samples))

    def run_round(self) -> None:
        for name, samples in self.samples.items():
            samples.forward.append(1.0 if name == json.dumps(CANDIDATE) else 2.0)
            samples.backward.append(samples.forward[-1])


@pytest.fixture
def rigged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(tune, "Race", _Rigged)
    monkeypatch.setattr(tune, "_LIMIT", Limit(3))
    _Rigged.calls.clear()
    return _Rigged.calls


def _tune(state: dict[str, Any], *losses: str, seconds: float = 1e6, save: Callable[[], None] = lambda: None) -> None:
    tune.tune(_small_calls(*losses), [CLASS], CPU, state, tune.Clock(seconds), save)


def test_calls_say_what_they_look_up() -> None:
    (call,) = _small_calls("mse_loss")
    assert call.reached == {CLASS: launch.ELEMENTWISE_TILES[4], "tiles a program, 4 bytes": 4}
    assert isinstance(call.reached[CLASS], Tile)


def test_every_class_of_the_benchmarks_has_candidates() -> None:
    for call in tune.calls_of(cases.select(cases.BENCH, ("cross_entropy", "linear_cross_entropy", "mse_loss"))):
        for shape_class, default in call.reached.items():
            found = list(tune.candidates(shape_class, default))
            assert len(found) >= 3
            assert default not in [tuple(c) if isinstance(c, list) else c for c in found]


def test_candidates_of_a_tile() -> None:
    found = list(tune.candidates(CLASS, Tile(1024, 4)))
    assert found == [[512, 2], [512, 4], [1024, 2], [1024, 8], [2048, 4], [2048, 8]]


def test_chunks_never_grow() -> None:
    """Tuning must not make a step need more memory."""
    assert all(rows < 4096 for rows in tune.candidates("rows of a chunk, 2 bytes", 4096))


@pytest.mark.interpreter
def test_a_contest_launches_every_candidate_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_LIMIT", Limit(2))
    launched = set()

    def observe(kernel: Any, programs: int, args: Any, keywords: dict[str, Any]) -> bool:
        launched.add((kernel.__name__, keywords["BLOCK"], keywords["num_warps"]))
        return True

    contest = tune.Contest(_small_calls("mse_loss")[0], CPU, {}, CLASS)
    with observe_launches(observe):
        found = contest.run(tune.Clock(1e6))
    tiles = [DEFAULT, *tune.candidates(CLASS, launch.ELEMENTWISE_TILES[4])]
    for kernel in ("_elementwise_forward_kernel", "_elementwise_backward_kernel"):
        assert {(block, warps) for name, block, warps in launched if name == kernel} == {tuple(tile) for tile in tiles}
    assert found["refused"] == {}
    assert all(len(s["forward"]) == len(s["backward"]) == 2 for s in found["samples"].values())
    assert list(found["samples"]) == [tune.HOLDS, *(json.dumps(tile) for tile in tiles[1:])]


@pytest.mark.interpreter
def test_a_wrong_candidate_is_refused(rigged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = functional.mse_loss

    def broken(**arguments: Any) -> Tensor:
        loss = original(**arguments)
        return loss * 1.01 if tuned.entries(CPU).get(CLASS) == CANDIDATE else loss

    monkeypatch.setattr(functional, "mse_loss", broken)
    state = _state()
    _tune(state, "mse_loss", "l1_loss")
    of_mse, of_l1 = state["classes"][CLASS]["calls"].values()
    assert of_mse["refused"] == {json.dumps(CANDIDATE): "beyond the tolerance: loss, d input, d target"}
    assert json.dumps(CANDIDATE) not in rigged[0]
    assert json.dumps(CANDIDATE) in of_l1["samples"], "refused by one call, it may be timed in another"
    assert state["entries"] == {}, "but never chosen"


@pytest.mark.interpreter
def test_a_candidate_that_spills_is_refused(rigged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def spills(kernel: Any, programs: int, args: Any, keywords: dict[str, Any]) -> int:
        return 8 if keywords["BLOCK"] == 512 else 2

    monkeypatch.setattr(tune, "spills", spills)
    state = _state()
    _tune(state, "mse_loss")
    (row,) = state["classes"][CLASS]["calls"].values()
    assert set(row["refused"]) == {"[512, 2]", "[512, 4]"}
    assert "registers spilt" in row["refused"]["[512, 2]"]


def test_spills_are_those_of_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled:
        n_spills = None

        def _init_handles(self) -> None:
            self.n_spills = 12

    class Kernel:
        def warmup(self, *args: Any, grid: tuple[int, ...], **keywords: Any) -> Compiled:
            assert (args, grid, keywords) == ((1, 2), (3,), {"BLOCK": 4})
            return Compiled()

    monkeypatch.setattr(tune.backend, "INTERPRETED", False)
    assert tune.spills(Kernel(), 3, (1, 2), {"BLOCK": 4}) == 12


@pytest.mark.interpreter
def test_the_winner_enters_the_table_and_launches_use_it(rigged: list[str], tmp_path: Path) -> None:
    table, out = tmp_path / "tuned.json", tmp_path / "device" / "tune.json"
    table.write_text(json.dumps({"another": {"long row, 2 bytes": [2048, 8]}}))
    state = _state()
    _tune(state, "mse_loss", "l1_loss", save=lambda: tune.write(state, out, table))
    assert json.loads(table.read_text()) == {
        "a GPU": {CLASS: CANDIDATE}, "another": {"long row, 2 bytes": [2048, 8]},
    }  # fmt: skip
    saved = json.loads(out.read_text())
    assert saved["classes"][CLASS]["chosen"] == CANDIDATE
    assert all(row["samples"][tune.HOLDS]["forward"] == [2.0] * 3 for row in saved["classes"][CLASS]["calls"].values())
    assert f"{CANDIDATE}, time 0.500" in tune.report(saved, [CLASS])
    calls, classes, blocks = _small_calls("mse_loss", "l1_loss"), [CLASS, "tiles a program, 4 bytes"], set()
    with observe_launches(lambda kernel, programs, args, keywords: not blocks.add((kernel.__name__, keywords["BLOCK"]))):
        tune.tune(calls, classes, CPU, saved, tune.Clock(1e6), lambda: None)
    assert blocks >= {("_elementwise_forward_kernel", 512), ("_elementwise_backward_kernel", 512)}
    assert not {b for k, b in blocks if "elementwise" in k} - {512}


@pytest.mark.interpreter
def test_a_stopped_run_goes_on_where_it_was(rigged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    state = _state()
    with pytest.raises(tune.OutOfTime):
        _tune(state, "mse_loss", seconds=0.0)
    assert state["classes"] == {CLASS: {"calls": {}}}
    _tune(state, "mse_loss")
    assert len(rigged) == 1
    _tune(state, "mse_loss", "l1_loss")
    assert len(rigged) == 2, "only the call that was not timed before is timed"
    monkeypatch.setattr(tune.Contest, "run", lambda *_: pytest.fail("all is done"))
    _tune(state, "mse_loss", "l1_loss")


def test_a_clock_leaves_time_for_a_step_like_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(tune.time, "monotonic", lambda: now)
    clock = tune.Clock(10.0)
    for now in (1.0, 4.0, 6.0):  # noqa: B007
        clock.step()
    now = 7.0
    with pytest.raises(tune.OutOfTime):
        clock.step()


def _times(**times: list[float]) -> dict[str, Any]:
    halves = {name: [t / 2 for t in found] for name, found in times.items()}
    samples = {name: {"forward": half, "backward": half} for name, half in halves.items()}
    return {"refused": {}, "samples": {tune.HOLDS if name == "holds" else name[1:]: s for name, s in samples.items()}}


ONES = [1.0] * 4


@pytest.mark.parametrize(
    ("contests", "chosen"),
    [
        pytest.param([_times(holds=ONES, _2=[0.97] * 4)], 2, id="faster"),
        pytest.param([_times(holds=ONES, _2=[0.9] * 4, _8=[0.97] * 4)], 2, id="the fastest"),
        pytest.param([_times(holds=ONES, _2=[0.985] * 4)], None, id="hardly faster"),
        pytest.param([_times(holds=[1.0] * 5, _2=[0.9, 0.95, 1.2, 1.2, 0.96])], None, id="by noise"),
        pytest.param([_times(holds=[2.0, 1.0] * 2, _2=[1.8, 0.9] * 2)], 2, id="round by round"),
        pytest.param([_times(holds=ONES, _2=[0.5] * 4), _times(holds=ONES, _2=[1.05] * 4)], None, id="one slower"),
        pytest.param([_times(holds=ONES, _2=[0.9] * 4), _times(holds=ONES, _2=[1.01] * 4)], 2, id="one as fast"),
        pytest.param(
            [_times(holds=ONES, _2=[0.9] * 4), {"refused": {"2": "wrong"}, "samples": {}}], None, id="one refused"
        ),
        pytest.param(
            [_times(holds=ONES, _2=[0.9] * 4), {"refused": {tune.HOLDS: "out of memory"}, "samples": {}}], 2,
            id="a call that cannot be judged",
        ),
        pytest.param([{"refused": {tune.HOLDS: "out of memory"}, "samples": {}}], None, id="no call"),
    ],
)  # fmt: skip
def test_choice(contests: list[dict[str, Any]], chosen: int | None) -> None:
    assert tune.best(contests)[0] == chosen


def test_a_run_goes_on_from_its_own_device_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tune.json"
    state = tune.begin(path, CPU)
    state["entries"][CLASS] = CANDIDATE
    tune.write(state, path, tmp_path / "tuned.json")
    assert tune.begin(path, CPU) == state
    monkeypatch.setattr(tune, "commit", lambda: "another")
    new = tune.begin(path, CPU)
    assert new["entries"] == {}
    tune.write(new, path, tmp_path / "tuned.json")
    assert json.loads((tmp_path / "tuned.json").read_text()) == {}, "entries of other code hold no longer"


@pytest.mark.interpreter
def test_the_command(
    rigged: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """First without the time to begin, then for the classes of one loss over the calls of both."""
    small = [timed.case for timed in _small_calls("mse_loss", "l1_loss")]
    small.append(next(iter(cases.select(cases.DOCTOR, ("cross_entropy",)))))
    monkeypatch.setattr(cases, "CASES", tuple(replace(case, uses=frozenset({cases.BENCH})) for case in small))
    monkeypatch.setattr(tune, "select", lambda device: True)
    table, out = tmp_path / "tuned.json", tmp_path / "tune.json"
    files = ["--device", "cpu", "--out", str(out), "--table", str(table)]
    assert tune.main([*files, "--seconds", "0", "--loss", "l1_loss"]) == 0
    streams = capsys.readouterr()
    assert "run it again to go on" in streams.err
    assert f"{CLASS:<32} not finished" in streams.out
    assert not table.exists()
    assert tune.main([*files, "--loss", "l1_loss"]) == 0
    streams = capsys.readouterr()
    assert f"{CLASS:<32} {DEFAULT} -> {CANDIDATE}, time 0.500" in streams.out
    assert f"{'tiles a program, 4 bytes':<32} 4 stays" in streams.out
    assert "tiles a program, 4 bytes; l1_loss: " in streams.err
    assert json.loads(table.read_text()) == {info.device_name(CPU): {CLASS: CANDIDATE}}
    report = json.loads(out.read_text())
    assert report["versions"] == info.versions()
    assert set(report["classes"]) == {CLASS, "tiles a program, 4 bytes"}
    assert [len(row["calls"]) for row in report["classes"].values()] == [2, 2]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_a_gpu(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--device", device, "--out", str(tmp_path / "tune.json"), "--table", str(tmp_path / "t.json")]) == 2
    assert "no GPU to tune on" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
