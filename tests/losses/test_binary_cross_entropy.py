"""Binary cross entropy with logits on both paths against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core import formulas
from genloss_kernels.core.launch import ELEMENTWISE_TILES
from genloss_kernels.losses.binary_cross_entropy import api

from .comparison import DTYPES, HALVES, aligned, check, check_second_derivatives, no_synchronisation, untouched

INF, NAN = math.inf, math.nan
BLOCK = ELEMENTWISE_TILES[4].block

bce = gk.binary_cross_entropy_with_logits


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our operators also where the built-in would be quicker, in blocks that a small test has several of."""
    monkeypatch.setattr(api, "BUILTIN_BELOW", 0)
    monkeypatch.setattr(formulas, "BLOCK_ELEMENTS", 2**7)


def _oracle(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    if mask is not None:
        # Zeros in place of masked elements keep their NaN out of the gradient.
        input, target = torch.where(mask, input, 0.0), torch.where(mask, target, 0.0)
    target = target * (1.0 - label_smoothing) + 0.5 * label_smoothing
    loss = F.binary_cross_entropy_with_logits(input, target, weight, reduction="none", pos_weight=pos_weight)
    kept = torch.ones_like(loss) if mask is None else mask.expand(loss.shape).to(loss)
    loss = loss * kept
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum()


def _arguments(x: Tensor, **options: Any) -> dict[str, Any]:
    """Logits with probabilities in the same layout."""
    return {"input": x, "target": torch.empty_like(x).copy_(torch.rand(x.shape)), **options}


def _weights(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


LAYOUTS = {
    "one element": lambda: aligned(1),
    "no dimension": aligned,
    "less than a block": lambda: aligned(5, 7),
    "one block": lambda: aligned(BLOCK),
    "one block and one more": lambda: aligned(BLOCK + 1),
    "two programs and a tail": lambda: aligned(2, 2 * BLOCK + 37),
    "transposed": lambda: aligned(37, 41).t(),
    "channels last": lambda: aligned(2, 5, 6, 7).contiguous(memory_format=torch.channels_last),
    "sliced": lambda: aligned(9, 140)[1:, 3:130],
    "every other element": lambda: aligned(1500)[::2],
    "misaligned base": lambda: aligned(300, offset=1),
    "permuted": lambda: aligned(4, 5, 6, 7).permute(2, 0, 3, 1),
    "more dimensions than the kernels index": lambda: aligned(4, 4, 4, 4, 3)[::2, :3, ::2, :3],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(path: str, name: str) -> None:
    check(bce, _oracle, _arguments(LAYOUTS[name]()), ("input", "target"))
    check(bce, _oracle, _arguments(LAYOUTS[name](), reduction="none", label_smoothing=0.125), ("input", "target"))


def test_operands_of_different_layouts(path: str) -> None:
    x = aligned(6, 50, 9)
    arguments = {
        "input": x.transpose(0, 1).contiguous().transpose(0, 1),
        "target": torch.rand(6, 100, 9)[:, ::2],
        "weight": _weights(9, 50, 6).permute(2, 1, 0),
        "pos_weight": _weights(6, 50, 9),
        "mask": torch.rand(9, 6, 50).permute(1, 2, 0) < 0.7,
    }
    for reduction in ("mean", "none"):
        check(bce, _oracle, arguments | {"reduction": reduction}, ("input", "target"))


# Shape of the input, of weight, and of pos_weight.
BROADCASTS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]] = {
    "pos_weight[C]": ((9, 257), None, (257,)),
    "pos_weight[C] of a power of two": ((9, 256), None, (256,)),
    "pos_weight[C], a block long": ((3, BLOCK), None, (BLOCK,)),
    "pos_weight[C], longer than a block": ((3, BLOCK + 77), None, (BLOCK + 77,)),
    "pos_weight[1]": ((9, 31), None, (1,)),
    "pos_weight[]": ((9, 31), None, ()),
    "pos_weight[C, 1, 1]": ((3, 5, 6, 7), None, (5, 1, 1)),
    "weight[N, 1]": ((40, 33), (40, 1), None),
    "weight[N, 1], rows longer than a block": ((3, BLOCK + 3), (3, 1), None),
    "weight[N, C]": ((40, 33), (40, 33), None),
    "weight[N, 1, 1, 1] and pos_weight[C, 1, 1]": ((3, 5, 6, 7), (3, 1, 1, 1), (5, 1, 1)),
    "weight[1, H, 1] and pos_weight[W]": ((5, 30, 21), (1, 30, 1), (21,)),
    "a dimension of one": ((40, 1, 33), (40, 1, 1), (33,)),
    "five dimensions by turns": ((2, 3, 4, 5, 6), (2, 1, 4, 1, 6), (3, 1, 5, 1)),
    "weight[N, 1] over small rows": ((700, 3), (700, 1), (3,)),
    "a long dimension before a short one": ((2, BLOCK + 9, 3), (BLOCK + 9, 1), (2, 1, 1)),
}


@pytest.mark.parametrize("name", BROADCASTS)
def test_broadcast_weights(path: str, name: str) -> None:
    shape, weight, pos_weight = BROADCASTS[name]
    weights = {"weight": weight, "pos_weight": pos_weight}
    given = {key: _weights(*size) for key, size in weights.items() if size is not None}
    arguments = _arguments(aligned(*shape), **given)
    check(bce, _oracle, arguments, ("input", "target"))
    check(bce, _oracle, arguments | {"reduction": "none"}, ("input",))


def test_broadcast_weights_of_a_permuted_input(path: str) -> None:
    x = aligned(3, 5, 6, 7).contiguous(memory_format=torch.channels_last)
    check(bce, _oracle, _arguments(x, weight=_weights(3, 1, 1, 1), pos_weight=_weights(5, 1, 1)), ("input", "target"))
    check(bce, _oracle, _arguments(aligned(BLOCK + 5, 3).t(), pos_weight=_weights(BLOCK + 5)), ("input", "target"))


def test_expanded_input(path: str) -> None:
    def expanded(function: Any) -> Any:
        return lambda input, target: function(input.expand(6, 200), target.expand(6, 200))

    for shapes in (((1, 200), (6, 200)), ((6, 1), (6, 200)), ((6, 1), (1, 200)), ((1, 1), (1, 1))):
        arguments = {"input": aligned(*shapes[0]), "target": torch.rand(shapes[1])}
        check(expanded(bce), expanded(_oracle), arguments, ("input", "target"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(path: str, dtype: torch.dtype) -> None:
    x = aligned(5, ELEMENTWISE_TILES[x_size(dtype)].block - 1, dtype=dtype)
    weights = {"weight": _weights(5, 1).to(dtype), "pos_weight": _weights(x.size(1)).to(dtype)}
    for options in ({}, {"reduction": "none", "label_smoothing": 0.125}):
        check(bce, _oracle, _arguments(x, **weights, **options), ("input", "target"))


def x_size(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def test_dtypes_promote(path: str) -> None:
    x = aligned(3, 50, dtype=torch.bfloat16)
    arguments = {"input": x, "target": torch.rand(3, 50)}
    check(bce, _oracle, arguments, ("input", "target"), dtype=torch.float32)
    # Not from bf16: the interpreter stores nothing right there that is in fp64.
    arguments = _arguments(x.float(), pos_weight=_weights(50).double())
    check(bce, _oracle, arguments, ("input", "target"), dtype=torch.float64)
    arguments = _arguments(x, weight=_weights(50).to(torch.bfloat16))
    check(bce, _oracle, arguments, dtype=torch.bfloat16)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["plain", "smoothing", "smoothing of 1", "mask", "everything"])
def test_option(path: str, name: str, reduction: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "smoothing": {"label_smoothing": 0.2},
        "smoothing of 1": {"label_smoothing": 1.0},
        "mask": {"mask": torch.rand(33, 51) < 0.5},
        "everything": {
            "label_smoothing": 0.2,
            "mask": torch.rand(51) < 0.5,
            "weight": _weights(33, 1),
            "pos_weight": _weights(51),
        },
    }
    check(bce, _oracle, _arguments(aligned(33, 51), reduction=reduction, **options[name]), ("input", "target"))


def test_gradient_of_the_target_keeps_its_digits_at_small_logits(path: str) -> None:
    """It is -x as torch's, and not the difference of two logarithms."""
    x = aligned(33, 51) * 2.0**-10
    check(bce, _oracle, _arguments(x, reduction="none", label_smoothing=0.125, weight=_weights(51)), ("target",))
    target = torch.rand(33, 51).requires_grad_()
    (slope,) = torch.autograd.grad(bce(x, target, reduction="sum", pos_weight=torch.ones(51)), target)
    assert torch.equal(slope, -x)


def test_only_the_target_has_a_gradient(path: str) -> None:
    check(bce, _oracle, _arguments(aligned(33, 51), label_smoothing=0.2, weight=_weights(51)), ("target",))


@pytest.mark.parametrize("mask", [(9, 50), (50,), (9, 1), (1,), ()])
def test_mask_hides_anything(path: str, mask: tuple[int, ...]) -> None:
    """NaN and infinities under the mask, which may broadcast; the mean counts each element that is left."""
    kept = torch.rand(mask) < 0.6
    kept.view(-1)[0] = True
    hidden = ~kept.expand(9, 50)
    arguments = _arguments(aligned(9, 50), mask=kept, weight=_weights(9, 50), pos_weight=_weights(9, 50))
    clean = {name: value.clone() for name, value in arguments.items() if name != "mask"}
    for name, value in clean.items():
        value[hidden] = INF if name == "input" else NAN
    for reduction in ("mean", "sum", "none"):
        tensors = []
        for given in (arguments, arguments | clean):
            leaves = {n: v.clone().requires_grad_(n in ("input", "target")) for n, v in given.items()}
            loss = bce(**leaves, reduction=reduction)
            tensors.append([loss, *torch.autograd.grad(loss.sum(), (leaves["input"], leaves["target"]))])
        for plain, poisoned in zip(*tensors, strict=True):
            torch.testing.assert_close(plain, poisoned)
            assert plain.dim() == 0 or not poisoned[hidden].any()
        check(bce, _oracle, arguments | {"reduction": reduction}, ("input", "target"))


def test_everything_masked(path: str) -> None:
    x = aligned(9, 50).requires_grad_()
    mask = torch.zeros(50, dtype=torch.bool)
    target = torch.rand(9, 50)
    loss = bce(x, target, mask=mask)
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, x)
    assert not grad.nan_to_num().any()
    for reduction in ("sum", "none"):
        loss = bce(x, target, mask=mask, reduction=reduction)
        assert not loss.any()
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert not grad.any()


def test_upstream_of_any_layout(path: str) -> None:
    x = aligned(9, 50)
    column, full = torch.rand(9, 1), torch.rand(50, 9).t()
    for combine in (lambda e: (e * column).sum(), lambda e: (e * full).sum(), lambda e: e.sum(), lambda e: e.sum(1)):
        check(
            lambda combine=combine, **given: combine(bce(**given, reduction="none")),
            lambda combine=combine, **given: combine(_oracle(**given, reduction="none")),
            _arguments(x),
            ("input", "target"),
        )


def test_result_has_the_inputs_layout(path: str) -> None:
    x = aligned(6, 30).t().requires_grad_()
    loss = bce(x, torch.rand(6, 30).t(), reduction="none")
    assert loss.shape == (30, 6)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_empty(name: str, reduction: str) -> None:
    for shape in ((0,), (3, 0), (0, 4)):
        x = torch.zeros(shape, requires_grad=True)
        with gk.backend(name):
            loss = bce(x, torch.zeros(shape), reduction=reduction, pos_weight=torch.ones(shape[-1]))
            masked = bce(x, torch.zeros(shape), reduction=reduction, mask=torch.ones((), dtype=torch.bool))
        wanted = F.binary_cross_entropy_with_logits(x, torch.zeros(shape), reduction=reduction)
        torch.testing.assert_close(loss, wanted, equal_nan=True)
        torch.testing.assert_close(masked, wanted, equal_nan=True)
        loss.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape


def test_known_failure_infinite_logits(path: str) -> None:
    """0 * inf made NaN of a loss that is 0 or inf (pytorch #102894)."""
    x = torch.tensor([INF, -INF, INF, -INF, INF, -INF, 0.0], requires_grad=True)
    t = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 1.0])
    wanted = [0.0, 0.0, INF, INF, INF, INF]
    for options in ({}, {"weight": torch.full((7,), 2.0)}, {"pos_weight": torch.tensor(3.0)}, {"mask": t >= 0.0}):
        loss = bce(x, t, reduction="none", **options)
        assert loss[:6].tolist() == wanted
        assert loss[6].isfinite()
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert not grad.isnan().any()
        assert grad[:2].tolist() == [0.0, 0.0]
        assert grad[2] > 0.0 > grad[3]
        assert bce(x, t, **options) == INF
        assert bce(x[:2], t[:2], **{k: v[:2] if v.dim() else v for k, v in options.items()}) == 0.0
    assert not bce(x, t, torch.zeros(7), reduction="none").any()
    assert bce(x[1:4:2], torch.ones(2), pos_weight=torch.zeros(2), reduction="none").tolist() == [0.0, 0.0]
    assert bce(x, t, label_smoothing=0.1, reduction="none")[:6].tolist() == [INF] * 6
    x, t = x.detach(), t.clone().requires_grad_()
    (grad,) = torch.autograd.grad(bce(x, t, reduction="none").sum(), t)
    assert grad[:4].tolist() == [-INF, INF, -INF, INF]


