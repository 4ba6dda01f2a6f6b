from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _on_the_device(device: torch.device) -> Iterator[None]:
    """Make the tensors of a test where the kernels run."""
    if device.type == "cpu":
        yield
    else:
        with device:
            yield
