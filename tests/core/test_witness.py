"""The witness of a compiled second derivative; tests/torch_conformance/test_transforms.py compiles with it."""

import torch

from genloss_kernels.core.witness import witnessed


def test_nothing_is_added_where_nothing_compiles() -> None:
    operand = torch.ones(3, requires_grad=True)
    result = operand.sum()
    assert witnessed(result, operand) is result
