"""Bad arguments raise what torch raises, say which argument it was, launch nothing and change nothing."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core import launch
from genloss_kernels.core.backend import INTERPRETED
from genloss_kernels.losses.binary_cross_entropy import api as binary_cross_entropy_api
from genloss_kernels.losses.cosine import api as cosine_api
from genloss_kernels.losses.cross_entropy import api as cross_entropy_api
from genloss_kernels.losses.kl_div import api as kl_div_api

from .refusals import Refusal, brief, read, refused, table

CE, NLL = "cross_entropy", "nll_loss"
BCE, KL = "binary_cross_entropy_with_logits", "gaussian_kl"
DISTILL, JS, ENTROPY = "kl_div_with_logits", "js_div_with_logits", "categorical_entropy"
DIVERGENCE, CHANCES, COSINE = "kl_div", "binary_cross_entropy", "cosine_embedding_loss"
ERRORS = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
TABLED = (CE, NLL, BCE, CHANCES, KL, DIVERGENCE, COSINE, DISTILL, JS, ENTROPY, *ERRORS)

pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a target size:UserWarning"),
]

BOTH = ("eager", "triton")


class Row(NamedTuple):
    """``arguments`` replace those of a good call; ``message`` names what was wrong.

    ``torchs``: torch raises for this call too, where it has the function and all the arguments.
    """

    loss: str
    arguments: dict[str, Any]
    error: type[Exception]
    message: str
    paths: tuple[str, ...] = BOTH
    torchs: bool = True

    def __str__(self) -> str:
        return f"{self.loss}-" + ",".join(f"{name}={brief(value)}" for name, value in self.arguments.items())


def good(loss: str) -> dict[str, Any]:
    x = torch.linspace(-2.0, 2.0, 20).view(4, 5)
    if loss in (CE, NLL):
        return {"input": x, "target": torch.tensor([0, 1, -100, 4])}
    if loss == BCE:
        return {"input": x, "target": torch.linspace(0.0, 1.0, 20).view(4, 5)}
    if loss in (DISTILL, JS, *ERRORS):
        return {"input": x, "target": x.flip(1)}
    if loss == ENTROPY:
        return {"logits": x, "reduction": "mean"}
    if loss == COSINE:
        return {"input1": x, "input2": x.flip(1), "target": torch.tensor([1, -1, -1, 1])}
    if loss == CHANCES:
        return {"input": torch.linspace(0.1, 0.9, 20).view(4, 5), "target": torch.linspace(0.0, 1.0, 20).view(4, 5)}
    if loss == DIVERGENCE:
        return {"input": x - 3.0, "target": torch.linspace(0.0, 1.0, 20).view(4, 5)}
    return {"mu_q": x, "logvar_q": x * 0.5}


def _labels(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _ones(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return torch.ones(shape, dtype=dtype, **options)


def _labelled(loss: str) -> Iterator[Row]:
    """What cross entropy and the negative log-likelihood have in common."""
    for value in ([1.0, 2.0], 3, None):
        yield Row(loss, {"input": value}, TypeError, "input must be a Tensor, not")
    for value in ([0, 1, 2, 3], 1, None):
        yield Row(loss, {"target": value}, TypeError, "target must be a Tensor, not")
    zero_d = RuntimeError if loss == CE else ValueError
    yield Row(loss, {"input": torch.tensor(1.0), "target": torch.tensor(0)}, zero_d, "input must have shape")
    for dtype in (torch.int64, torch.bool, torch.complex64):
        yield Row(loss, {"input": _ones(4, 5, dtype=dtype)}, NotImplementedError, f"input must be .* got {dtype}")
    yield Row(loss, {"target": _labels(0, 1, 2)}, ValueError, r"input batch_size \(4\) .* target batch_size \(3\)")
    yield Row(loss, {"target": torch.tensor(1)}, ValueError, r"input batch_size \(4\) .* target batch_size")
    spatial = {"input": _ones(4, 5, 2), "target": _ones(4, 3, dtype=torch.int64)}
    yield Row(loss, spatial, RuntimeError, r"input: \[4, 5, 2\], target: \[4, 3\]")
    yield Row(loss, {**spatial, "target": _labels(0, 1, 2, 3)}, RuntimeError, r"input: \[4, 5, 2\], target: \[4\]")
    yield Row(loss, {"target": _ones(4, 2, dtype=torch.int64)}, RuntimeError, r"target \[4, 2\]")
    yield Row(loss, {"input": _ones(5), "target": _labels(0, 1)}, ValueError, r"target for an input of shape \(C\)")
    for dtype in (torch.int32, torch.int16, torch.bool, torch.float32):
        yield Row(loss, {"target": _ones(4, dtype=dtype)}, RuntimeError, f"target dtype .* got {dtype}")
    yield Row(loss, {"target": _ones(4, 5, dtype=torch.int64)}, RuntimeError, "target")
    yield Row(loss, {"target": _ones(3, 5)}, ValueError, r"input batch_size \(4\) .* target batch_size \(3\)")
    for value in ([1.0] * 5, 2.0):
        yield Row(loss, {"weight": value}, TypeError, "weight must be a Tensor, not")
    for shape in ((4,), (1, 5), ()):
        yield Row(loss, {"weight": _ones(*shape)}, RuntimeError, r"weight .* 5 classes .* shape")
    for dtype in (torch.float64, torch.int64):
        yield Row(loss, {"weight": _ones(5, dtype=dtype)}, RuntimeError, f"weight must .* found {dtype}")
    yield Row(loss, {"weight": _ones(5, requires_grad=True)}, RuntimeError, "weight, which has requires_grad=True")
    for value in ("batchmean", None, 1, ["mean"]):
        yield Row(loss, {"reduction": value}, ValueError, "is not a valid value for reduction")
    for value in (1.5, "1", None, True):
        yield Row(loss, {"ignore_index": value}, TypeError, "ignore_index must be int, not")
    yield Row(loss, {"ignore_index": 2**63}, ValueError, "ignore_index must fit into 64 bits")
    outside = "is out of bounds: target must hold class indices from 0 to 4, or ignore_index"
    for bad in (5, -1, 2**40, -(2**40)):
        yield Row(loss, {"target": _labels(0, bad, 2, 3)}, IndexError, f"Target {bad} {outside}")
    yield Row(loss, {"target": _labels(0, 255, 2, 3, dtype=torch.uint8)}, IndexError, f"Target 255 {outside}")
    yield Row(loss, {"input": _ones(5), "target": torch.tensor(5)}, IndexError, f"Target 5 {outside}")
    spatial = {"input": _ones(2, 5, 3), "target": torch.tensor([[0, 1, 2], [3, 4, 5]])}
    yield Row(loss, spatial, IndexError, f"Target 5 {outside}")
    yield Row(loss, {"target": _labels(0, -100, 2, 3), "ignore_index": 2}, IndexError, f"Target -100 {outside}")
    # A call on tensors of two devices fails in torch's own ways.
    for name, value in (("target", _labels(0, 1, 2, 3)), ("weight", _ones(5))):
        yield Row(loss, {name: value.to("meta")}, RuntimeError, f"{name} must be on the input's device", torchs=False)


def _cross_entropy() -> Iterator[Row]:
    yield from _labelled(CE)
    soft = _ones(4, 5) / 5.0
    yield Row(CE, {"label_smoothing": 1.5}, RuntimeError, r"label_smoothing must be between .* 1\.5")
    for value in (-0.1, math.nan):
        yield Row(CE, {"label_smoothing": value}, RuntimeError, "label_smoothing must be between", torchs=False)
    for value in ("0.1", None):
        yield Row(CE, {"label_smoothing": value}, TypeError, "label_smoothing must be a number, not")
    for value in (0, 3):
        yield Row(CE, {"target": soft, "ignore_index": value}, RuntimeError, "ignore_index is not supported")
    yield Row(CE, {"target": soft, "weight": _ones(4)}, RuntimeError, r"weight .* 5 classes .* shape")
    yield Row(CE, {"target": soft.to(torch.complex64)}, RuntimeError, "target .* torch.complex64")
    for name, positive in (("softcap", True), ("z_loss", False), ("logit_scale", False)):
        for value in ("1", True, torch.tensor(3.0), [1.0], *([] if positive else [None])):
            yield Row(CE, {name: value}, TypeError, f"{name} must be a number, not")
    # Values at which nothing is asked for must be of the right type, too.
    for name in ("logit_scale", "z_loss", "divisor"):
        for value in (math.nan, math.inf):
            yield Row(CE, {name: value}, ValueError, f"{name} must be finite")
    yield Row(CE, {"logit_scale": torch.tensor(1.0)}, TypeError, "logit_scale must be a number, not")
    yield Row(CE, {"z_loss": torch.tensor(0.0)}, TypeError, "z_loss must be a number, not")
    for value in (0.0, -1.0, math.nan):
        yield Row(CE, {"softcap": value}, ValueError, "softcap must be positive and finite, got")
    yield Row(CE, {"z_loss": -1.0}, ValueError, "z_loss must not be negative, got")
    for shape in ((3,), (4, 1), (), (5,)):
        yield Row(CE, {"row_weight": _ones(*shape)}, ValueError, r"row_weight must have the shape \[4\]")
    yield Row(CE, {"row_weight": [1.0] * 4}, TypeError, "row_weight must be a Tensor, not")
    yield Row(CE, {"row_weight": _ones(4, dtype=torch.int64)}, NotImplementedError, "row_weight must be")
    yield Row(CE, {"row_weight": _ones(4, device="meta")}, RuntimeError, "row_weight must be on the input's device")
    for value in ("3", [3.0], True):
        yield Row(CE, {"divisor": value}, TypeError, "divisor must be a number")
    for shape in ((1,), (4,)):
        yield Row(CE, {"divisor": _ones(*shape)}, ValueError, "divisor must be a number or a 0-d tensor")
    yield Row(CE, {"divisor": _ones(dtype=torch.complex64)}, (TypeError, RuntimeError), "divisor must")  # pyright: ignore
    yield Row(CE, {"divisor": _ones(device="meta")}, RuntimeError, "divisor must be on the input's device")
    for reduction in ("sum", "none"):
        yield Row(CE, {"divisor": 3.0, "reduction": reduction}, ValueError, "divisor replaces what reduction='mean'")
    for name in ("return_stats", "inplace_backward"):
        for value in (1, "yes"):
            yield Row(CE, {name: value}, TypeError, f"{name} must be bool, not")
    leaf = {"input": _ones(4, 5, requires_grad=True), "inplace_backward": True}
    yield Row(CE, leaf, ValueError, "inplace_backward=True .* leaf", ("triton",))
    expanded = {"input": (_ones(1, 5, requires_grad=True) * 2.0).expand(4, 5), "inplace_backward": True}
    yield Row(CE, expanded, ValueError, "inplace_backward=True .* expanded", ("triton",))
    yield Row(
        CE, {"vocab_shard": "even"}, TypeError, "vocab_shard must be a genloss_kernels.distributed.VocabShard, not str"
    )


def _binary() -> Iterator[Row]:
    for name in ("input", "target"):
        yield Row(BCE, {name: [1.0]}, TypeError, f"{name} must be a Tensor, not")
    for shape in ((4,), (5, 4), (4, 1), ()):
        yield Row(BCE, {"target": _ones(*shape)}, ValueError, "Target size .* must be the same as input size")
    for dtype in (torch.int64, torch.bool):
        yield Row(BCE, {"target": _ones(4, 5, dtype=dtype)}, RuntimeError, f"target must be .* got {dtype}")
    for dtype in (torch.int64, torch.complex64):
        yield Row(BCE, {"input": _ones(4, 5, dtype=dtype)}, NotImplementedError, f"input must be .* got {dtype}")
    for name in ("weight", "pos_weight"):
        for shape in ((3,), (2, 4, 5), (6, 1), (1, 4, 5)):
            # torch takes a pos_weight with a leading 1, which changes nothing but the count of dimensions.
            message = rf"{name} of shape \[.*\] does not broadcast"
            yield Row(BCE, {name: _ones(*shape)}, RuntimeError, message, torchs=shape != (1, 4, 5))
        enlarging = {"input": _ones(1, 5), "target": _ones(1, 5), name: _ones(4, 1)}
        yield Row(BCE, enlarging, RuntimeError, rf"{name} of shape \[4, 1\] does not broadcast")
        yield Row(BCE, {name: 2.0}, TypeError, f"{name} must be a Tensor, not")
        yield Row(BCE, {name: _ones(5, requires_grad=True)}, RuntimeError, f"{name}, which has requires_grad=True")
        meta = _ones(5, device="meta")
        yield Row(BCE, {name: meta}, RuntimeError, f"{name} must be on the input's device", torchs=False)
    for dtype in (torch.float32, torch.uint8):
        yield Row(BCE, {"mask": _ones(4, 5, dtype=dtype)}, TypeError, f"mask must be a bool tensor.* got {dtype}")
    for shape in ((3,), (2, 4, 5)):
        yield Row(BCE, {"mask": _ones(*shape, dtype=torch.bool)}, RuntimeError, r"mask of shape \[.*\] does not broadcast")
    for value in ([True], True):
        yield Row(BCE, {"mask": value}, TypeError, "mask must be a Tensor, not")
    for value in (2.0, -0.5, math.nan):
        yield Row(BCE, {"label_smoothing": value}, RuntimeError, "label_smoothing must be between")
    yield Row(BCE, {"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number, not")
    for value in ("batchmean", None, ["mean"]):
        yield Row(BCE, {"reduction": value}, ValueError, "is not a valid value for reduction")


def _gaussian_kl() -> Iterator[Row]:
    for name, values in (("mu_q", ([1.0], None)), ("logvar_q", (1.0, None)), ("mu_p", (0.0,)), ("logvar_p", ([1.0],))):
        for value in values:
            yield Row(KL, {name: value}, TypeError, f"{name} must be a Tensor, not")
    for name, shape in (("logvar_q", (4, 3)), ("mu_p", (3, 5)), ("logvar_p", (2, 1, 4))):
        yield Row(KL, {name: _ones(*shape)}, RuntimeError, rf"do not broadcast together: .*{name} \[")
    names = ("mu_q", "logvar_q", "mu_p", "logvar_p")
    for name, dtype in zip(names, (torch.int64, torch.int32, torch.bool, torch.complex64), strict=True):
        yield Row(KL, {name: _ones(4, 5, dtype=dtype)}, NotImplementedError, f"{name} must be .* got {dtype}")
    yield Row(KL, {"logvar_q": _ones(4, 5, device="meta")}, RuntimeError, "logvar_q must be on the input's device")
    for name in ("free_bits", "capacity"):
        for value in (-0.1, math.nan):
            yield Row(KL, {name: value}, ValueError, f"{name} must not be negative, got")
        for value in ("1", True, torch.tensor(0.1)):
            yield Row(KL, {name: value}, TypeError, f"{name} must be a number, not")
    for value in ((1.0, -1.0), (math.nan, 1.0), (1.0, math.nan)):
        yield Row(KL, {"logvar_clamp": value}, ValueError, r"logvar_clamp must be \(low, high\)")
    for value in (3.0, (1.0,), (0.0, 1.0, 2.0), "ab", ("a", "b"), (None, 1.0)):
        yield Row(KL, {"logvar_clamp": value}, TypeError, "logvar_clamp must be")
    zero_d = {"mu_q": torch.tensor(1.0), "logvar_q": torch.tensor(1.0)}
    yield Row(KL, zero_d, ValueError, "batchmean .* 0-d")
    yield Row(KL, {**zero_d, "reduction": "sum", "capacity": 1.0}, ValueError, "capacity .* 0-d")
    for value in ("average", None, ["mean"]):
        yield Row(KL, {"reduction": value}, ValueError, "is not a valid value for reduction")


def _divergences() -> Iterator[Row]:
    for loss in (DISTILL, JS, ENTROPY):
        for name in ("logits",) if loss == ENTROPY else ("input", "target"):
            for value in ([1.0, 2.0], 3, None):
                yield Row(loss, {name: value}, TypeError, f"{name} must be a Tensor, not")
            for dtype in (torch.int64, torch.bool, torch.complex64):
                yield Row(loss, {name: _ones(4, 5, dtype=dtype)}, NotImplementedError, f"{name} must be .* got {dtype}")
        zero_d = {name: torch.tensor(1.0) for name in good(loss) if name != "reduction"}
        yield Row(loss, zero_d, RuntimeError, r"must have shape \(V\) or \(N, ..., V\)")
        for value in ("average", None, ["mean"]):
            yield Row(loss, {"reduction": value}, ValueError, "is not a valid value for reduction")
    for loss in (DISTILL, JS):
        for shape in ((4, 4), (1, 5), (5,), (4, 5, 1), ()):
            yield Row(loss, {"target": _ones(*shape)}, RuntimeError, r"target must have the shape \[4, 5\] of the input")
        yield Row(loss, {"target": _ones(4, 5, device="meta")}, RuntimeError, "target must be on the input's device")
        for value in (0.0, -1.0, math.nan, math.inf):
            yield Row(loss, {"temperature": value}, ValueError, "temperature must be positive and finite, got")
        for value in ("1", True, None, torch.tensor(1.0)):
            yield Row(loss, {"temperature": value}, TypeError, "temperature must be a number, not")
    for value in ("backward", None, 1, ["forward"]):
        yield Row(DISTILL, {"direction": value}, ValueError, "is not a valid value for direction: .* forward, reverse")
    for value in (0.0, 1.0, -0.1, 1.5, math.nan):
        yield Row(JS, {"beta": value}, ValueError, "beta must be between 0 and 1")
    for value in ("0.5", True, None, torch.tensor(0.5)):
        yield Row(JS, {"beta": value}, TypeError, "beta must be a number, not")


def _chances() -> Iterator[Row]:
    for name in ("input", "target"):
        for value in ([1.0], None):
            yield Row(CHANCES, {name: value}, TypeError, f"{name} must be a Tensor, not")
        for value in (-0.5, 1.5, -1e-30, 1.0 + 2.0**-20, math.inf):
            some = torch.linspace(0.0, 1.0, 20).view(4, 5)
            some[2, 3] = value
            message = f"all elements of {name} should be between 0 and 1, got a range of"
            yield Row(CHANCES, {name: some}, RuntimeError, message)
    for shape in ((4,), (5, 4), (4, 1), ()):
        yield Row(CHANCES, {"target": _ones(*shape)}, ValueError, "Target size .* must be the same as input size")
    for dtype in (torch.int64, torch.bool, torch.float64, torch.bfloat16):
        message = f"target must have the dtype of the input, torch.float32, got {dtype}"
        yield Row(CHANCES, {"target": _ones(4, 5, dtype=dtype)}, RuntimeError, message)
    for dtype in (torch.int64, torch.complex64):
        yield Row(
            CHANCES, {"input": _ones(4, 5, dtype=dtype)}, NotImplementedError, f"input must be .* got {dtype}", torchs=False
        )
    for shape in ((3,), (2, 4, 5), (6, 1)):
        yield Row(CHANCES, {"weight": _ones(*shape)}, RuntimeError, r"weight of shape \[.*\] does not broadcast")
    yield Row(CHANCES, {"weight": 2.0}, TypeError, "weight must be a Tensor, not")
    yield Row(CHANCES, {"weight": _ones(5, requires_grad=True)}, RuntimeError, "weight, which has requires_grad=True")
    for name, shape in (("target", (4, 5)), ("weight", (5,))):
        meta = _ones(*shape, device="meta")
        yield Row(CHANCES, {name: meta}, RuntimeError, f"{name} must be on the input's device", torchs=False)
    for value in ("batchmean", None, ["mean"]):
        yield Row(CHANCES, {"reduction": value}, ValueError, "is not a valid value for reduction")


def _cosine() -> Iterator[Row]:
    for name in ("input1", "input2", "target"):
        for value in ([1.0], 1.0, None):
            yield Row(COSINE, {name: value}, TypeError, f"{name} must be a Tensor, not")
    for name in ("input1", "input2"):
        for dtype in (torch.int64, torch.bool, torch.complex64):
            message = f"{name} must be .* got {dtype}"
            yield Row(COSINE, {name: _ones(4, 5, dtype=dtype)}, NotImplementedError, message, torchs=False)
        # Of one dimension, of three, and of as many as the target.
        for shape in ((5,), (2, 4, 5), ()):
            message = rf"a 1D target expects 2D inputs.*{name} \{list(shape)}"
            yield Row(COSINE, {name: _ones(*shape)}, RuntimeError, message)
        for shape in ((4, 3), (3, 5)):
            message = rf"the shapes do not broadcast together: .*{name} \{list(shape)}"
            yield Row(COSINE, {name: _ones(*shape)}, RuntimeError, message)
    yield Row(COSINE, {"target": _ones(4, 5)}, RuntimeError, r"multi-target not supported, got \[4, 5\]")
    yield Row(COSINE, {"target": _ones(3)}, RuntimeError, r"the shapes do not broadcast together: .*target \[3\]")
    yield Row(COSINE, {"target": _ones()}, RuntimeError, "a 0D target expects 1D inputs")
    yield Row(COSINE, {"target": _ones(4, dtype=torch.complex64)}, RuntimeError, "target must hold labels", torchs=False)
    for name, shape in (("input2", (4, 5)), ("target", (4,))):
        meta = _ones(*shape, device="meta")
        yield Row(COSINE, {name: meta}, RuntimeError, f"{name} must be on the input's device", torchs=False)
    for value in ("1", None, True, torch.tensor(0.5)):
        yield Row(COSINE, {"margin": value}, TypeError, "margin must be a number, not", torchs=False)
    for value in ("batchmean", None, ["mean"]):
        yield Row(COSINE, {"reduction": value}, ValueError, "is not a valid value for reduction")


def _together(loss: str) -> Iterator[Row]:
    for shape in ((4,), (4, 3), (2, 4, 3)):
        message = rf"input and target must broadcast together, got input \[4, 5\], target \{list(shape)}"
        yield Row(loss, {"target": _ones(*shape)}, RuntimeError, message)


def _kl_div() -> Iterator[Row]:
    for name in ("input", "target"):
        for value in ([1.0], 1.0, None):
            yield Row(DIVERGENCE, {name: value}, TypeError, f"{name} must be a Tensor, not")
        for dtype in (torch.int64, torch.bool, torch.complex64):
            # torch takes integers, and complex numbers too.
            message = f"{name} must be .* got {dtype}"
            yield Row(DIVERGENCE, {name: _ones(4, 5, dtype=dtype)}, NotImplementedError, message, torchs=False)
    yield from _together(DIVERGENCE)
    yield Row(DIVERGENCE, {"target": _ones(4, 5, device="meta")}, RuntimeError, "target must be on the input's device")
    for value in (1, "yes", None):
        yield Row(DIVERGENCE, {"log_target": value}, TypeError, "log_target must be bool, not", torchs=False)
    for value in ("average", None, ["mean"]):
        yield Row(DIVERGENCE, {"reduction": value}, ValueError, "is not a valid value for reduction")


ROWS = (
    *_cross_entropy(), *_labelled(NLL), *_binary(), *_gaussian_kl(), *_chances(), *_kl_div(), *_cosine(), *_divergences(),
    *(row for loss in ERRORS for row in _together(loss)),
)  # fmt: skip


def _on_each_path() -> Iterator[pytest.ParameterSet]:
    for row in ROWS:
        for path in row.paths:
            marks = [pytest.mark.interpreter] if path == "triton" else []
            yield pytest.param(row, path, id=f"{path}-{row}", marks=marks)


backends = pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])


def test_the_table_is_large() -> None:
    assert len(ROWS) >= 200
    assert {row.loss for row in ROWS} == set(TABLED)


def _placed(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments on ``device``, leaves as leaves and expanded tensors expanded; what is on ``meta`` stays there."""

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_meta or value.device == device:
            return value
        if value.is_leaf:
            return value.detach().to(device).requires_grad_(value.requires_grad)
        narrow = value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]
        return narrow.to(device).expand(value.shape)

    return {name: place(value) for name, value in arguments.items()}


