"""The plain PyTorch form of cross entropy, against torch, values worked by hand and finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genloss_kernels.core.reduction import Reduction
from genloss_kernels.losses.cross_entropy import reference
from genloss_kernels.losses.cross_entropy.reference import Options

from .comparison import check

INF, NAN = math.inf, math.nan
REDUCTIONS = {"none": Reduction.NONE, "mean": Reduction.MEAN, "sum": Reduction.SUM}


def _loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    divisor: Tensor | None = None,
    *,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    return reference.cross_entropy(
        input, target, weight, row_weight, divisor, Options(reduction=REDUCTIONS[reduction], **options)
    )[0]


def _rows(input: list[list[float]], target: Any, **options: Any) -> reference.Rows:
    tensors = {k: torch.tensor(options.pop(k), dtype=torch.float64) for k in ("weight", "row_weight") if k in options}
    return reference.cross_entropy(
        torch.tensor(input, dtype=torch.float64), torch.tensor(target), tensors.get("weight"), tensors.get("row_weight"),
        None, Options(stats=True, reduction=Reduction.NONE, **options),
    )[1]  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 2, 4), (4, 1)])
def test_agrees_with_torch(shape: tuple[int, ...], weighted: bool, smoothing: float, reduction: str) -> None:
    logits = torch.randn(shape, dtype=torch.float64)
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
    if weighted:
        options["weight"] = torch.rand(shape[1], dtype=torch.float64) + 0.5
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target.view(-1)[1] = -100
    check(_loss, F.cross_entropy, {"input": logits, "target": target, **options})
    check(_loss, F.cross_entropy, {"input": logits, "target": target.clamp(min=0), "ignore_index": 1, **options})
    probabilities = {"input": logits, "target": torch.rand(shape, dtype=torch.float64), **options}
    check(_loss, F.cross_entropy, probabilities, ("input", "target"))


def test_arithmetic_is_in_fp32_for_halves() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loss = _loss(torch.randn(3, 4, dtype=dtype), torch.tensor([0, 1, 2]))
        assert loss.dtype == torch.float32
    assert _loss(torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])).dtype == torch.float64


def test_by_hand() -> None:
    """Logits (0, log 3): probabilities 1/4 and 3/4, lse log 4."""
    x, log4 = [[0.0, math.log(3.0)]] * 2, math.log(4.0)
    first, second = log4, math.log(4.0 / 3.0)
    entropy = 0.25 * first + 0.75 * second

    def loss(**options: Any) -> list[float]:
        return _rows(x, [0, 1], **options).loss.tolist()

    assert loss() == pytest.approx([first, second])
    spread = 0.5 * (first + second)
    assert loss(label_smoothing=0.2) == pytest.approx([0.8 * first + 0.2 * spread, 0.8 * second + 0.2 * spread])
    assert loss(weight=[2.0, 5.0]) == pytest.approx([2.0 * first, 5.0 * second])
    spread = 0.5 * (2.0 * first + 5.0 * second)
    assert loss(weight=[2.0, 5.0], label_smoothing=0.2) == pytest.approx(
        [1.6 * first + 0.2 * spread, 4.0 * second + 0.2 * spread]
    )
    assert loss(z_loss=0.5) == pytest.approx([first + 0.5 * log4**2, second + 0.5 * log4**2])
    # The class weight is not the z-loss's, the row weight is.
    assert loss(z_loss=0.5, weight=[2.0, 5.0])[0] == pytest.approx(2.0 * first + 0.5 * log4**2)
    assert loss(z_loss=0.5, row_weight=[3.0, 0.0]) == pytest.approx([3.0 * (first + 0.5 * log4**2), 0.0])
    assert loss(logit_scale=2.0) == pytest.approx([math.log(10.0), math.log(10.0 / 9.0)])
    rows = _rows(x, [0, 1], row_weight=[3.0, 7.0], weight=[2.0, 5.0], label_smoothing=0.2, z_loss=0.5)
    assert rows.normalizer.tolist() == [6.0, 35.0]
    # Statistics are without weights, smoothing and z-loss.
    assert rows.lse.tolist() == pytest.approx([log4, log4])
    assert rows.log_prob.tolist() == pytest.approx([-first, -second])
    assert rows.entropy.tolist() == pytest.approx([entropy, entropy])
    assert rows.valid.tolist() == [True, True]
    assert rows.correct.tolist() == [False, True]


def test_softcap_by_hand() -> None:
    """2 tanh(x / 2) at x = 2 atanh(1/2) is 1; the scale comes before it."""
    x = 2.0 * math.atanh(0.5)
    wanted = math.log(math.e + 1.0)
    assert _rows([[x, 0.0]], [1], softcap=2.0).loss.item() == pytest.approx(wanted)
    assert _rows([[x / 4.0, 0.0]], [1], softcap=2.0, logit_scale=4.0).loss.item() == pytest.approx(wanted)


def test_probabilities_by_hand() -> None:
    log_p = [-math.log(4.0), math.log(3.0 / 4.0)]
    target, weight = [0.4, 0.8], [2.0, 5.0]
    x = [[0.0, math.log(3.0)]]
    plain = -sum(t * lp for t, lp in zip(target, log_p, strict=True))
    rows = _rows(x, [target])
    assert rows.loss.item() == pytest.approx(plain)
    assert rows.log_prob.item() == pytest.approx(-plain)
    smooth = -sum((0.8 * t + 0.1) * w * lp for t, w, lp in zip(target, weight, log_p, strict=True))
    rows = _rows(x, [target], weight=weight, label_smoothing=0.2)
    assert rows.loss.item() == pytest.approx(smooth)
    assert rows.log_prob.item() == pytest.approx(-plain)
    assert rows.normalizer.item() == 1.0
    assert rows.correct.item()
    assert not _rows(x, [target[::-1]]).correct.item()


def test_reductions_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]] * 3, dtype=torch.float64)
    target, weight = torch.tensor([0, -100, 1]), torch.tensor([2.0, 5.0], dtype=torch.float64)
    row_weight = torch.tensor([1.0, 9.0, 3.0], dtype=torch.float64)
    total = 2.0 * math.log(4.0) + 15.0 * math.log(4.0 / 3.0)
    arguments = (logits, target, weight, row_weight)
    assert _loss(*arguments, reduction="sum").item() == pytest.approx(total)
    assert _loss(*arguments).item() == pytest.approx(total / 17.0)
    assert _loss(*arguments, divisor=torch.tensor(4.0)).item() == pytest.approx(total / 4.0)
    options = Options(divisor=8.0)
    assert reference.cross_entropy(*arguments, None, options)[0].item() == pytest.approx(total / 8.0)
    # A tensor goes before a number.
    assert reference.cross_entropy(*arguments, torch.tensor(4.0), options)[0].item() == pytest.approx(total / 4.0)


def test_statistics() -> None:
    rows = _rows(
        [[1.0] * 5, [0.0, 0.0, 700.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0, NAN], [9.0] * 5], [1, 2, 0, -1], ignore_index=-1
    )
    assert rows.entropy[:2].tolist() == pytest.approx([math.log(5.0), 0.0])
    assert rows.lse[:2].tolist() == pytest.approx([1.0 + math.log(5.0), 700.0])
    # Ties go to the lowest index; a row of NaN has no largest; an ignored row has nothing.
    assert rows.correct.tolist() == [False, True, False, False]
    assert rows.valid.tolist() == [True, True, True, False]
    assert [r[3].item() for r in rows] == [0.0] * 5 + [False, False]
    assert rows.loss[2].isnan()


def test_labels() -> None:
    index, valid, outside = reference.labels(torch.tensor([0, 4, 5, -1, -100], dtype=torch.int64), 5, -100)
    assert index.tolist() == [0, 4, 0, 0, 0]
    assert valid.tolist() == [True, True, True, True, False]
    assert outside.tolist() == [False, False, True, True, False]
    index, valid, _ = reference.labels(torch.tensor([255, 3], dtype=torch.uint8), 5, 255)
    assert index.dtype == torch.int64
    assert valid.tolist() == [False, True]


def test_labels_out_of_range_give_nan() -> None:
    rows = _rows([[0.0, 1.0]] * 3, [2, -1, 1], weight=[2.0, 5.0])
    assert rows.loss.isnan().tolist() == [True, True, False]
    assert rows.log_prob.isnan().tolist() == [True, True, False]


def test_nothing_of_ignored_rows_reaches_a_derivative() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64)
    logits[1] = NAN
    logits.requires_grad_()
    loss = _loss(logits, torch.tensor([0, -100, 2]), z_loss=0.1, label_smoothing=0.1)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), logits)
    assert grad.isfinite().all()
    assert second.isfinite().all()
    assert not grad[1].any()
    assert not second[1].any()


def test_entropy_of_impossible_classes() -> None:
    """0 * log 0 counts as 0 in the entropy and in both its derivatives."""
    logits = torch.randn(2, 4, dtype=torch.float64)
    logits[0, 2] = -INF
    logits.requires_grad_()
    rows = reference.rows(logits, torch.tensor([0, 1]), None, None, Options(stats=True))
    few = logits.detach()[:1, [0, 1, 3]].requires_grad_()
    wanted = torch.distributions.Categorical(logits=few).entropy()
    torch.testing.assert_close(rows.entropy[:1], wanted)
    (grad,) = torch.autograd.grad(rows.entropy[0], logits)
    torch.testing.assert_close(grad[0, [0, 1, 3]], torch.autograd.grad(wanted.sum(), few)[0][0])
    assert grad[0, 2] == 0.0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("probabilities", [False, True])
def test_derivatives(probabilities: bool, reduction: str) -> None:
    """First and second derivatives of every option at once, in every differentiable argument."""
    shape = (3, 4, 2)
    target = torch.rand(shape).double().requires_grad_() if probabilities else torch.tensor([[0, 1], [-100, 3], [2, 2]])
    tensors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True),
        target,
        (torch.rand(4, dtype=torch.float64) + 0.5).requires_grad_(probabilities),
        (torch.rand(3, 2, dtype=torch.float64) + 0.5).requires_grad_(),
        torch.tensor(2.5, dtype=torch.float64, requires_grad=True) if reduction == "mean" else None,
    ]
    options = {"label_smoothing": 0.1, "softcap": 2.0, "logit_scale": 0.7, "z_loss": 0.3, "reduction": reduction}

    def function(*given: Tensor) -> Tensor:
        return _loss(*given, **options)

    given = tuple(t for t in tensors if t is not None)
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("output", ["lse", "log_prob", "entropy"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_derivatives_of_statistics(probabilities: bool, output: str) -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.rand(3, 4).double().requires_grad_() if probabilities else torch.tensor([0, -100, 3])
    options = Options(stats=True, softcap=2.0, logit_scale=0.7)

    def function(logits: Tensor, target: Tensor) -> Tensor:
        return getattr(reference.rows(logits, target, None, None, options), output)

    assert torch.autograd.gradcheck(function, (logits, target))
    assert torch.autograd.gradgradcheck(function, (logits, target))