@pytest.mark.parametrize("weighted", [False, True])
def test_known_failure_small_losses(path: str, weighted: bool) -> None:
    """log(1 + exp(-x)) without log1p is 0 from x = 17 on (FlagGems): all digits down to exp(-80)."""
    x = torch.linspace(10.0, 80.0, 600)
    weights = {"pos_weight": _weights(600), "weight": _weights(600)} if weighted else {}
    arguments = {"target": torch.ones(600), "reduction": "none", **weights}
    assert (check(bce, _oracle, {"input": x, **arguments}) > 0.0).all()
    check(bce, _oracle, {"input": -x, **arguments, "target": torch.zeros(600)})


def test_weights_of_integers(path: str) -> None:
    given = _arguments(aligned(5, 7), weight=torch.arange(7), pos_weight=torch.tensor([3]))
    check(bce, _oracle, given)


def test_large_logits(path: str) -> None:
    x = torch.cat([torch.linspace(-1e4, 1e4, 301), torch.tensor([3e38, -3e38, 0.0, -0.0, 1e-38, 1e-45])])
    for target in (torch.rand(307), torch.zeros(307), torch.ones(307)):
        check(bce, _oracle, {"input": x, "target": target, "reduction": "none"}, ("input", "target"))
    for dtype in HALVES:
        half = torch.linspace(-6e4, 6e4, 301).to(dtype)
        check(bce, _oracle, _arguments(half, reduction="none"), ("input", "target"))


