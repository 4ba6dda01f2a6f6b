"""Adversarial losses and gradient penalties on both paths against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.cases.adversarial import (
    GAN_KINDS,
    gan_discriminator_loss_oracle,
    gan_generator_loss_oracle,
    gradient_penalty_oracle,
    r1_penalty_oracle,
)
from genloss_kernels.losses.adversarial import api

from ..refusals import refused
from .comparison import DTYPES, check

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our operators also where plain ones would be quicker."""
    monkeypatch.setattr(api, "PLAIN_BELOW", 0)
    monkeypatch.setattr(api, "NORMS_BELOW", 0)


def _sides(kind: str, dtype: torch.dtype = torch.float32, *, equal: bool = False) -> dict[str, Any]:
    fake = (7, 5) if equal or kind == "relativistic" else (11, 3, 2)
    return {"real": (torch.randn(7, 5) * 3.0).to(dtype), "fake": (torch.randn(fake) * 3.0).to(dtype), "kind": kind}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GAN_KINDS)
def test_discriminator(path: str, kind: str, dtype: torch.dtype) -> None:
    both = ("real", "fake")
    for reduction in ("mean", "sum"):
        arguments = _sides(kind, dtype) | {"reduction": reduction}
        check(gk.gan_discriminator_loss, gan_discriminator_loss_oracle, arguments, both)
    arguments = _sides(kind, dtype, equal=True) | {"reduction": "none"}
    check(gk.gan_discriminator_loss, gan_discriminator_loss_oracle, arguments, both)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GAN_KINDS)
def test_generator(path: str, kind: str, dtype: torch.dtype) -> None:
    arguments = _sides(kind, dtype)
    names = ("fake", "real") if kind == "relativistic" else ("fake",)
    arguments = {name: arguments[name] for name in (*names, "kind")}
    for reduction in ("mean", "sum", "none"):
        check(gk.gan_generator_loss, gan_generator_loss_oracle, arguments | {"reduction": reduction}, names)


# Loss of the scores, and its gradient: of real ones, of fake ones, for the generator.
SURE = {
    "minimax": {-1e4: (1e4, -1.0, 0.0, 0.0, 0.0, 0.0), 1e4: (0.0, 0.0, 1e4, 1.0, -1e4, -1.0)},
    "non_saturating": {-1e4: (1e4, -1.0, 0.0, 0.0, 1e4, -1.0), 1e4: (0.0, 0.0, 1e4, 1.0, 0.0, 0.0)},
    "hinge": {-1e4: (10001.0, -1.0, 0.0, 0.0, 1e4, -1.0), 1e4: (0.0, 0.0, 10001.0, 1.0, -1e4, -1.0)},
}


@pytest.mark.parametrize("kind", SURE)
def test_sure_scores(path: str, kind: str) -> None:
    for size in (1e4, INF):
        for sign in (-1.0, 1.0):
            expected = torch.tensor(SURE[kind][sign * 1e4]) if size == 1e4 else torch.tensor(SURE[kind][sign * 1e4]) * 1.0
            if size == INF:
                expected = torch.where(expected.abs() > 1e3, expected.sign() * INF, expected)
            score = torch.tensor([sign * size], requires_grad=True)
            sides = [
                gk.gan_discriminator_loss(score, torch.tensor([-INF if kind != "lsgan" else 0.0]), kind),
                gk.gan_discriminator_loss(torch.tensor([INF]), score, kind),
                gk.gan_generator_loss(score, kind),
            ]
            found = [number for side in sides for number in (side.detach(), *torch.autograd.grad(side, score))]
            assert [float(number) for number in found] == expected.tolist()


def test_small_losses_keep_their_digits(path: str) -> None:
    """Where the discriminator is sure, 1e-13 and not 0."""
    loss = gk.gan_discriminator_loss(torch.tensor([30.0]), torch.tensor([-30.0]))
    assert loss.item() == pytest.approx(2.0 * math.exp(-30.0), rel=1e-6)


