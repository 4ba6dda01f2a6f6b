"""The sweep over sizes: every public loss, drawn at the size that it says, and a table of what was found."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytest.importorskip("matplotlib", reason="the scripts' helpers draw with it")

import sizes
import torch

from genloss_kernels import info
from genloss_kernels.bench.candidates import BUILTIN, OURS


@pytest.mark.parametrize("exponent", [6, 9])
def test_every_loss_is_drawn_at_its_size(exponent: int) -> None:
    calls = sizes.draw(2**exponent, torch.device("cpu"), torch.float32)
    assert set(calls) == set(info.losses())
    for loss, call in calls.items():
        assert call.differentiable, loss
        first = next(iter(call.tensors().values()))
        elements = (
            first.size(0) * call.arguments["linear_weight"].size(0) if "linear_weight" in call.arguments else first.numel()
        )
        assert elements == 2**exponent, loss


def test_differences_and_quotients() -> None:
    row = {"seconds": {OURS: [3e-6, 5e-6, 9e-6], BUILTIN: [1e-6, 4e-6, 3e-6]}}
    assert sizes.difference(row) == pytest.approx(2.0)
    assert sizes.quotient(row) == 3.0


def test_files(tmp_path: Path) -> None:
    arguments = ["--smallest", "6", "--largest", "16", "--step", "10", "--rounds", "2", "--loss", "mse_loss", "gaussian_kl"]
    threads = torch.get_num_threads()
    assert sizes.main([*arguments, "--threads", "1", "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "sizes.json").read_text())["rows"]
    assert [(row["loss"], row["exponent"]) for row in rows] == [
        ("gaussian_kl", 6), ("mse_loss", 6), ("gaussian_kl", 16), ("mse_loss", 16),
    ]  # fmt: skip
    assert all(len(samples) == 2 for row in rows for samples in row["seconds"].values())
    table = (tmp_path / "sizes.md").read_text().splitlines()
    assert table[3].endswith("| 2**6 | 2**16 |")
    assert {line.split(" | ")[0].lstrip("| ") for line in table[5:]} == {"gaussian_kl", "mse_loss"}
    assert all(" us | " in line for line in table[5:])
