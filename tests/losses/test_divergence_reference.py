"""The divergences' references against torch.distributions, values worked by hand, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Categorical, kl_divergence

from genloss_kernels.losses.divergence import reference
from genloss_kernels.losses.divergence.reference import Kind, Options

KINDS = list(Kind)


def _logits(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * 2.0


def _by_distributions(input: Tensor, target: Tensor, options: Options) -> Tensor:
    student, teacher = (Categorical(logits=x / options.temperature) for x in (input, target))
    if options.kind == Kind.ENTROPY:
        return Categorical(logits=input).entropy()
    scale = options.temperature**2
    if options.kind == Kind.FORWARD_KL:
        return scale * kl_divergence(teacher, student)
    if options.kind == Kind.REVERSE_KL:
        return scale * kl_divergence(student, teacher)
    mixture = Categorical(probs=options.beta * teacher.probs + (1.0 - options.beta) * student.probs)
    of_teacher, of_student = kl_divergence(teacher, mixture), kl_divergence(student, mixture)
    return scale * (options.beta * of_teacher + (1.0 - options.beta) * of_student)


def _rows(input: Tensor, target: Tensor, options: Options) -> Tensor:
    return reference.rows(input, None if options.kind == Kind.ENTROPY else target, options)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_against_distributions(kind: Kind, temperature: float) -> None:
    options = Options(kind, 1.0 if kind == Kind.ENTROPY else temperature, 0.3)
    input, target = _logits(3, 4, 7), _logits(3, 4, 7)
    torch.testing.assert_close(_rows(input, target, options), _by_distributions(input, target, options))


def test_values_worked_by_hand() -> None:
    # Probabilities 1/2, 1/2 and 1/4, 3/4.
    student, teacher = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 3.0]).log()
    wanted = {
        Kind.FORWARD_KL: 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
        Kind.REVERSE_KL: 0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0),
        Kind.JS: 0.125 * math.log(2 / 3) + 0.375 * math.log(1.2) + 0.25 * math.log(4 / 3) + 0.25 * math.log(0.8),
        Kind.ENTROPY: math.log(2.0),
    }
    for kind, value in wanted.items():
        assert _rows(student, teacher, Options(kind)).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.875])
@pytest.mark.parametrize("kind", [Kind.FORWARD_KL, Kind.REVERSE_KL, Kind.JS])
def test_equal_logits_give_0(kind: Kind, beta: float) -> None:
    """Nothing at all, where logaddexp gave a mixture that was off by a last place."""
    logits = _logits(20, 17)
    assert not _rows(logits, logits.clone(), Options(kind, 1.0, beta)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: Kind) -> None:
    tensors = [_logits(2, 4).requires_grad_() for _ in range(1 if kind == Kind.ENTROPY else 2)]
    # Classes without mass on one side and on both.
    masks = torch.tensor([[False, False, True, False], [False, False, True, True]])

    def loss(input: Tensor, target: Tensor | None = None) -> Tensor:
        input = input.masked_fill(masks[0], -math.inf)
        if target is not None and kind != Kind.FORWARD_KL:
            target = target.masked_fill(masks[0], -math.inf)
        elif target is not None:
            target = target.masked_fill(masks[1], -math.inf)
        return reference.rows(input, target, Options(kind, 1.5, 0.3))

    assert gradcheck(loss, tensors)
    assert gradgradcheck(loss, tensors)


@pytest.mark.parametrize("kind", [Kind.FORWARD_KL, Kind.REVERSE_KL, Kind.JS])
def test_close_distributions_keep_their_digits(kind: Kind) -> None:
    """In fp32 log-probabilities near -10 are off by 1e-6, as much as these divergences are large."""
    teacher = torch.randn(3, 1000) * 3.0
    student = teacher + 1e-3 * torch.randn(3, 1000)
    found = reference.rows(student, teacher, Options(kind))
    wanted = reference.rows(student.double(), teacher.double(), Options(kind))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0.0)