def test_hinge_at_its_margins(path: str) -> None:
    real, fake = torch.tensor([1.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    loss = gk.gan_discriminator_loss(real, fake, "hinge")
    assert loss == 0.0
    assert torch.autograd.grad(loss, (real, fake)) == (torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("below", [0, 2**13])
def test_known_failure_hinge_at_nan(path: str, below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's relu has it: the gradient was 0 by blocks."""
    monkeypatch.setattr(api, "PLAIN_BELOW", below)
    for reduction in ("none", "sum"):
        real, fake = (torch.full((2, 3), NAN, requires_grad=True) for _ in range(2))
        loss = gk.gan_discriminator_loss(real, fake, "hinge", reduction=reduction)
        of_real, of_fake = torch.autograd.grad(loss.sum(), (real, fake))
        assert loss.isnan().all()
        assert (of_real == -1.0).all()
        assert (of_fake == 1.0).all()


@pytest.mark.parametrize("below", [0, 2**13])
def test_known_failure_squares_that_overflow(path: str, below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So did twice the score, of which half is the gradient."""
    monkeypatch.setattr(api, "PLAIN_BELOW", below)
    for reduction in ("none", "sum"):
        real, fake = (torch.full((2, 3), 3e38, requires_grad=True) for _ in range(2))
        loss = gk.gan_discriminator_loss(real, fake, "lsgan", reduction=reduction)
        assert (loss == INF).all()
        for gradient in torch.autograd.grad(loss.sum(), (real, fake)):
            torch.testing.assert_close(gradient, torch.full((2, 3), 3e38))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (3, 2, 5, 7), (2, 5003), (4,)])
def test_penalties(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grad = torch.randn(shape).to(dtype)
    oracles = {"gradient_penalty": gradient_penalty_oracle, "r1_penalty": r1_penalty_oracle}
    for name, oracle in oracles.items():
        for reduction in ("mean", "sum", "none"):

            def flat(grad: Tensor, reduction: str = reduction, oracle: Any = oracle) -> Tensor:
                return oracle(grad.reshape(grad.size(0), -1), reduction=reduction)

            def loss(grad: Tensor, reduction: str = reduction, name: str = name) -> Tensor:
                return getattr(gk, name)(grad, reduction=reduction)

            check(loss, flat, {"grad": grad}, ("grad",), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [2**20, 2**20 + 37, 100])
def test_known_failure_digits_of_long_sums(dtype: torch.dtype, size: int) -> None:
    """Sums in fp32 stood still as they grew, and near the target little else was left."""
    grad = torch.full((3, size), 0.1, dtype=dtype)
    grad[1] *= 2.0
    grad.requires_grad_()
    norm = grad.detach().double().norm(dim=1, keepdim=True)
    with gk.backend("eager"):
        squares = gk.r1_penalty(grad.float(), gamma=2.0, reduction="none")
        target = norm[0].item() * (1.0 - 2.0**-10)
        distances = gk.gradient_penalty(grad, target=target, reduction="none")
        (slopes,) = torch.autograd.grad(distances.sum(), grad)
    torch.testing.assert_close(squares, norm[:, 0].square().float())
    torch.testing.assert_close(distances, (norm[:, 0] - target).square().to(dtype))
    torch.testing.assert_close(slopes, (2.0 * (norm - target) / norm * grad.detach()).to(dtype))


@pytest.mark.parametrize("shape", [(2, 3, 37, 37), (2, 100)])
def test_every_digit_in_double_precision(path: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "NORMS_BELOW", 2**20)
    grad = torch.tensor([1.1, 1.3], dtype=torch.float64).reshape(2, *[1] * (len(shape) - 1)).expand(shape)
    exact = torch.tensor([math.fsum(x * x for x in row) for row in grad.flatten(1).tolist()], dtype=torch.float64)
    torch.testing.assert_close(gk.r1_penalty(grad, gamma=2.0, reduction="none"), exact, rtol=1e-15, atol=0.0)


def test_channels_last_gradients(path: str) -> None:
    grad = torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    for every in (grad, grad[..., ::2], grad.permute(3, 1, 2, 0)):
        check(gk.gradient_penalty, lambda grad: gradient_penalty_oracle(grad.contiguous()), {"grad": every}, ("grad",))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1e-4), (torch.float16, 300.0), (torch.float32, 1e-30)])
def test_squares_beyond_the_dtype(path: str, dtype: torch.dtype, size: float) -> None:
    """Their squares are 0 or infinite in the dtype of the gradients."""
    grad = torch.full((2, 16), size).to(dtype).requires_grad_()
    penalty = gk.gradient_penalty(grad, target=0.0, reduction="none")
    norm = 4.0 * float(grad.detach()[0, 0])
    assert penalty.detach().double() == pytest.approx(torch.full((2,), norm**2, dtype=torch.float64).to(dtype).double())
    (slope,) = torch.autograd.grad(gk.gradient_penalty(grad, target=2.0 * norm, reduction="sum"), grad)
    assert slope.double().div(-2.0 * norm / 4.0).sub(1.0).abs().max() < 2e-3


def test_a_norm_of_zero(path: str) -> None:
    """All derivatives are 0 there, and the other sample's what they are without it."""
    grad = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    penalty = gk.gradient_penalty(grad, reduction="sum")
    assert penalty == 17.0
    (first,) = torch.autograd.grad(penalty, grad)
    (again,) = torch.autograd.grad(gk.gradient_penalty(grad, reduction="sum"), grad, create_graph=True)
    for slope in (first, again):
        torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0], [4.8, 6.4]]))
    (second,) = torch.autograd.grad(again.sum(), grad)
    assert second.isfinite().all()
    assert not second[0].any()


def test_few_gradients_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms by torch's operator, where each is positive and finite; one of 0 or of infinity is our function's."""
    monkeypatch.setattr(api, "NORMS_BELOW", 2**15)
    roots, calls = api.roots, []
    monkeypatch.setattr(api, "roots", lambda grad: calls.append(grad.numel()) or roots(grad))
    for dtype in DTYPES:
        for shape in ((5, 33), (3, 2, 5, 7)):
            test_penalties("eager", shape, dtype)
    for dtype, size in ((torch.float16, 1e-4), (torch.float16, 300.0), (torch.float32, 1e-30)):
        test_squares_beyond_the_dtype("eager", dtype, size)
    test_channels_last_gradients("eager")
    for name in ("gradient_penalty", "r1_penalty"):
        test_step_of_a_discriminator("eager", name)
    assert calls
    test_a_norm_of_zero("eager")
    assert gk.gradient_penalty(torch.tensor([[INF, 0.0], [3.0, 4.0]]), reduction="none").tolist() == [INF, 16.0]
    calls.clear()
    gk.gradient_penalty(torch.ones(2, 2**14))
    assert calls == []


@pytest.mark.parametrize("name", ["gradient_penalty", "r1_penalty"])
def test_step_of_a_discriminator(path: str, name: str) -> None:
    """The penalty's gradient in the weights, through the gradient in the samples."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    samples = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for penalty in (getattr(gk, name), {"gradient_penalty": gradient_penalty_oracle, "r1_penalty": r1_penalty_oracle}[name]):
        scores = model(samples.flatten(1))
        (slope,) = torch.autograd.grad(scores.sum(), samples, create_graph=True)
        total = penalty(slope) + gk.gan_discriminator_loss(scores, scores * 0.5, "wasserstein")
        results.append(torch.autograd.grad(total, list(model.parameters()), allow_unused=True))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


SCORES = torch.zeros(4, 1)
BAD = [
    ("gan_discriminator_loss", {"real": [1.0], "fake": SCORES}, TypeError, "real must be a Tensor"),
    ("gan_discriminator_loss", {"real": SCORES, "fake": SCORES.long()}, NotImplementedError, "fake must be a real floating"),
    ("gan_discriminator_loss", {"real": SCORES, "fake": SCORES, "kind": "wgan"}, ValueError, "wgan is not a valid .* kind"),
    ("gan_discriminator_loss", {"real": SCORES, "fake": SCORES, "reduction": "batchmean"}, ValueError, "valid .* reduction"),
    (
        "gan_discriminator_loss",
        {"real": SCORES, "fake": SCORES[:2], "kind": "relativistic"},
        ValueError,
        r"one shape for kind='relativistic', reduction='mean', got \[4, 1\] and \[2, 1\]",
    ),
    ("gan_discriminator_loss", {"real": SCORES, "fake": SCORES[:2], "reduction": "none"}, ValueError, "must have one shape"),
    (
        "gan_discriminator_loss",
        {"real": SCORES, "fake": SCORES.to("meta")},
        RuntimeError,
        "fake must be on the input's device",
    ),
    ("gan_generator_loss", {"fake": None}, TypeError, "fake must be a Tensor"),
    (
        "gan_generator_loss",
        {"fake": SCORES, "kind": "relativistic"},
        ValueError,
        r"real must .* \[4, 1\] of fake .* got None",
    ),
    ("gan_generator_loss", {"fake": SCORES, "kind": "relativistic", "real": SCORES[:2]}, ValueError, r"got shape \[2, 1\]"),
    ("gan_generator_loss", {"fake": SCORES, "real": SCORES}, ValueError, "kind is 'non_saturating': leave it out"),
    ("gradient_penalty", {"grad": torch.ones(())}, ValueError, "grad must have samples along dimension 0"),
    ("gradient_penalty", {"grad": None}, TypeError, "grad must be a Tensor, not NoneType"),
    ("gradient_penalty", {"grad": SCORES, "target": -1.0}, ValueError, "target must not be negative, got -1.0"),
    ("gradient_penalty", {"grad": SCORES, "reduction": "batchmean"}, ValueError, "batchmean is not a valid value"),
    ("r1_penalty", {"grad": SCORES, "gamma": NAN}, ValueError, "gamma must not be negative, got nan"),
    ("r1_penalty", {"grad": SCORES, "gamma": "1"}, TypeError, "gamma must be a number"),
]


@pytest.mark.parametrize(("name", "arguments", "error", "message"), BAD)
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_bad_input(backend: str, name: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with gk.backend(backend), refused(name, arguments, error, message):
        getattr(gk, name)(**arguments)


def test_modules() -> None:
    real, fake, grad = torch.randn(5), torch.randn(3), torch.randn(4, 6)
    discriminator = gk.GANDiscriminatorLoss("lsgan", reduction="sum")
    assert discriminator(real, fake) == gk.gan_discriminator_loss(real, fake, "lsgan", reduction="sum")
    generator = gk.GANGeneratorLoss("relativistic", reduction="sum")
    assert generator(fake, real=real[:3]) == gk.gan_generator_loss(fake, "relativistic", real=real[:3], reduction="sum")
    assert gk.GradientPenalty(target=2.0, reduction="sum")(grad) == gk.gradient_penalty(grad, target=2.0, reduction="sum")
    assert gk.R1Penalty(gamma=2.0, reduction="sum")(grad) == gk.r1_penalty(grad, gamma=2.0, reduction="sum")