def test_known_failure_first_rows_upstream_gradient(path: str) -> None:
    """With reduction="none" the first row's upstream gradient served every row (Liger #968, #1298)."""
    x = aligned(4, 50).requires_grad_()
    rows = bce(x, torch.zeros(4, 50), reduction="none")
    (ones,) = torch.autograd.grad(rows, x, torch.ones_like(rows), retain_graph=True)
    factors = 2.0 ** torch.arange(200.0).view(4, 50).remainder(20.0)
    (grad,) = torch.autograd.grad(rows, x, factors)
    assert torch.equal(grad, ones * factors)


def test_known_failure_backward_skipped_at_upstream_1(path: str) -> None:
    """A backward that did nothing at an upstream gradient of 1 hid that gradients vanished (TransformerEngine #2139)."""
    x, target = aligned(4, 64).requires_grad_(), torch.rand(4, 64)
    loss = bce(x, target)
    one, two, none = (
        torch.autograd.grad(loss, x, upstream, retain_graph=True)[0]
        for upstream in (None, torch.full((), 2.0), torch.zeros(()))
    )
    torch.testing.assert_close(one, torch.autograd.grad(F.binary_cross_entropy_with_logits(x, target), x)[0])
    assert torch.equal(two, 2.0 * one)
    assert not none.any()


