"""The inputs by which torch tests its own loss modules: values and gradients of our modules beside torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk

from .counts import counted, left_out

# Inputs of each module in torch 2.13, and how many of them are skipped from one to the next on interpreted kernels.
COUNTS = {
    "CrossEntropyLoss": (105, 4),
    "LinearCrossEntropyLoss": (857, 20),
    "NLLLoss": (28, 2),
    "BCELoss": (6, 1),
    "BCEWithLogitsLoss": (6, 1),
    "MSELoss": (8, 1),
    "L1Loss": (5, 1),
    "SmoothL1Loss": (8, 1),
    "HuberLoss": (4, 1),
    "GaussianNLLLoss": (5, 1),
    "KLDivLoss": (10, 1),
    "CosineEmbeddingLoss": (5, 1),
}

pytestmark = [
    pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="other versions have other inputs"),
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
]


def _inputs(name: str, device: torch.device) -> list[Any]:
    from torch.testing._internal.common_modules import module_db

    (found,) = [info for info in module_db if info.name == f"nn.{name}"]
    torch.manual_seed(0)
    return list(found.module_inputs_func(found, device, torch.float64, True, True))


def _run(kind: type[torch.nn.Module], sample: Any, state: dict[str, Tensor] | None) -> tuple[list[Tensor], torch.nn.Module]:
    """Loss, gradients of the inputs and of the parameters; and the module."""
    module = kind(*sample.constructor_input.args, **sample.constructor_input.kwargs)
    if state is not None:
        module.load_state_dict(state)
    inputs = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in sample.forward_input.args]
    loss = module(*inputs, **sample.forward_input.kwargs)
    leaves = [t for t in (*inputs, *module.parameters()) if isinstance(t, Tensor) and t.requires_grad]
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)], module


def _detached(sample: Any) -> list[Any]:
    return [t.detach() if isinstance(t, Tensor) else t for t in sample.forward_input.args]


# Of torch's own module, where its chunks do not take an option; ours do.
@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored:UserWarning")
@pytest.mark.parametrize("name", COUNTS)
def test_module_inputs(name: str, path: str, device: torch.device) -> None:
    count, step = COUNTS[name]
    inputs = _inputs(name, device)
    assert len(inputs) == count
    chosen = inputs[:: 1 if path == "eager" else step]
    left_out(name, "module_db", path, count - len(chosen))
    for number, sample in enumerate(chosen):
        label = f"input {number}: {sample.constructor_input.args} {sample.constructor_input.kwargs}"
        with counted(name, "module_db", path):
            wanted, theirs = _run(getattr(torch.nn, name), sample, None)
            found, module = _run(getattr(gk.nn, name), sample, theirs.state_dict())
            for ours, torchs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, torchs, equal_nan=True, msg=lambda text, label=label: f"{label}\n{text}")
        if sample.reference_fn is not None:
            with counted(name, "common_nn references", path):
                reference = sample.reference_fn(module, *_detached(sample), **sample.forward_input.kwargs)
                torch.testing.assert_close(found[0], reference, equal_nan=True, check_dtype=False, msg=label)
