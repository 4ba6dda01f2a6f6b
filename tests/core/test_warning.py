"""A warning points at the line of the caller, however deep in the package it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import genloss_kernels as gk
from genloss_kernels.core.warning import warn


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: warn("a test"), "a test"),
        (lambda: gk.mse_loss(torch.zeros(2, 3), torch.zeros(3)), "Using a target size"),
    ],
    ids=["direct", "function"],
)
def test_place(call: Callable[[], Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as record:
        call()
    assert [warning.filename for warning in record] == [__file__]
