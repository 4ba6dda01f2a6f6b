"""Losses of elements, rows and pairs that are changed in place, as a mask or a weight does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genloss_kernels import cases

from .properties.blocks import operators_alone


def _reduces_nothing(case: cases.Case) -> bool:
    return case.call(dtype=torch.float32).arguments.get("reduction") == "none"


CASES = [case for case in cases.select(cases.DOCTOR) if not case.autocast and _reduces_nothing(case)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.loss}: {case.name}")
def test_a_loss_that_is_not_reduced_can_be_changed_in_place(case: cases.Case, path: str, device: torch.device) -> None:
    gradients = []
    for in_place in (False, True):
        arguments = case.call(device, torch.float32).arguments
        with operators_alone():
            loss = case.function(**arguments)
        loss = loss.mul_(2.0) if in_place else loss * 2.0
        learned = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
        gradients.append(torch.autograd.grad(loss.sum(), learned))
    torch.testing.assert_close(*gradients, rtol=0.0, atol=0.0)
