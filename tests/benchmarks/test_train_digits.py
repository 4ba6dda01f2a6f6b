"""Tests of the training scripts on handwritten digits: tiny runs from pictures to report, and losses that are wrong."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import train_energy
import train_gan
import train_vae
from digits import SIZE, digits

SCRIPTS = {"train_vae": (train_vae, ()), "train_gan": (train_gan, ()), "train_energy": (train_energy, ())}
RUNS = {**SCRIPTS, "wgan-gp": (train_gan, ("--game", "wgan-gp"))}


def run(script, out, *more):
    return script.main(["--steps", "3", "--batch", "4", "--device", "cpu", "--out", str(out), *more], isolate=False)


@pytest.mark.parametrize("name", RUNS)
def test_run_writes_report_curves_and_pictures(name, tmp_path, capsys):
    script, options = RUNS[name]
    assert run(script, tmp_path, *options) == 0
    name = script.__name__
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert list(report["runs"]) == ["torch", "genloss_kernels", "control"]
    assert report["check"]["passed"] is True
    for measured in report["runs"].values():
        assert len(measured["losses"]) == 3
    for picture in (f"{name}.png", f"{name}_pictures.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "PASS" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_wrong_loss_fails(name, tmp_path, monkeypatch):
    script, _ = SCRIPTS[name]
    losses = train_gan.LOSSES["non-saturating"] if script is train_gan else script.LOSSES
    right = losses["genloss_kernels"]
    wrong = (
        right._replace(penalty=lambda grad: 1.01 * right.penalty(grad))
        if script is train_gan
        else lambda *operands: 1.01 * right(*operands)
    )
    monkeypatch.setitem(losses, "genloss_kernels", wrong)
    assert run(script, tmp_path) == 1


def test_digits_are_pictures():
    images = digits()
    assert images.shape == (1797, 1, SIZE, SIZE)
    assert 0.0 <= images.min() < 0.1
    assert 0.9 < images.max() <= 1.0
