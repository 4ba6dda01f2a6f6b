from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Triton's interpreter turns arrays of one element into numbers as NumPy is about to forbid.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(autouse=True)
def _on_the_device(device: torch.device) -> Iterator[None]:
    """Make the tensors of a test where the kernels run."""
    if device.type == "cpu":
        yield
    else:
        with device:
            yield
