"""Candidates, rounds and figures of a benchmark."""

from __future__ import annotations

import importlib.util
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from genloss_kernels import cases
from genloss_kernels.bench import peers, progress, table, timing
from genloss_kernels.bench.candidates import BUILTIN, CHUNKED, OURS, Candidate, builtin, candidates
from genloss_kernels.bench.results import Report, Result, slug, spread
from genloss_kernels.bench.timing import Limit, Race, Samples
from genloss_kernels.cases.gaussian import gaussian_kl_usual

CPU = torch.device("cpu")


def case_of(loss: str) -> cases.Case:
    return next(c for c in cases.select(cases.BENCH, (loss,)) if c.name.startswith("small batch"))


def test_cross_entropy_races_the_builtin_and_not_the_oracle() -> None:
    assert builtin(case_of("cross_entropy")) is F.cross_entropy


def test_a_builtin_of_the_case_comes_first() -> None:
    assert builtin(case_of("gaussian_kl")) is gaussian_kl_usual


def test_compiled_builtin_only_on_request() -> None:
    case = case_of("cross_entropy")
    assert [c.name for c in candidates(case, CPU, torch.float32, compiled=False)] == [OURS, BUILTIN]
    assert len(candidates(case, CPU, torch.float32, compiled=True)) == 3


def test_peers_only_where_installed_and_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.installed("cross_entropy", cuda) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert [peer.package for peer in peers.installed("cross_entropy", cuda)] == ["liger_kernel", "quack"]
    assert peers.installed("cross_entropy", CPU) == []
    assert peers.installed("gaussian_kl", cuda) == []


def test_a_peer_is_imported_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peers.Peer("package", "loss", "package.module", "function")
    module = types.SimpleNamespace(function=lambda input: input + 1)
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: {"package.module": module}[name])
    assert peer(input=1) == 2


def test_a_peer_has_its_own_names_for_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peers.Peer("package", "loss", "package.module", "function", names={"linear_weight": "c"})
    module = types.SimpleNamespace(function=lambda input, c: input - c)
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: module)
    assert peer(input=3, linear_weight=1) == 2


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="newer than this torch")
def test_torchs_chunks_compete_with_ours() -> None:
    case = next(c for c in cases.select(cases.BENCH, ("linear_cross_entropy",)))
    found = candidates(case, CPU, torch.float32, compiled=False)
    assert [c.name for c in found] == [OURS, BUILTIN, CHUNKED]
    given = {"input": torch.randn(40, 8), "linear_weight": torch.randn(30, 8), "target": torch.randint(30, (40,))}
    assert len({round(c.function(**given).item(), 4) for c in found}) == 1


def test_modes_of_ours_compete_where_they_make_a_difference() -> None:
    def ours(loss: str, device: str, dtype: torch.dtype) -> list[Candidate]:
        case = next(c for c in cases.select(cases.BENCH, (loss,)))
        found = candidates(case, torch.device(device), dtype, compiled=False)
        return [c for c in found if c.name.startswith(f"{OURS} ")]

    assert ours("cross_entropy", "cpu", torch.bfloat16) == []
    assert ours("linear_cross_entropy", "cuda", torch.float32) == []
    (half_sums,) = ours("linear_cross_entropy", "cpu", torch.bfloat16)
    given = torch.randn(600, 8).bfloat16(), torch.randn(30, 8).bfloat16(), torch.randint(30, (600,))
    names = ("input", "linear_weight", "target")
    loss = half_sums.function(**dict(zip(names, given, strict=True)))
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(*given[:2]), given[2]), rtol=0.02, atol=0.0)
    in_place, in_forward = ours("cross_entropy", "cuda", torch.float32)
    leaf, target = torch.randn(4, 300, requires_grad=True), torch.randint(300, (4,))
    assert in_place.overwrites
    for candidate in (in_place, in_forward):
        torch.testing.assert_close(candidate.function(input=leaf, target=target), F.cross_entropy(leaf, target))


def test_rounds_alternate() -> None:
    order: list[str] = []

    def watched(name: str) -> Candidate:
        def loss(input: Tensor, **rest: Any) -> Tensor:
            order.append(name)
            return input.sum()

        return Candidate(name, loss)

    race = Race([watched("a"), watched("b")], case_of("cross_entropy").call(), CPU)
    race.calls = 1
    order.clear()
    for _ in range(4):
        race.run_round()
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert all(len(samples.both) == 4 for samples in race.samples.values())


