"""Contrastive divergence on both paths against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import genloss_kernels as gk
from genloss_kernels.cases.energy import contrastive_divergence_loss_oracle
from genloss_kernels.losses.energy import api

from ..refusals import refused
from .comparison import DTYPES, check

NAMES = ("positive_energy", "negative_energy")


@pytest.fixture(autouse=True)
def _operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our operators also where plain ones would be quicker."""
    monkeypatch.setattr(api, "PLAIN_BELOW", 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_values_and_gradients(path: str, l2: float, dtype: torch.dtype) -> None:
    for reduction in ("mean", "sum", "none"):
        other = (7, 5) if reduction == "none" else (3, 4, 2)
        energies = (torch.randn(7, 5).to(dtype), torch.randn(other).to(dtype))
        arguments = dict(zip(NAMES, energies, strict=True)) | {"l2": l2, "reduction": reduction}
        check(gk.contrastive_divergence_loss, contrastive_divergence_loss_oracle, arguments, NAMES)


def test_gradient_is_that_of_the_likelihood(path: str) -> None:
    """Over three states whose probabilities are known, samples in their proportions give the exact gradient."""
    energy = torch.tensor([0.0, math.log(2.0), math.log(4.0)], dtype=torch.float64, requires_grad=True)
    data, samples = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 0, 0, 1, 1, 2])
    loss = gk.contrastive_divergence_loss(energy[data], energy[samples])
    likelihood = -torch.log_softmax(-energy, 0)[data].mean()
    torch.testing.assert_close(torch.autograd.grad(loss, energy), torch.autograd.grad(likelihood, energy))


@pytest.mark.parametrize("below", [0, 2**19])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_squares_that_overflow(path: str, reduction: str, below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a penalty they are no term; with one its weight comes first."""
    monkeypatch.setattr(api, "PLAIN_BELOW", below)
    for large, l2, penalty in ((3e38, 0.0, 0.0), (math.inf, 0.0, 0.0), (1e20, 1e-20, 1e20)):
        for place, sign in enumerate((1.0, -1.0)):
            energies = [torch.tensor([large if k == place else 0.0], requires_grad=True) for k in range(2)]
            found = gk.contrastive_divergence_loss(*energies, l2=l2, reduction=reduction).sum()
            torch.testing.assert_close(found, torch.tensor(sign * large + penalty))
            slopes = [1.0, -1.0]
            slopes[place] += 2.0 * l2 * large if l2 else 0.0
            assert [g.item() for g in torch.autograd.grad(found, energies)] == pytest.approx(slopes)


def test_empty_side(path: str) -> None:
    energies = torch.ones(3), torch.ones(0)
    assert gk.contrastive_divergence_loss(*energies).isnan()
    assert gk.contrastive_divergence_loss(*energies, reduction="sum") == 3.0


E4 = torch.ones(4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"positive_energy": 1.0}, TypeError, "positive_energy must be a Tensor"),
    ({"negative_energy": E4.long()}, NotImplementedError, "negative_energy must be a real floating"),
    ({"negative_energy": E4.to("meta")}, RuntimeError, "negative_energy must be on the input's device"),
    ({"l2": -0.1}, ValueError, "l2 must not be negative, got -0.1"),
    ({"l2": "1"}, TypeError, "l2 must be a number"),
    ({"reduction": "batchmean"}, ValueError, "batchmean is not a valid value for reduction"),
    ({"reduction": "none", "negative_energy": E4[:2]}, ValueError, r"one shape for reduction='none', got \[4\] and \[2\]"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_bad_input(backend: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with gk.backend(backend), refused("contrastive_divergence_loss", arguments, error, message):
        gk.contrastive_divergence_loss(**(dict.fromkeys(NAMES, E4) | arguments))


def test_module() -> None:
    energies = torch.randn(5), torch.randn(3)
    module = gk.ContrastiveDivergenceLoss(l2=0.1, reduction="sum")
    assert module(*energies) == gk.contrastive_divergence_loss(*energies, l2=0.1, reduction="sum")
