"""The inputs by which torch tests its losses, under ``gk.patch_torch()``: torch's numbers, dtypes and errors."""

from __future__ import annotations

import pytest
import torch

import genloss_kernels as gk
from genloss_kernels.core.torch_losses import TORCH_LOSSES

from . import test_module_db, test_op_db
from .counts import counted
from .test_op_db import every_entry

PATCHED = "under patch_torch"

pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a target size:UserWarning"),
    pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored:UserWarning"),
]


@every_entry
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_samples(entry: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    name = entry.rpartition(".")[2]
    with gk.patch_torch() as patch:
        functions = (getattr(torch.nn.functional, name), TORCH_LOSSES[name])
        monkeypatch.setattr(test_op_db, "_functions", lambda _: functions)
        seen = sum(1 for _ in test_op_db._compared(entry, device, dtype, PATCHED, second=False))
    calls = patch.report()["calls"][name]
    assert calls["ours"] >= seen / 4, calls


@every_entry
def test_error_inputs(entry: str, device: torch.device) -> None:
    op = test_op_db._op(entry)
    for error in [] if op.error_inputs_func is None else op.error_inputs(device):
        sample = error.sample_input
        where = counted(entry.rpartition(".")[2], "op_db error inputs", PATCHED)
        with where, gk.patch_torch(), pytest.raises(error.error_type, match=error.error_regex):
            getattr(torch.nn.functional, entry.rpartition(".")[2])(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="other versions have other inputs")
@pytest.mark.parametrize("name", test_module_db.COUNTS)
def test_module_inputs(name: str, device: torch.device) -> None:
    module = getattr(torch.nn, name)
    ran = 0
    for number, sample in enumerate(test_module_db._inputs(name, device)[:: 5 if name == "LinearCrossEntropyLoss" else 1]):
        with counted(name, "module_db", PATCHED):
            expected, made = test_module_db._run(module, sample, None)
            with gk.patch_torch() as patch:
                found, _ = test_module_db._run(module, sample, made.state_dict())
            ran += sum(row["ours"] for row in patch.report()["calls"].values())
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, equal_nan=True, msg=lambda text, at=number: f"input {at}\n{text}")
    assert ran