def test_known_failure_overwritten_logits(path: str) -> None:
    """The caller's logits were overwritten; a second backward was scaled twice (Liger)."""
    x, target = aligned(4, 50).requires_grad_(), torch.rand(4, 50)
    before, version = x.detach().clone(), x._version
    loss = 3.0 * bce(x, target)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, second)
    assert torch.equal(x.detach(), before)
    assert x._version == version


@pytest.mark.parametrize("masked", [False, True])
def test_known_failure_retained_graph_and_double_backward(path: str, masked: bool) -> None:
    """retain_graph failed, and a second derivative was silently wrong (QuACK #209, Liger JSD)."""
    x, t = aligned(3, 50), torch.rand(3, 50)
    options: dict[str, Any] = {"weight": _weights(3, 1), "pos_weight": _weights(50), "label_smoothing": 0.125}
    if masked:
        options["mask"] = torch.rand(3, 50) < 0.5
    both = ("input", "target")
    for reduction in ("mean", "sum", "none"):
        arguments = {"input": x, "target": t, "reduction": reduction, **options}
        check_second_derivatives(bce, _oracle, arguments, both)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["rows", "columns", "broadcast weight"])
def test_known_failure_int32_offsets(name: str) -> None:
    """Elements past 2**31 were addressed modulo 2**32 (pytorch #111484, fla #1080, trl #7266)."""
    size, stride = {"columns": ((5, 3), (1, 2**30))}.get(name, ((4, 5), (2**30, 1)))
    extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    x = untouched(2**32 + extent).as_strided(size, stride, 2**32)
    values = aligned(*size, dtype=torch.bfloat16)
    x.copy_(values)
    weights = {"pos_weight": _weights(size[1]).bfloat16()} if name == "broadcast weight" else {}
    target = torch.rand(size).bfloat16()
    with gk.backend("triton"):
        for reduction in ("none", "sum"):
            loss = bce(x, target, reduction=reduction, **weights)
            assert torch.equal(loss, bce(values, target, reduction=reduction, **weights))


