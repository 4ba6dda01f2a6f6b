"""The scripts in benchmarks/examples, unchanged, with and without ``gk.patch_torch()``."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import examples_under_patch
from examples_under_patch import FOLDER, SCRIPTS, losses

import genloss_kernels as gk

STEPS = ["--steps", "4"]
FUNCTIONS = {"dcgan": "binary_cross_entropy", "mnist_vae": "binary_cross_entropy", "word_language_model": "nll_loss"}


def run(out, *more):
    return examples_under_patch.main([*STEPS, "--out", str(out), *more], isolate=False)


def test_scripts_know_torch_alone():
    assert set(SCRIPTS) == set(FUNCTIONS)
    assert not [path for path in FOLDER.iterdir() if "genloss" in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_curves_agree_and_every_call_runs_ours(script, tmp_path, capsys):
    assert run(tmp_path, script) == 0
    report = json.loads((tmp_path / "examples_under_patch.json").read_text())["scripts"][script]
    calls = report["calls"][FUNCTIONS[script]]
    assert calls == {"ours": 12 if script == "dcgan" else 4, "torch": {}}
    assert {name: len(curve) for name, curve in report["losses"].items()} == {"torch": 4, "patched": 4, "control": 4}
    assert "PASS" in capsys.readouterr().out


@pytest.mark.interpreter
@pytest.mark.parametrize("script", ["dcgan", "mnist_vae"])
def test_curves_agree_by_kernels(script, tmp_path):
    with gk.backend("triton"), gk.testing.count_launches() as launches:
        assert run(tmp_path, script, "--steps", "2") == 0
    assert launches.total() > 0


def test_wrong_loss_fails(tmp_path, monkeypatch, capsys):
    from genloss_kernels.integrations.torch_patch import routing

    wrapper = routing.WRAPPERS["binary_cross_entropy"]
    cell = next(c for c in wrapper.__closure__ if c.cell_contents is gk.binary_cross_entropy)
    monkeypatch.setattr(cell, "cell_contents", lambda *args, **kwargs: 1.001 * gk.binary_cross_entropy(*args, **kwargs))
    assert run(tmp_path, "mnist_vae") == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_call_that_goes_to_torch_fails(tmp_path, monkeypatch, capsys):
    from genloss_kernels.integrations.torch_patch import tensors

    monkeypatch.setattr(tensors, "DEVICES", ())
    assert run(tmp_path, "mnist_vae") == 1
    assert "NOT EVERY call" in capsys.readouterr().out


def test_control_moves_every_optimizers_weights_once_by_one_ulp():
    weights = [torch.nn.Parameter(torch.ones(50)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.0) for weight in weights]
    for weight in weights:
        weight.grad = torch.ones(50)
    with examples_under_patch._perturbed():
        for optimizer in (*optimizers, *optimizers):
            optimizer.step()
    for optimizer in optimizers:
        optimizer.step()
    up, down = (torch.nextafter(torch.tensor(1.0), torch.tensor(to)) for to in (2.0, 0.0))
    for weight in weights:
        assert ((weight == up) | (weight == down)).all()
    assert not torch.equal(*weights)


def test_unknown_script_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, "no_such_script")


def test_seed_decides():
    curves = [losses("mnist_vae", [*STEPS, "--seed", seed], "torch")[0] for seed in "001"]
    assert curves[0] == curves[1] != curves[2]
    assert all(torch.tensor(curves).isfinite().flatten())