def _copy(value: Tensor) -> Tensor | None:
    return None if value.is_meta else value.detach().clone()


def _state(arguments: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Whatever a failed call might have changed of the tensors that it was given."""
    return {
        name: (value._version, value.requires_grad, value.grad if value.is_leaf else None, _copy(value))
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }


def _assert_unchanged(arguments: dict[str, Any], before: dict[str, tuple[Any, ...]]) -> None:
    for name, (*now, value) in _state(arguments).items():
        *then, kept = before[name]
        assert now == then, name
        assert (value is None and kept is None) or torch.equal(value, kept), name


@pytest.mark.parametrize(("row", "backend"), list(_on_each_path()))
def test_bad_input(row: Row, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    function = getattr(gk, row.loss)
    # Without it nothing looks at class indices on a GPU.
    monkeypatch.setenv("GENLOSS_DEBUG", "1")
    # With and without the built-in that small inputs go to, as if this input were large.
    for limit in (None, 0):
        if limit is not None:
            monkeypatch.setattr(cosine_api, "BUILTIN_BELOW", limit)
            monkeypatch.setattr(cross_entropy_api, "BUILTIN_BELOW", limit)
            monkeypatch.setattr(binary_cross_entropy_api, "BUILTIN_BELOW", limit)
            monkeypatch.setattr(binary_cross_entropy_api, "PROBABILITIES_BUILTIN_BELOW", limit)
            monkeypatch.setattr(kl_div_api, "BUILTIN_BELOW", limit)
            monkeypatch.setattr(kl_div_api, "LOGARITHMS_BUILTIN_BELOW", limit)
        arguments = _placed(good(row.loss) | row.arguments, device)
        before, random_state = _state(arguments), torch.get_rng_state()
        with gk.backend(backend), refused(row.loss, row.arguments, row.error, row.message) as caught:
            function(**arguments)
        _assert_unchanged(arguments, before)
        assert torch.equal(torch.get_rng_state(), random_state)
    _assert_torchs_type(row, caught.value)


def _assert_torchs_type(row: Row, error: Exception) -> None:
    """Where torch has the function and all the arguments, it raises our type or a base of it (asked for on the CPU)."""
    torchs = getattr(F, row.loss, None)
    if torchs is None or not set(row.arguments) <= set(inspect.signature(torchs).parameters) or not row.torchs:
        return
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever torch raises
        torchs(**(good(row.loss) | row.arguments))
    # Torch trips over a list without checking for it, with an AttributeError.
    if isinstance(caught.value, (ValueError, TypeError, RuntimeError, IndexError)):
        assert isinstance(error, type(caught.value)), f"torch raises {type(caught.value).__name__}: {caught.value}"


@backends
@pytest.mark.parametrize("loss", TABLED)
def test_the_good_call_is_good(loss: str, backend: str, device: torch.device) -> None:
    """So that each row fails for what it replaces; and a failed call leaves the next one alone."""
    function, arguments = getattr(gk, loss), _placed(good(loss), device)
    with gk.backend(backend):
        with pytest.raises(ValueError, match="reduction"):
            function(**(arguments | {"reduction": "average"}))
        assert function(**arguments).isfinite()


@pytest.mark.parametrize("small", [2**16, 0])
@pytest.mark.parametrize("expanded", [False, True], ids=["leaf", "expanded"])
def test_eager_ignores_in_place_backward(expanded: bool, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size."""
    monkeypatch.setattr(cross_entropy_api, "BUILTIN_BELOW", small)
    arguments = good(CE)
    leaf = arguments["input"].requires_grad_()
    logits = leaf[:1].expand(4, 5) if expanded else leaf
    with gk.backend("eager"):
        found = gk.cross_entropy(logits, arguments["target"], inplace_backward=True)
        (grad,) = torch.autograd.grad(found, leaf)
        (expected,) = torch.autograd.grad(gk.cross_entropy(logits, arguments["target"]), leaf)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("name", ["fast", "", "Triton", None, 3])
def test_unknown_backend(name: Any) -> None:
    message = f"backend must be one of 'auto', 'triton', 'eager', got {name!r}"
    with pytest.raises(ValueError, match=message), gk.backend(name):
        pass
    assert gk.cross_entropy(**good(CE)).isfinite()


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    x, latents = torch.randn(4, 5), torch.randn(4, 3)

    def results(number: Callable[[float], Any]) -> Iterator[Tensor]:
        yield gk.vae_loss(x, x.flip(1), latents, latents, beta=number(0.5), free_bits=number(0.25)).loss
        yield gk.js_div_with_logits(x, x.flip(1), beta=number(0.25), temperature=number(2.0))
        yield gk.cross_entropy(x, _labels(0, 1, 2, 3), label_smoothing=number(0.25), softcap=number(4.0))
        yield gk.huber_loss(x, x.flip(1), delta=number(0.5))

    for kind in (numpy.float16, numpy.float32, numpy.float64):
        for found, wanted in zip(results(kind), results(float), strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
    with pytest.raises(TypeError, match="delta must be a number, not bool"):
        gk.huber_loss(x, x, delta=numpy.bool_(True))


def test_refuses_float8() -> None:
    with pytest.raises(NotImplementedError, match=r"input must be .* got torch\.float8_e4m3fn: convert it with \.float\(\)"):
        gk.cross_entropy(_ones(4, 5).to(torch.float8_e4m3fn), _labels(0, 1, 2, 3))


# --- class indices out of range where nothing may look at them --------------------------------------------------------


@contextmanager
def checked_addresses() -> Iterator[None]:
    """Fail at any load or store, by an interpreted kernel, outside of the tensors that the launch was given."""
    import numpy
    from triton.runtime.interpreter import interpreter_builder as builder

    allowed: list[tuple[int, int]] = []

    def flat(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            for item in value:
                yield from flat(item)

    def observe(kernel: Any, programs: int, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
        allowed.clear()
        for tensor in flat((*args, *keywords.values())):
            extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            if tensor.numel():
                allowed.append((tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()))
        return True

    def check(pointers: Any, mask: Any) -> None:
        places = pointers.data[numpy.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(numpy.int64)
        inside = numpy.zeros(places.shape, dtype=bool)
        for low, high in allowed:
            inside |= (places >= low) & (places < high)
        assert inside.all(), f"an access outside of every operand: {places[~inside][:4]} of {allowed}"

    plain_load, plain_store = builder.create_masked_load, builder.create_masked_store

    def load(pointers: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        check(pointers, mask)
        return plain_load(pointers, mask, *rest, **keywords)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        check(pointers, mask)
        return plain_store(pointers, value, mask, *rest, **keywords)

    builder.create_masked_load, builder.create_masked_store = load, store
    try:
        with launch.observe_launches(observe):
            yield
    finally:
        del builder.create_masked_load, builder.create_masked_store


def _negative_log_likelihood(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    return gk.nll_loss(x, target, **options)


Outside = Callable[..., Tensor]

LOSSES: dict[str, tuple[Outside, bool]] = {
    "cross_entropy": (gk.cross_entropy, False),
    "cross_entropy with weights": (gk.cross_entropy, True),
    "cross_entropy with options": (
        lambda x, t, **o: gk.cross_entropy(x, t, label_smoothing=0.1, softcap=5.0, z_loss=0.01, **o),
        True,
    ),
    "cross_entropy with statistics": (lambda x, t, **o: gk.cross_entropy(x, t, return_stats=True, **o).loss, False),
    "nll_loss": (_negative_log_likelihood, False),
    "nll_loss with weights": (_negative_log_likelihood, True),
}

SHAPES = {"rows": (4, 300), "short rows": (4, 7), "classes in dimension 1": (2, 7, 2), "one row": (1, 300)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_labels_out_of_range_on_a_device(loss: str, shape: tuple[int, ...], path: str, device: torch.device) -> None:
    """NaN for that row alone; every other row has the bits that it has beside good labels."""
    function, weighted = LOSSES[loss]
    n_classes, rows_shape = shape[1], (shape[0], *shape[2:])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator).to(device).requires_grad_()
    target = torch.randint(n_classes, rows_shape, generator=generator).to(device)
    if target.numel() > 1:
        target.view(-1)[1] = -100
    options = {"weight": torch.rand(n_classes, generator=generator).to(device) + 0.5} if weighted else {}
    upstream = torch.randn(rows_shape, generator=generator).to(device)

    def run(labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = function(x, labels, reduction="none", **options)
        (grad,) = torch.autograd.grad(rows, x, upstream)
        return rows.detach().view(-1), grad.movedim(1, -1).reshape(-1, n_classes)

    guard = checked_addresses() if path == "triton" and INTERPRETED else gk.backend(path)
    with gk.testing.device_semantics(), guard:
        clean_rows, clean_grad = run(target)
        for bad in (-1, n_classes, n_classes + 1, -(2**40), 2**40):
            labels = target.clone()
            labels.view(-1)[0] = bad
            rows, grad = run(labels)
            assert rows[0].isnan()
            assert grad[0].isnan().all()
            assert torch.equal(rows[1:], clean_rows[1:])
            assert torch.equal(grad[1:], clean_grad[1:])
            for reduction in ("mean", "sum"):
                total = function(x, labels, reduction=reduction, **options)
                assert total.isnan()
                (grad,) = torch.autograd.grad(total, x)
                grad = grad.movedim(1, -1).reshape(-1, n_classes)
                assert grad[0].isnan().all()
                assert grad[1:].isfinite().all()


def test_a_row_that_is_ignored_may_be_out_of_range_on_a_device(path: str, device: torch.device) -> None:
    x = torch.randn(3, 5, device=device).requires_grad_()
    for ignore_index in (-1, 5, 2**40):
        target = torch.tensor([0, ignore_index, 4], device=device)
        with gk.testing.device_semantics():
            found = gk.cross_entropy(x, target, ignore_index=ignore_index)
            (grad,) = torch.autograd.grad(found, x)
        assert found.isfinite()
        assert not grad[1].any()


def test_statistics_of_a_label_out_of_range_on_a_device(path: str, device: torch.device) -> None:
    """NaN where the label counts, and only there."""
    x, target = torch.randn(3, 5, device=device), torch.tensor([0, 7, 4], device=device)
    with gk.testing.device_semantics():
        clean = gk.cross_entropy(x, target.clamp(max=4), reduction="none", return_stats=True)
        found = gk.cross_entropy(x, target, reduction="none", return_stats=True)
    assert found.log_prob.isnan().tolist() == [False, True, False]
    assert found.loss.isnan().tolist() == [False, True, False]
    assert torch.equal(found.entropy, clean.entropy)
    assert torch.equal(found.lse, clean.lse)
    hits = (x.argmax(1) == target).sum()
    assert found.n_correct == hits


def test_the_table_is_read_as_it_was_written() -> None:
    rows = {
        Refusal("a_loss", "input=int64[4]", path, "TypeError", "input must be Tensor | None, not int") for path in BOTH
    } | {Refusal("b_loss", "reduction='average'", "eager", "ValueError", "a message")}
    assert read(table(rows)) == rows