def test_one_that_overwrites_gets_copies() -> None:
    def overwriting(input: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(input, target)
        input.detach().zero_()
        return loss

    call = case_of("cross_entropy").call()
    before = call.arguments["input"].detach().clone()
    Race([Candidate("overwriting", overwriting, overwrites=True)], call, CPU).run_round()
    assert torch.equal(call.arguments["input"], before)


def test_a_limit_of_rounds_and_one_of_seconds() -> None:
    assert Limit(20).share(10, 1e9) == 0.5
    limit = Limit(20, seconds=4.0)
    assert limit.share(20, 0.1) == 1.0
    assert limit.share(2, 100.0) < 1.0
    assert limit.share(5, 4.0) == 1.0


def test_copy_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing._COPY_BYTES, "cpu", 2**20)
    assert timing.copy_rate(CPU) > 0


def test_matmul_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing._MATMUL_SIZE, "cpu", 8)
    assert timing.matmul_rate(CPU, torch.bfloat16) > 0


def test_the_limit_is_the_slower_of_copies_and_products() -> None:
    found = report()
    (result,) = found.results
    assert found.share_of_limit(result, 2e-3) == pytest.approx(0.5)
    result.floor_flops = 1000
    assert found.share_of_limit(result, 2e-3) == pytest.approx(0.5)
    result.floor_flops = 30000
    assert found.share_of_limit(result, 40e-3) == pytest.approx(0.75)
    assert table.text(found).count("TFLOP/s") == 3


def test_flops_of_a_head_are_those_of_three_products() -> None:
    call = next(c for c in cases.select(cases.BENCH, ("linear_cross_entropy",))).call()
    counter = FlopCounterMode(display=False)
    with counter:
        F.linear(call.arguments["input"], call.arguments["linear_weight"]).sum().backward()
    assert cases.floor_flops(call) == counter.get_total_flops()
    assert cases.floor_flops(case_of("cross_entropy").call()) == 0


def report() -> Report:
    result = Result("cross_entropy", "training step", "float32", {"input": [4, 8], "divisor": []}, floor_bytes=3000, calls=1)
    result.samples = {
        OURS: Samples([1e-3, 1e-3, 2e-3], [1e-3, 1e-3, 1e-3], 2**20),
        BUILTIN: Samples([2e-3, 2e-3, 2e-3], [2e-3, 2e-3, 4e-3]),
    }
    result.problems = {"liger_kernel": "beyond the tolerance: loss"}
    return Report("a GPU", {"versions": {"torch": "2"}}, {}, 3e6, {"float32": 1e6}, [result])


def test_quotients_are_taken_round_by_round() -> None:
    relative = report().results[0].relative(OURS)
    assert relative is not None
    assert (relative.low, relative.median, relative.high) == (0.5, 0.5, 0.5)
    assert report().results[0].relative("liger_kernel") is None


def test_spread_is_median_and_quartiles() -> None:
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)


def test_table() -> None:
    lines = table.text(report()).splitlines()
    assert "cross_entropy: training step, float32 (input 4x8, divisor scalar)" in lines
    ours = next(line for line in lines if line.strip().startswith(OURS)).split()
    assert ours[1:7] == ["1.00", "ms", "1.00", "ms", "2.00", "ms"]
    assert ours[7:10] == ["0.50", "[0.50,", "0.50]"]
    assert ours[10:] == ["0.0", "GB/s", "50%", "1", "MiB"]
    assert any(line.split() == ["liger_kernel", "no", "speed:", "beyond", "the", "tolerance:", "loss"] for line in lines)


def test_short_durations_are_in_microseconds() -> None:
    assert table.duration(1.25e-5) == "12.5 us"


def test_slug() -> None:
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("x86_64 CPU, AVX512, 2 threads") == "x86-64-cpu-avx512-2-threads"


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.Progress(2) as bar:
        bar.case("first")
        bar.within_case(0.5)
        assert "25%" in capsys.readouterr().err
        bar.case("second")
        assert "50%" in capsys.readouterr().err


def test_progress_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress(2) as bar:
        bar.case("first")
        bar.within_case(0.5)
    assert capsys.readouterr().err == "[1/2] first\n"
