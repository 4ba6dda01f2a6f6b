"""Few elements of half precision on a CPU: as in fp32, and rounded once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core import widening

HALVES = (torch.float16, torch.bfloat16)


def _calls() -> dict[str, dict[str, Any]]:
    """Arguments in fp32 whose digits bf16 holds."""
    x, y = (torch.randn(6, 8).bfloat16().float() for _ in range(2))
    p, q = (torch.rand(6, 8).bfloat16().float() for _ in range(2))
    weight, labels = torch.rand(8).bfloat16().float(), torch.tensor([0, 7, -100, 3, 3, 1])
    signs = torch.tensor([1, -1, 1, -1, -1, 1])
    return {
        "cross_entropy": {"input": x, "target": labels, "weight": weight, "label_smoothing": 0.25},
        "nll_loss": {"input": x, "target": labels, "weight": weight},
        "linear_cross_entropy": {"input": x, "linear_weight": y, "target": labels.clamp(max=5)},
        "binary_cross_entropy_with_logits": {"input": x, "target": p, "weight": q, "pos_weight": weight},
        "binary_cross_entropy": {"input": p, "target": q, "weight": weight},
        "kl_div": {"input": x, "target": p, "reduction": "batchmean"},
        "cosine_embedding_loss": {"input1": x, "input2": y, "target": signs, "margin": 0.25},
        "mse_loss": {"input": x, "target": y},
        "l1_loss": {"input": x, "target": y},
        "smooth_l1_loss": {"input": x, "target": y, "beta": 0.5},
        "huber_loss": {"input": x, "target": y, "delta": 0.5},
        "vae_loss": {"recon": x, "target": p, "mu": y, "logvar": x, "recon_loss": "bce_with_logits", "beta": 3.0},
    }


def _run(loss: str, arguments: dict[str, Any], dtype: torch.dtype, upstream: float) -> list[Tensor]:
    """The loss, and the gradients of all that may have one."""
    given = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    learn = {k: v.clone().requires_grad_() for k, v in given.items() if v is not given.get("weight") and _floating(v)}
    learn.pop("pos_weight", None)
    result = getattr(gk, loss)(**given | learn)
    value = result.loss if isinstance(result, tuple) else result
    return [value.detach(), *torch.autograd.grad(value, list(learn.values()), torch.full_like(value, upstream))]


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("reduction", ["given", "none"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("loss", [name for name in _calls() if name != "linear_cross_entropy"])
def test_rounded_once(loss: str, dtype: torch.dtype, reduction: str) -> None:
    arguments = _calls()[loss] | ({} if reduction == "given" else {"reduction": reduction})
    if loss == "vae_loss" and reduction == "none":
        arguments["reduction"] = "sum"
    with gk.backend("eager"):
        found, wide = (_run(loss, arguments, kind, 0.75) for kind in (dtype, torch.float32))
    for half, single in zip(found, wide, strict=True):
        assert half.dtype == dtype
        assert torch.equal(half, single.to(dtype))


def test_every_loss_with_a_builtin_or_parts_is_tried() -> None:
    assert _calls().keys() >= {
        name
        for name in gk.functional.__all__
        if not isinstance(getattr(gk.functional, name), type)
        and hasattr(torch.nn.functional, name)
        and name != "gaussian_nll_loss"
    }


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("loss", _calls())
def test_few_and_many_agree(loss: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _calls()[loss]
    exact = _run(loss, arguments, torch.float64, 0.75)
    for limit in (2**17, 0):
        monkeypatch.setattr(widening, "WIDE_BELOW", limit)
        for place, (half, wanted) in enumerate(zip(_run(loss, arguments, dtype, 0.75), exact, strict=True)):
            scale = float(wanted.abs().max())
            allowed = (4.0 if loss == "linear_cross_entropy" else 1.0) * torch.finfo(dtype).eps * scale
            torch.testing.assert_close(half.double(), wanted, rtol=0.0, atol=allowed, msg=f"{loss}, {limit}, result {place}")


@pytest.mark.parametrize("loss", _calls())
def test_autocast_keeps_what_was_not_rounded(loss: str) -> None:
    arguments = {k: v.bfloat16() if _floating(v) else v for k, v in _calls()[loss].items()}
    if loss == "binary_cross_entropy" or loss == "linear_cross_entropy":
        arguments.pop("weight", None)
    with gk.backend("eager"), torch.autocast("cpu", torch.bfloat16):
        result = getattr(gk, loss)(**arguments)
    assert (result.loss if isinstance(result, tuple) else result).dtype == torch.float32


def test_few() -> None:
    half, single = torch.zeros(widening.WIDE_BELOW - 1, dtype=torch.bfloat16), torch.zeros(9)
    assert widening.few(half, math.inf)
    assert not widening.few(torch.zeros(widening.WIDE_BELOW, dtype=torch.bfloat16), math.inf)
    assert not widening.few(half, half.numel())
    assert widening.few(single, 10)
    assert widening.few(single.double(), math.inf)
    assert not widening.few(single, 9)
    assert not widening.few(single.to("meta"), math.inf)
    assert not widening.few(single.to(torch.float8_e5m2), math.inf)


def test_labels_and_probabilities_are_checked_as_in_fp32() -> None:
    for dtype in (torch.float32, *HALVES):
        x = torch.full((2, 3), 0.5, dtype=dtype)
        with gk.backend("eager"):
            for loss in (gk.cross_entropy, gk.nll_loss):
                with pytest.raises(IndexError, match="3"):
                    loss(x, torch.tensor([0, 3]))
            with pytest.raises(RuntimeError, match="input"):
                gk.binary_cross_entropy(x * 4, x)
            with pytest.raises(RuntimeError, match="target"):
                gk.binary_cross_entropy(x, x * 4)
