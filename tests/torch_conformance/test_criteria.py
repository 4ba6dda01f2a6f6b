"""The criteria of ``torch.testing._internal.common_nn``, by our modules: no batch dimension, gradients of both orders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk

from .counts import counted
from .examples import every_route, route

pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
    pytest.mark.filterwarnings("ignore:The combination of ANY:UserWarning"),
]


def _listed() -> list[dict[str, Any]]:
    from torch.testing._internal.common_nn import criterion_tests

    return [test for test in criterion_tests if test["fullname"].split("_")[0] in gk.nn.__all__]


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _drawn(test: dict[str, Any], which: str) -> tuple[Tensor, ...]:
    draw = test.get(f"{which}_fn")
    found = _tensors(draw() if draw is not None else torch.randn(test[f"{which}_size"]))
    return tuple(t.double() if t.is_floating_point() else t for t in found)


def test_the_list_is_torchs() -> None:
    names = {test["fullname"].split("_")[0] for test in _listed()}
    assert names == {"BCELoss", "BCEWithLogitsLoss", "CosineEmbeddingLoss", "HuberLoss", "KLDivLoss", "L1Loss", "MSELoss",
                     "NLLLoss", "SmoothL1Loss"}  # fmt: skip
    assert len(_listed()) == 3 * len(names)


@every_route
@pytest.mark.parametrize("test", _listed(), ids=lambda test: test["fullname"])
def test_criteria(test: dict[str, Any], path: str, small: str, device: torch.device) -> None:
    """The value of a batch of one, torch's own value, and derivatives by differences."""
    name, _, reduction = test["fullname"].replace("_no_batch_dim", "").partition("_")
    with counted(name, "common_nn criteria", route(path, small)):
        inputs, (target,) = ([t.to(device) for t in _drawn(test, which)] for which in ("input", "target"))
        ours, theirs = (getattr(module, name)(reduction=reduction) for module in (gk.nn, torch.nn))
        leaves = [t.detach().requires_grad_() for t in inputs]
        found = ours(*leaves, target)
        torch.testing.assert_close(found, theirs(*leaves, target))
        reference = test["reference_fn"](*copy.deepcopy(inputs), target, ours)
        torch.testing.assert_close(found, reference.reshape(found.shape))
        assert torch.autograd.gradcheck(lambda *given: ours(*given, target), leaves)
        assert torch.autograd.gradgradcheck(lambda *given: ours(*given, target), leaves)
