"""Tests of benchmarks/train_lm.py: the verdict on loss curves and a tiny run from text to report."""

import json
import math
import pickle
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import lm_data
import train_lm
from curves import check_curves
from lm_model import Decoder
from lm_train import loss_from_hidden, loss_from_logits
from runs import perturb_by_one_ulp

TORCH = [10.0, 9.0, 8.0]
CONTROL = [10.0, 9.001, 8.0]


@pytest.fixture
def tiny_run(tmp_path):
    """Return a function that runs the comparison on a small text, and the folder it writes to."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a text that repeats the number {i * i}.\n" for i in range(200)))
    out = tmp_path / "out"
    sizes = {"--vocab-size": 300, "--steps": 3, "--batch": 2, "--seq-len": 16, "--dim": 16, "--layers": 1}
    options = [str(word) for option in sizes.items() for word in option]

    def run(*more, **kwargs):
        argv = ["--text", str(text), "--out", str(out), "--device", "cpu", *options, *more]
        return train_lm.main(argv, isolate=False, **kwargs)

    return run, out


def objectives_with(cross_entropy):
    return {**train_lm.OBJECTIVES, "genloss_kernels": partial(loss_from_logits, cross_entropy)}


@pytest.mark.parametrize("control", [TORCH, CONTROL])
def test_equal_curves_pass(control):
    assert check_curves(TORCH, TORCH, control).passed


@pytest.mark.parametrize(("gap", "passed"), [(0.0029, True), (0.0031, False), (-0.0029, True), (-0.0031, False)])
def test_band_is_three_times_the_largest_control_gap_at_any_step(gap, passed):
    check = check_curves(TORCH, [10.0, 9.0, 8.0 + gap], CONTROL)
    assert check.passed is passed
    assert check.allowed == pytest.approx(0.003)


@pytest.mark.parametrize(("ulps", "passed"), [(8, True), (9, False)])
def test_floor_is_eight_ulps_of_the_largest_loss(ulps, passed):
    ulp_of_ten = 2.0**-20
    assert check_curves(TORCH, [10.0, 9.0, 8.0 + ulps * ulp_of_ten], TORCH).passed is passed


@pytest.mark.parametrize("curve", range(3))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_curve_that_is_not_finite_fails(curve, value):
    curves = [list(TORCH), list(TORCH), list(CONTROL)]
    curves[curve][1] = value
    assert not check_curves(*curves).passed


def test_run_writes_report_and_plot(tiny_run, capsys):
    run, out = tiny_run
    assert run() == 0

    report = json.loads((out / "train_lm.json").read_text())
    assert report["check"]["passed"] is True
    assert report["versions"]["torch"] == torch.__version__
    assert list(report["runs"]) == ["torch", "genloss_kernels", "control"]
    for measured in report["runs"].values():
        assert len(measured["losses"]) == len(measured["step_seconds"]) == 3
        assert measured["peak_memory_bytes"] >= measured["baseline_memory_bytes"] > 0
    assert (out / "train_lm.png").read_bytes().startswith(b"\x89PNG")
    assert report["step_time_ratios"]["genloss_kernels"]["median"] > 0
    assert "PASS" in capsys.readouterr().out


def test_fused_head_runs_beside_the_others(tiny_run):
    run, out = tiny_run
    assert run("--head", "fused") == 0
    assert list(json.loads((out / "train_lm.json").read_text())["runs"]) == [
        "torch",
        "genloss_kernels",
        "fused head",
        "control",
    ]

    def wrong(hidden, weight, labels):
        return 1.01 * F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten())

    objectives = {**train_lm.OBJECTIVES, "fused head": partial(loss_from_hidden, wrong)}
    assert run("--head", "fused", objectives=objectives) == 1


def test_tokens_are_cached(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("One line of text.\n" * 20)
    corpus = lm_data.prepare_corpus(text, 10**6, 300, tmp_path)
    monkeypatch.delattr(lm_data, "_train_bpe")
    assert lm_data.prepare_corpus(text, 10**6, 300, tmp_path) == corpus
    with pytest.raises(NameError):
        lm_data.prepare_corpus(text, 10**6, 299, tmp_path)


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_wrong_loss_fails(tiny_run, capsys, factor):
    run, out = tiny_run

    def wrong(logits, labels):
        return factor * F.cross_entropy(logits, labels)

    assert run(objectives=objectives_with(wrong)) == 1
    assert "FAIL" in capsys.readouterr().out
    assert (out / "train_lm.png").exists()


def test_right_loss_with_a_wrong_gradient_fails(tiny_run):
    run, _ = tiny_run

    def wrong(logits, labels):
        without_first_row = F.cross_entropy(logits[1:], labels[1:])
        return F.cross_entropy(logits, labels).detach() + without_first_row - without_first_row.detach()

    assert run(objectives=objectives_with(wrong)) == 1


def test_objectives_can_be_sent_to_another_process():
    assert pickle.loads(pickle.dumps(train_lm.OBJECTIVES)).keys() == train_lm.OBJECTIVES.keys()


def test_control_moves_every_weight_by_one_ulp():
    model = Decoder(vocab_size=300, seq_len=16, dim=16, layers=1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    perturb_by_one_ulp(model, seed=0)
    for old, new in zip(before, model.parameters(), strict=True):
        up = torch.nextafter(old, torch.tensor(math.inf))
        down = torch.nextafter(old, torch.tensor(-math.inf))
        assert ((new == up) | (new == down)).all()
        assert not torch.equal(new, up)


def test_text_shorter_than_a_sequence_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(SystemExit, match="tokens"):
        train_lm.main(["--text", str(text), "--out", str(tmp_path / "out")], isolate=False)
