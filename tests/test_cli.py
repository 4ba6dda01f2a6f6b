"""The command line: what it prints, and its exit statuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels import cases, functional, info
from genloss_kernels.__main__ import COMMANDS, main
from genloss_kernels.bench import timing
from genloss_kernels.cases import Case
from genloss_kernels.core import tuned
from genloss_kernels.core.backend import INTERPRETED
from genloss_kernels.core.launch import observe_launches
from genloss_kernels.doctor import examine


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> Case:
    """Leave one small case, in float32, for doctor and bench."""
    small = next(c for c in cases.CASES if c.loss == "gaussian_kl" and c.name.startswith("small batch"))
    case = replace(small, uses=frozenset({cases.DOCTOR, cases.BENCH}))
    monkeypatch.setattr(cases, "CASES", (case,))
    return case


def spoil(monkeypatch: pytest.MonkeyPatch, spoilt: Callable[[Tensor], Tensor]) -> None:
    """Make ``gaussian_kl`` return what ``spoilt`` makes of its result."""
    original = functional.gaussian_kl

    def broken(**arguments: Any) -> Tensor:
        return spoilt(original(**arguments))

    monkeypatch.setattr(functional, "gaussian_kl", broken)


def steeper(loss: Tensor) -> Tensor:
    """The same loss with a gradient that is one percent off."""
    return loss.detach() + 1.01 * (loss - loss.detach())


def higher(loss: Tensor) -> Tensor:
    return loss * 1.001


def failing(loss: Tensor) -> Tensor:
    raise RuntimeError("out of resources")


def test_alone_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


@pytest.mark.parametrize("command", ["info", "doctor", "bench"])
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"{command} [-h]" in capsys.readouterr().out


def test_unknown_command() -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["cure"])
    assert exit_.value.code == 2


def test_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-m", "genloss_kernels", "info"], capture_output=True, text=True, check=True)
    assert gk.__version__ in run.stdout


def test_info_names_versions_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for expected in (gk.__version__, torch.__version__, *info.devices(), *info.losses()):
        assert expected in printed


def test_info_says_whether_the_device_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "launch table     defaults" in capsys.readouterr().out
    with tuned.in_force({"long row, 2 bytes": [2048, 8], "elementwise, 4 bytes": [512, 4]}):
        assert main(["info"]) == 0
    assert "launch table     tuned for this device, 2 entries" in capsys.readouterr().out


def test_info_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["backend"] == "auto"
    assert set(report["losses"]) == set(info.losses())


def test_info_reads_sizes_from_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(sys.modules[functional.cross_entropy.__module__], "BUILTIN_BELOW", 4321)
    assert "below 4321 elements" in info.path("cross_entropy")
    for loss in info.losses():
        assert re.search(r"; else PyTorch operators .*\(.*\)$", info.path(loss)), "no rest, or no reason for it"
    with gk.backend("triton"):
        assert ("interpreted" if INTERPRETED else "none: backend 'triton' needs") in info.path("cross_entropy")


def _pair(shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    x = torch.rand(shape).clamp(0.1, 0.9).to(dtype)
    return {"input": x.clone().requires_grad_(), "target": x.flip(0), **options}


def _classes(n_rows: int, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    x = torch.zeros(n_rows, 2**10, dtype=dtype)
    return {"input": x.requires_grad_(), "target": torch.arange(n_rows) % 2**10, **options}


def _cosines(learned: int, n_cols: int, dtype: torch.dtype = torch.float32, transposed: bool = False) -> dict[str, Any]:
    pair = [torch.rand(64, n_cols, dtype=dtype) for _ in range(2)]
    pair = [x.t().contiguous().t() if transposed else x for x in pair]
    inputs = {f"input{k + 1}": x.requires_grad_(k < learned) for k, x in enumerate(pair)}
    return {**inputs, "target": torch.ones(64)}


F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
MSE, MANY = "MseLossBackward0", (2**10, 2**11)
WEIGHTS = torch.ones(2**10)

# A call, what info says of it, and whether it finds the node that only torch's built-in leaves.
CLAIMS: list[tuple[str, Callable[[], dict[str, Any]], str, str, bool]] = [
    ("nll_loss", lambda: _classes(256, F32), "torch's built-in in fp32 and fp64", "NllLossBackward0", True),
    ("nll_loss", lambda: _classes(256, F64, weight=WEIGHTS.double()), "in fp32 and fp64", "NllLossBackward0", True),
    ("nll_loss", lambda: _classes(256, BF16), "or without class weights", "NllLossBackward0", True),
    ("nll_loss", lambda: _classes(64, BF16, weight=WEIGHTS.bfloat16()), "below 131072", "NllLossBackward0", True),
    ("nll_loss", lambda: _classes(128, BF16, weight=WEIGHTS.bfloat16()), "else PyTorch", "WhereBackward0", True),
    ("mse_loss", lambda: _pair(MANY, F32, reduction="none"), "with reduction 'none' the same", MSE, True),
    ("mse_loss", lambda: _pair(MANY, F32), "below 1048576 elements, in half", MSE, False),
    ("mse_loss", lambda: _pair((2**19,), F32), "below 1048576 elements, in half", MSE, True),
    ("mse_loss", lambda: _pair(MANY, BF16, reduction="none"), "at every size in fp32 and fp64", MSE, False),
    ("mse_loss", lambda: _pair((2**17,), BF16), "in half precision below 131072", MSE, False),
    ("l1_loss", lambda: _pair(MANY, F32, reduction="none"), "with reduction 'none' the same", "AbsBackward0", True),
    ("l1_loss", lambda: _pair((2**17,), F32), "below 131072 elements (few", "AbsBackward0", False),
    ("l1_loss", lambda: _pair((2**16,), F32), "below 131072 elements (few", "AbsBackward0", True),
    ("smooth_l1_loss", lambda: _pair(MANY, F32), "at every size, in half", "SmoothL1LossBackward0", True),
    ("huber_loss", lambda: _pair((2**17,), BF16), "in half precision below 131072", "HuberLossBackward0", False),
    ("kl_div", lambda: _pair(MANY, F32, reduction="sum", log_target=True), "at every size", "SubBackward0", True),
    ("kl_div", lambda: _pair(MANY, BF16, reduction="sum", log_target=True), "at every size, in half", "SubBackward0", False),
    ("kl_div", lambda: _pair((2**17,), F32, reduction="sum"), "below 131072 elements (few", "SubBackward0", False),
    ("kl_div", lambda: _pair((2**16,), F32, reduction="sum"), "below 131072 elements (few", "SubBackward0", True),
    ("cosine_embedding_loss", lambda: _cosines(1, 2**12), "below 524288 elements", "ClampMinBackward0", True),
    ("cosine_embedding_loss", lambda: _cosines(1, 2**13), "below 524288 elements", "ClampMinBackward0", False),
    ("cosine_embedding_loss", lambda: _cosines(2, 2**12), "a quarter of that", "ClampMinBackward0", False),
    ("cosine_embedding_loss", lambda: _cosines(2, 2**10), "a quarter of that", "ClampMinBackward0", True),
    ("cosine_embedding_loss", lambda: _cosines(1, 8, transposed=True), "of contiguous inputs", "ClampMinBackward0", False),
    ("cosine_embedding_loss", lambda: _cosines(1, 2**11, BF16), "precision below 131072", "ClampMinBackward0", False),
]  # fmt: skip


def _nodes(root: Any) -> set[str]:
    names, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        names.add(node.name())
        waiting += [below for below, _ in node.next_functions if below is not None]
    return names


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize(("loss", "make", "claim", "node", "found"), CLAIMS, ids=lambda v: v if isinstance(v, str) else "")
def test_info_says_what_runs(
    loss: str, make: Callable[[], dict[str, Any]], claim: str, node: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "default_device", lambda: torch.device("cpu"))
    with gk.backend("eager"):
        assert claim in info.path(loss)
        nodes = _nodes(getattr(gk, loss)(**make()).grad_fn)
    assert (node in nodes) == found, nodes


def test_doctor_passes(one_case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"PASS  {one_case.loss}" in printed
    assert "PASS: 1 rows" in printed


def test_doctor_says_that_it_checks_no_kernel(
    one_case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "default_device", lambda: torch.device("cpu"))
    assert main(["doctor"]) == 0
    assert "No kernel is checked" in capsys.readouterr().out


def test_doctor_json_is_one_document(one_case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["rows"]
    assert report["passed"]
    assert report["versions"] == info.versions()
    assert (row["loss"], row["case"], row["dtype"]) == (one_case.loss, one_case.name, "float32")
    assert row["tensors"].keys() == {"loss", "d mu_q", "d logvar_q"}
    assert all(tensor["error"] <= tensor["allowed"] for tensor in row["tensors"].values())


@pytest.mark.parametrize(
    ("spoilt", "problem"),
    [
        (steeper, "beyond the tolerance: d mu_q, d logvar_q"),
        (higher, "beyond the tolerance: loss, d mu_q, d logvar_q"),
        (failing, "RuntimeError: out of resources"),
    ],
)
def test_doctor_fails_on_a_broken_loss(
    one_case: Case,
    spoilt: Callable[[Tensor], Tensor],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(monkeypatch, spoilt)
    assert main(["doctor", "--json"]) == 1
    streams = capsys.readouterr()
    report = json.loads(streams.out)
    assert not report["passed"]
    assert report["rows"][0]["problem"] == problem
    assert "FAIL: 1 of 1 rows" in streams.err


def test_doctor_fails_where_no_kernel_was_launched(one_case: Case) -> None:
    with gk.backend("eager"):
        finding = examine(one_case, torch.device("cpu"), torch.float32, kernels=True)
    assert finding.problem == "RuntimeError: no kernel was launched in the forward"


@pytest.mark.interpreter
def test_doctor_launches_kernels(one_case: Case, device: torch.device) -> None:
    with gk.backend("triton"):
        finding = examine(one_case, device, torch.float32, kernels=True)
    assert finding.passed, finding.problem
    assert finding.launches


@pytest.mark.interpreter
@pytest.mark.parametrize("case", cases.select(cases.DOCTOR), ids=lambda case: f"{case.loss}: {case.name}")
def test_every_case_of_doctor_launches_kernels(case: Case, device: torch.device) -> None:
    """Forward and backward. The kernels themselves are left out, so the results are wrong, and the test is quick."""
    # The oracle is not asked either: its answer does not matter here.
    unjudged = replace(case, oracle=case.function)
    with gk.backend("triton"), observe_launches(lambda *_: False):
        finding = examine(unjudged, device, case.dtypes[0], kernels=True)
    assert len(finding.launches) >= 2
    assert "no kernel was launched" not in (finding.problem or "")


def test_bench_prints_saves_and_draws(one_case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["bench", "--rounds", "2", "--no-compile", "--out", str(tmp_path)]) == 0
    streams = capsys.readouterr()
    assert one_case.name in streams.out
    assert one_case.name in streams.err
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["environment"]["versions"] == info.versions()
    assert report["config"]["rounds"] == 2
    (result,) = report["results"]
    for name in ("genloss_kernels", "torch"):
        samples = result["samples"][name]
        assert len(samples["forward"]) == len(samples["backward"]) == 2
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_bench_goes_on_where_it_was_stopped(
    one_case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(timing._MATMUL_SIZE, "cpu", 8)
    monkeypatch.setitem(timing._COPY_BYTES, "cpu", 2**20)
    options = ["bench", "--rounds", "2", "--no-compile", "--out", str(tmp_path), "--dtype"]
    assert main([*options, "float32", "float64", "--part", "0"]) == 3
    assert "2 cases are left" in capsys.readouterr().err
    assert main([*options, "float32"]) == 0
    first = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert main([*options, "float32", "float64", "--resume"]) == 0
    both = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert both[:1] == first
    assert [result["dtype"] for result in both] == ["float32", "float64"]
    assert main([*options, "float32", "--rounds", "3", "--resume"]) == 2
    assert "of another config" in capsys.readouterr().err
    assert main([*options, "float16", "--resume"]) == 0
    assert {*json.loads((tmp_path / "bench.json").read_text())["matmul_rates"]} == {"float16", "float32", "float64"}
    monkeypatch.setattr("genloss_kernels.bench.results.commit", lambda: "another")
    assert main([*options, "float32", "--resume"]) == 2
    assert "of another commit" in capsys.readouterr().err
    (tmp_path / "bench.json").write_text("{}")
    assert main([*options, "float32", "--resume"]) == 2
    assert "of another version" in capsys.readouterr().err


@pytest.mark.parametrize("spoilt", [steeper, higher, failing])
def test_bench_reports_no_speed_for_a_wrong_result(
    one_case: Case,
    spoilt: Callable[[Tensor], Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(monkeypatch, spoilt)
    assert main(["bench", "--rounds", "2", "--no-compile", "--out", str(tmp_path)]) == 1
    assert "no speed: " in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert result["samples"] == {}
    assert "genloss_kernels" in result["problems"]
    assert not (tmp_path / "bench.png").exists()


def test_bench_without_matplotlib(
    one_case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "--rounds", "2", "--no-compile", "--out", str(tmp_path)]) == 0
    streams = capsys.readouterr()
    assert "pip install 'genloss_kernels[bench]'" in streams.err
    assert one_case.name in streams.out
    assert (tmp_path / "bench.json").exists()


def test_bench_lists_what_the_options_leave(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--loss", "gaussian_kl", "--case", "small", "--dtype", "float16", "float64"]) == 0
    name = "gaussian_kl: small batch 64 x 32"
    assert capsys.readouterr().out.splitlines() == [f"{name}, float16", f"{name}, float64"]


def test_bench_refuses_options_that_leave_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--case", "no such case"]) == 2
    assert "--list" in capsys.readouterr().err


def test_bench_needs_rounds_for_quartiles() -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "--rounds", "1"])
    assert exit_.value.code == 2