@pytest.mark.interpreter
@pytest.mark.parametrize("masked", [False, True])
def test_known_failure_host_synchronisation(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step waited for the device to read a value (.item(), torch.equal; Liger)."""
    x = aligned(5, 50).requires_grad_()
    arguments = _arguments(x.detach(), pos_weight=_weights(50), mask=torch.rand(50) < 0.5 if masked else None)
    arguments["input"] = x
    with gk.backend("triton"), gk.testing.count_launches() as launches, no_synchronisation(monkeypatch):
        bce(**arguments).backward()
    assert launches.total() == 3


def test_builtin_where_it_is_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs of one wide dtype, without what torch lacks; infinite logits do not keep its NaN."""
    calls: list[int] = []
    builtin = api.torch_loss_of_logits
    monkeypatch.setattr(api, "BUILTIN_BELOW", 1024)
    monkeypatch.setattr(api, "torch_loss_of_logits", lambda x, *a, **k: calls.append(x.numel()) or builtin(x, *a, **k))
    for dtype in (torch.float32, torch.float64):
        x = aligned(33, 31, dtype=dtype)
        for reduction in ("mean", "sum", "none"):
            given = _arguments(x, weight=_weights(31).to(dtype), pos_weight=_weights(31).to(dtype), reduction=reduction)
            check(bce, _oracle, given, ("input", "target"))
    assert calls == [1023] * 6
    infinite, hard = torch.tensor([INF, -INF]), torch.tensor([1.0, 0.0])
    for reduction, wanted in (("mean", 0.0), ("sum", 0.0), ("none", [0.0, 0.0])):
        assert bce(infinite, hard, reduction=reduction).tolist() == wanted
    calls.clear()
    bce(torch.zeros(1024), torch.zeros(1024))
    bce(torch.zeros(9), torch.zeros(9).double())
    bce(torch.zeros(9), torch.zeros(9), mask=torch.ones(9, dtype=torch.bool))
    bce(torch.zeros(9), torch.zeros(9), label_smoothing=0.1)
    assert calls == []


def test_same_bits_every_time(path: str) -> None:
    """Partial sums are added in a fixed order."""
    arguments = _arguments(aligned(3, 3 * BLOCK))
    assert len({bce(**arguments).item() for _ in range(2)}) == 1


@pytest.mark.parametrize("weights", [{"weight": torch.zeros(1)}, {"pos_weight": torch.zeros(1)}, {}])
def test_a_coefficient_of_0_does_not_hide_nan(path: str, weights: dict[str, Tensor]) -> None:
    for target in (0.0, 1.0):
        x = torch.full((1,), math.nan)
        assert gk.binary_cross_entropy_with_logits(x, torch.full((1,), target), reduction="none", **weights).isnan()
