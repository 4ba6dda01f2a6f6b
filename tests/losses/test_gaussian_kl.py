"""The Gaussian KL divergence on both paths against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core import elementwise, elementwise_op, formulas
from genloss_kernels.core import reduction as reducing
from genloss_kernels.core.launch import ELEMENTWISE_TILES, Tile
from genloss_kernels.core.reduction import Reduction
from genloss_kernels.losses.gaussian_kl import api

from .comparison import DTYPES, aligned, check, check_second_derivatives, no_synchronisation, untouched
from .test_gaussian_kl_reference import excess

INF, NAN = math.inf, math.nan
BLOCK = ELEMENTWISE_TILES[4].block
NAMES = ("mu_q", "logvar_q", "mu_p", "logvar_p")


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our operators also where plain ones would be quicker, in blocks that a small test has several of."""
    monkeypatch.setattr(api, "PLAIN_BELOW", 0)
    monkeypatch.setattr(formulas, "BLOCK_ELEMENTS", 2**7)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 and sums by twos, so that a few elements go through every loop of the kernels more than once."""
    monkeypatch.setattr(elementwise, "ELEMENTWISE_TILES", dict.fromkeys((2, 4, 8), Tile(16, 4)))
    monkeypatch.setattr(elementwise, "TILES_PER_PROGRAM", 2)
    monkeypatch.setattr(elementwise, "REDUCTION_TILE", Tile(2, 4))
    monkeypatch.setattr(reducing, "REDUCTION_TILE", Tile(2, 4))


def _oracle(
    mu_q: Tensor,
    logvar_q: Tensor,
    mu_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    reduction: str = "batchmean",
    free_bits: float | None = None,
    capacity: float | None = None,
    logvar_clamp: tuple[float, float] | None = None,
) -> Tensor:
    mu_p = torch.zeros_like(mu_q) if mu_p is None else mu_p
    logvar_p = torch.zeros_like(logvar_q) if logvar_p is None else logvar_p
    if logvar_clamp is not None:
        logvar_q, logvar_p = logvar_q.clamp(*logvar_clamp), logvar_p.clamp(*logvar_clamp)
    v = logvar_q - logvar_p
    kl = 0.5 * (torch.expm1(v) - v + (mu_q - mu_p).square() * torch.exp(-logvar_p))
    if free_bits is not None:
        kl = torch.where(kl > free_bits, kl, free_bits)
    if capacity is not None:
        kl = ((kl.flatten(1).sum(1) if kl.dim() > 1 else kl) - capacity).abs()
        return kl if reduction == "none" else kl.sum() if reduction == "sum" else kl.mean()
    if reduction == "none":
        return kl
    return kl.mean() if reduction == "mean" else kl.sum() / (kl.size(0) if reduction == "batchmean" else 1)


def _gaussians(*shapes: tuple[int, ...] | None, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    given = dict(zip(NAMES, shapes, strict=False))
    return {name: torch.randn(shape).to(dtype) for name, shape in given.items() if shape is not None} | options


def _check(arguments: dict[str, Any], dtype: torch.dtype | None = None) -> Tensor:
    names = [name for name in NAMES if name in arguments]
    return check(gk.gaussian_kl, _oracle, arguments, names, dtype)


# Shapes of mu_q, logvar_q, mu_p and logvar_p.
SHAPES: dict[str, list[tuple[int, ...] | None]] = {
    "one element": [(1,), (1,)],
    "standard": [(9, 33), (9, 33)],
    "standard, one block": [(4, BLOCK // 4), (4, BLOCK // 4)],
    "standard, two programs and a tail": [(3, 2 * BLOCK + 5), (3, 2 * BLOCK + 5)],
    "general": [(9, 33)] * 4,
    "means only": [(9, 33), (9, 33), (9, 33)],
    "log-variances only": [(9, 33), (9, 33), None, (9, 33)],
    "mean and one log-variance for all": [(9, 33), (9, 33), (33,), ()],
    "learned prior [D]": [(9, 33), (9, 33), (33,), (33,)],
    "learned prior [1, D], longer than a block": [(3, BLOCK + 7), (3, BLOCK + 7), (1, BLOCK + 7), (BLOCK + 7,)],
    "prior of each sample": [(40, 33), (40, 33), (40, 1), (40, 1)],
    "prior of each channel": [(3, 5, 6, 7), (3, 5, 6, 7), (5, 1, 1), (3, 5, 1, 1)],
    "one log-variance": [(9, 33), (1,), None, None],
    "one log-variance for each sample": [(9, 33), (9, 1)],
    "none of full size": [(9, 1), (33,)],
    "none of full size, general": [(9, 1), (33,), (1, 33), (9, 1)],
    "the prior is the larger": [(33,), (33,), (9, 33), (9, 33)],
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(path: str, name: str) -> None:
    """Gradients of what was broadcast are summed; dimension 0 is that of the broadcast shape."""
    arguments = _gaussians(*SHAPES[name])
    _check(arguments)
    _check(arguments | {"reduction": "none"})


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "halves of one tensor": lambda x: torch.cat([x, x], 1)[:, : x.size(1)],
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(path: str, name: str) -> None:
    """All four operands alike, then only the first, then all but the first."""
    relaid = LAYOUTS[name]
    for which in ((0, 1, 2, 3), (0,), (1, 2, 3)):
        arguments = _gaussians(*[(14, 30)] * 4)
        arguments |= {NAMES[i]: relaid(arguments[NAMES[i]]) for i in which}
        _check(arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(path: str, dtype: torch.dtype) -> None:
    _check(_gaussians(*[(5, 211)] * 4, dtype=dtype))
    _check(_gaussians(*[(5, 211)] * 2, dtype=dtype, reduction="none", free_bits=0.25, logvar_clamp=(-0.5, 0.75)))
    _check(_gaussians((5, 33), (5, 33), (33,), (1,), dtype=dtype, reduction="sum"))


def test_dtypes_promote(path: str) -> None:
    halves = _gaussians((5, 40), (5, 40), dtype=torch.float16)
    _check(halves | {"logvar_q": torch.randn(5, 40)}, torch.float32)
    singles = _gaussians((5, 40), (5, 40), (40,), (40,))
    _check(singles | {"mu_p": torch.randn(40).double()}, torch.float64)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("count", [2, 4])
def test_options(path: str, count: int, reduction: str) -> None:
    arguments = _gaussians(*[(7, 5, 6)] * count, reduction=reduction)
    for options in (
        {},
        {"free_bits": 0.4},
        {"logvar_clamp": (-0.7, 0.6)},
        {"free_bits": 0.4, "logvar_clamp": (-0.7, 0.6)},
    ):
        _check(arguments | options)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(9,), (9, 33), (4, 5, 7), (1, 40)])
def test_capacity(path: str, shape: tuple[int, ...], reduction: str) -> None:
    """Samples on both sides of the capacity: each is held to it by itself."""
    arguments = _gaussians(*[shape] * 4, reduction=reduction)
    for options in ({}, {"free_bits": 0.4, "logvar_clamp": (-0.7, 0.6)}):
        per_sample = _oracle(**_gaussian_values(arguments), **options, capacity=0.0, reduction="none")
        capacity = float(per_sample.median()) * 1.01
        loss = _check(arguments | options | {"capacity": capacity})
        assert loss.shape == (shape[:1] if reduction == "none" else ())


def _gaussian_values(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: arguments[name].double() for name in NAMES if name in arguments}


@pytest.mark.parametrize("upstream", [torch.arange(12.0)[::2], torch.tensor(0.5).expand(6)], ids=["every second", "one"])
def test_strided_upstream_of_samples(path: str, upstream: Tensor) -> None:
    """Nothing between the sums over samples and the caller makes the upstream gradient contiguous."""
    mu, logvar = (t.requires_grad_() for t in _gaussians((6, 33), (6, 33)).values())
    operands = (mu, logvar, None, None)
    sums = elementwise_op.apply(
        api.NAME, operands, None, (0.0, 0.0, 0.0), 0, Reduction.SAMPLE, torch.float32,
        triton=path == "triton", by_reference=False,
    )  # fmt: skip
    oracle = _oracle(mu.double(), logvar.double(), reduction="none").sum(1)
    for found, wanted in zip(
        torch.autograd.grad(sums, (mu, logvar), upstream),
        torch.autograd.grad(oracle, (mu, logvar), upstream.double()),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_capacity_of_long_samples(path: str) -> None:
    """Samples of several programs, which begin anywhere."""
    _check(_gaussians(*[(3, 4 * BLOCK + 1001)] * 2, capacity=2600.0))


def test_capacity_at_equality() -> None:
    mu = torch.ones(2, 4, requires_grad=True)
    loss = gk.gaussian_kl(mu, torch.zeros(2, 4), capacity=2.0)
    loss.backward()
    assert loss == 0.0
    assert mu.grad is not None
    assert not mu.grad.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_capacity_of_any_layout(path: str, layout: str) -> None:
    arguments = _gaussians(*[(14, 30)] * 2, capacity=30.0, reduction="none")
    _check(arguments | {"mu_q": LAYOUTS[layout](arguments["mu_q"])})


@pytest.mark.interpreter
@pytest.mark.parametrize("shapes", [[(3, 51)] * 4, [(3, 51), (3, 51), (51,), (3, 1)], [(2, 3, 25), (2, 1, 25)]])
def test_many_small_tiles(shapes: list[tuple[int, ...]], small_tiles: None) -> None:
    """Every loop over tiles, programs' sums and samples' sums runs more than once, most of them with a tail."""
    with gk.backend("triton"):
        for reduction in ("batchmean", "none"):
            _check(_gaussians(*shapes, reduction=reduction, free_bits=0.3))
            _check(_gaussians(*shapes, reduction=reduction, capacity=20.0))


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(3, 107), (5, 7), (4, 32), (2, 16), (2, 33)])
def test_many_small_samples(shape: tuple[int, ...], small_tiles: None) -> None:
    """Samples that begin on a multiple of 16 elements and not, of one tile and of several programs."""
    with gk.backend("triton"):
        _check(_gaussians(shape, shape, capacity=5.0, reduction="none"))


@pytest.mark.interpreter
def test_many_small_tiles_under_a_mask(small_tiles: None) -> None:
    """The elements that a masked mean divides by are counted by the same loops."""
    x, t, mask = aligned(3, 51), torch.rand(3, 51), torch.rand(3, 51) < 0.4
    with gk.backend("triton"):
        loss = gk.binary_cross_entropy_with_logits(x, t, mask=mask)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(x.double()[mask], t.double()[mask])
    gk.testing.assert_close(loss, wanted)


def test_free_bits_at_the_boundary(path: str) -> None:
    """A divergence of exactly the free bits costs that and has no gradient; the next number above has."""
    mu = torch.tensor([1.0, math.nextafter(1.0, 2.0), 1.0 + 2.0**-22, 0.5, 2.0], requires_grad=True)
    loss = gk.gaussian_kl(mu, torch.zeros(5), free_bits=0.5, reduction="none")
    assert loss[[0, 3, 4]].tolist() == [0.5, 0.5, 2.0]
    assert loss[2] > 0.5
    loss.sum().backward()
    assert mu.grad is not None
    assert [bool(g) for g in mu.grad] == [False, False, True, False, True]
    assert mu.grad[4] == 2.0


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("below", [0, 2**13])
def test_known_failure_nan_beside_free_bits(path: str, below: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss was NaN, and its gradient 0."""
    monkeypatch.setattr(api, "PLAIN_BELOW", below)
    for poisoned in range(count):
        results = []
        for options in ({}, {"free_bits": 0.5}):
            leaves = [torch.full((9, 33), 2.0 + k) for k in range(count)]
            leaves[poisoned][3, 5] = NAN
            loss = gk.gaussian_kl(*(t.requires_grad_() for t in leaves), reduction="none", **options)
            results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
        assert results[1][0][3, 5].isnan()
        assert results[1][1 + poisoned][3, 5].isnan()
        for found, wanted in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, wanted, equal_nan=True)


def test_free_bits_of_0_change_nothing_but_equality(path: str) -> None:
    arguments = _gaussians(*[(5, 9)] * 4)
    exact = gk.gaussian_kl(**{name: tensor.double() for name, tensor in arguments.items()})
    gk.testing.assert_close(gk.gaussian_kl(**arguments, free_bits=0.0), exact)


def test_clamp_has_gradient_1_on_the_bounds(path: str) -> None:
    """As torch.clamp: one on the bounds, zero beyond, for both log-variances; a NaN stays one."""
    logvar = torch.tensor([-1.0, math.nextafter(-1.0, -2.0), -2.0, 1.5, 1.6, 0.0])
    logvar[1] = torch.nextafter(torch.tensor(-1.0), torch.tensor(-2.0))
    leaves = [torch.full((6,), 0.3), logvar, torch.zeros(6), torch.full((6,), 0.25)]
    for which in (1, 3):
        given = [t.clone().requires_grad_() for t in leaves]
        if which == 3:
            given[1], given[3] = given[3], given[1]
        gk.gaussian_kl(*given, logvar_clamp=(-1.0, 1.5), reduction="sum").backward()
        clamped = [g.detach().clone().requires_grad_() for g in given]
        wanted = [clamped[0], clamped[1].clamp(-1.0, 1.5), clamped[2], clamped[3].clamp(-1.0, 1.5)]
        gk.gaussian_kl(*wanted, reduction="sum").backward()
        for found, want in zip(given, clamped, strict=True):
            torch.testing.assert_close(found.grad, want.grad)
        grad = given[which].grad
        assert grad is not None
        assert [bool(g) for g in grad] == [True, False, False, True, False, True]
    nan = torch.tensor([NAN])
    assert gk.gaussian_kl(torch.zeros(1), nan, logvar_clamp=(-1.0, 1.0)).isnan()
    assert gk.gaussian_kl(torch.zeros(1), torch.zeros(1), None, nan, logvar_clamp=(-1.0, 1.0)).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("plain", [True, False])
def test_bounds_are_those_that_half_precision_holds(
    path: str, reduction: str, dtype: torch.dtype, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was clamped to 0.7 before lies on that bound, though it is above 0.7 or below."""
    monkeypatch.setattr(api, "PLAIN_BELOW", 2**15 if plain else 0)
    for bound in (0.7, -0.3, 3e-6):
        logvar = torch.full((4,), bound, dtype=dtype, requires_grad=True)
        for clamp in ((bound, bound + 1.0), (bound - 1.0, bound)):
            options: dict[str, Any] = {"reduction": reduction, "logvar_clamp": clamp}
            found = gk.gaussian_kl(torch.zeros(4, dtype=dtype), logvar, **options)
            wanted = gk.gaussian_kl(torch.zeros(4, dtype=dtype), logvar.clamp(*clamp), reduction=reduction)
            torch.testing.assert_close(found, wanted)
            for one, other in zip(*(torch.autograd.grad(loss.sum(), logvar) for loss in (found, wanted)), strict=True):
                torch.testing.assert_close(one, other)
                assert one.all()


def test_bounds_beside_a_prior_of_another_dtype(path: str) -> None:
    """The mask agrees with the values, by arithmetic in fp32."""
    logvar = torch.full((4,), 0.7, dtype=torch.float16, requires_grad=True)
    loss = gk.gaussian_kl(torch.zeros(4), logvar, None, torch.zeros(4), logvar_clamp=(-1.0, 0.7), reduction="none")
    assert not torch.autograd.grad(loss.sum(), logvar)[0].any()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_bounds_change_under_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda mu, logvar, bound: gk.gaussian_kl(mu, logvar, logvar_clamp=(-bound, bound)), fullgraph=True, backend="eager"
    )
    mu, logvar = torch.randn(4, 3).half(), torch.randn(4, 3).half()
    for bound in (0.3, 0.4, 0.5):
        torch.testing.assert_close(compiled(mu, logvar, bound), gk.gaussian_kl(mu, logvar, logvar_clamp=(-bound, bound)))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_digit_at_small_log_variance(path: str, dtype: torch.dtype) -> None:
    """exp(v) - 1 - v has none left in its plain form; one power of ten at a time, since an error is relative to it."""
    # In fp16 the divergence at 1e-4 is subnormal.
    for exponent in (-1, -2, -3) if dtype == torch.float16 else (-1, -2, -3, -4, -6, -8):
        v = (torch.tensor([1.0, 2.3, 4.9, -1.7, -3.1, -4.9], dtype=torch.float64) * 10.0**exponent).to(dtype)
        exact = torch.tensor([0.5 * excess(x) for x in v.tolist()], dtype=torch.float64)
        zero = torch.zeros_like(v)
        gk.testing.assert_close(gk.gaussian_kl(zero, v, reduction="none"), exact)
        gk.testing.assert_close(gk.gaussian_kl(zero, v, reduction="sum"), exact.sum())


def test_every_digit_between_close_log_variances(path: str) -> None:
    """A difference of log-variances within a factor of two of each other is exact."""
    for step in (2.0**-7, 2.0**-10, 2.0**-14):
        prior = torch.tensor([1.0, -1.5, 0.25, -0.75])
        v = torch.tensor([step, 3.0 * step, -step, 5.0 * step])
        exact = torch.tensor([0.5 * excess(x) for x in v.tolist()], dtype=torch.float64)
        gk.testing.assert_close(gk.gaussian_kl(prior, prior + v, prior, prior, reduction="none"), exact)


def test_gradient_at_small_log_variance(path: str) -> None:
    for exponent in (-1, -3, -5, -8):
        v = torch.tensor([1.0, 2.3, 4.9, -1.7, -3.1, -4.9]) * 10.0**exponent
        v.requires_grad_()
        (grad,) = torch.autograd.grad(gk.gaussian_kl(torch.zeros(6), v, reduction="sum"), v)
        gk.testing.assert_close(grad, 0.5 * torch.expm1(v.detach().double()))


def test_nothing_between_equals(path: str) -> None:
    mu, logvar = torch.randn(4, 50), 5.0 * torch.randn(4, 50)
    leaves = [t.clone().requires_grad_() for t in (mu, logvar, mu, logvar)]
    loss = gk.gaussian_kl(*leaves, reduction="none")
    assert not loss.any()
    for grad in torch.autograd.grad(loss.sum(), leaves):
        assert not grad.any()


def test_known_failure_overflowing_variance(path: str) -> None:
    """exp(logvar) overflowed into a loss of inf or NaN (PyTorch-VAE #16): only where the divergence itself is that large."""
    logvar = torch.tensor([-1000.0, -100.0, 88.0, 100.0], requires_grad=True)
    mu = torch.zeros(4)
    loss = gk.gaussian_kl(mu, logvar, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), logvar)
    wanted = _oracle(mu.double(), logvar.detach().double(), reduction="none").float()
    torch.testing.assert_close(loss[:3], wanted[:3])
    assert loss[3] == INF
    assert grad[:2].tolist() == [-0.5, -0.5]
    # Of two large log-variances it is their difference that counts.
    both = gk.gaussian_kl(mu[:2], torch.tensor([100.0, -80.0]), mu[:2], torch.tensor([101.0, -81.0]), reduction="none")
    wanted = [0.5 * excess(-1.0), 0.5 * excess(1.0)]
    assert both.tolist() == pytest.approx(wanted, rel=1e-6)
    clamped = gk.gaussian_kl(mu, logvar, logvar_clamp=(-30.0, 20.0))
    assert clamped.isfinite()
    assert torch.autograd.grad(clamped, logvar)[0].isfinite().all()


def test_upstream_of_any_layout(path: str) -> None:
    arguments = _gaussians((9, 50), (9, 50), (50,))
    column, full = torch.rand(9, 1), torch.rand(50, 9).t()
    for combine in (lambda e: (e * column).sum(), lambda e: (e * full).sum(), lambda e: e.sum(), lambda e: e.sum(1)):
        check(
            lambda combine=combine, **given: combine(gk.gaussian_kl(**given, reduction="none")),
            lambda combine=combine, **given: combine(_oracle(**given, reduction="none")),
            arguments,
            NAMES[:3],
        )


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_only_some_need_a_gradient(path: str, needed: tuple[int, ...]) -> None:
    arguments = _gaussians((9, 50), (9, 50), (50,), (9, 50), free_bits=0.2, logvar_clamp=(-1.0, 1.0))
    check(gk.gaussian_kl, _oracle, arguments, [NAMES[i] for i in needed])


@pytest.mark.parametrize("name", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_empty(name: str) -> None:
    with gk.backend(name):
        for shape in ((0,), (0, 3), (3, 0)):
            mu = torch.zeros(shape, requires_grad=True)
            assert gk.gaussian_kl(mu, mu, reduction="sum") == 0.0
            assert gk.gaussian_kl(mu, mu, reduction="mean").isnan()
            assert gk.gaussian_kl(mu, mu, reduction="batchmean").isnan() == (shape[0] == 0)
            assert gk.gaussian_kl(mu, mu, reduction="none").shape == shape
            distance = gk.gaussian_kl(mu, torch.zeros(shape), capacity=2.0, reduction="none")
            assert distance.tolist() == [2.0] * shape[0]
            distance.sum().backward()
            assert mu.grad is not None
            assert mu.grad.shape == shape


def test_no_dimension(path: str) -> None:
    for reduction in ("none", "sum", "mean"):
        _check(_gaussians((), (), (), (), reduction=reduction))


def test_known_failure_backward_skipped_at_upstream_1(path: str) -> None:
    """A backward that did nothing at an upstream gradient of 1 hid that gradients vanished (TransformerEngine #2139)."""
    mu, logvar = torch.randn(4, 50, requires_grad=True), torch.randn(4, 50)
    loss = gk.gaussian_kl(mu, logvar, reduction="sum")
    one, two, none = (
        torch.autograd.grad(loss, mu, upstream, retain_graph=True)[0]
        for upstream in (None, torch.full((), 2.0), torch.zeros(()))
    )
    assert torch.equal(one, mu.detach())
    assert torch.equal(two, 2.0 * one)
    assert not none.any()


def test_known_failure_first_rows_upstream_gradient(path: str) -> None:
    """With reduction="none" the first row's upstream gradient served every row (Liger #968, #1298)."""
    mu = torch.randn(4, 50, requires_grad=True)
    rows = gk.gaussian_kl(mu, torch.zeros(4, 50), reduction="none")
    factors = 2.0 ** torch.arange(200.0).view(4, 50).remainder(20.0)
    (grad,) = torch.autograd.grad(rows, mu, factors)
    assert torch.equal(grad, mu.detach() * factors)


@pytest.mark.parametrize("count", [2, 4])
def test_known_failure_retained_graph_and_double_backward(path: str, count: int) -> None:
    """retain_graph failed, and a second derivative was silently wrong (QuACK #209, Liger JSD)."""
    names = NAMES[:count]
    for options in ({}, {"free_bits": 0.4, "logvar_clamp": (-0.7, 0.6)}, {"capacity": 30.0, "reduction": "none"}):
        arguments = _gaussians(*[(5, 30)] * count, **options)
        check_second_derivatives(gk.gaussian_kl, _oracle, arguments, names)


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [{"reduction": "none"}, {"reduction": "sum"}, {"capacity": 5.0, "reduction": "none"}])
def test_known_failure_int32_offsets(options: dict[str, Any]) -> None:
    """Elements past 2**31 were addressed modulo 2**32 (pytorch #111484, fla #1080, trl #7266)."""
    far, values = untouched(2**32 + 3 * 2**30 + 5).as_strided((4, 5), (2**30, 1), 2**32), aligned(4, 5, dtype=torch.bfloat16)
    far.copy_(values)
    logvar = torch.randn(4, 5).bfloat16()
    with gk.backend("triton"):
        assert torch.equal(gk.gaussian_kl(far, logvar, **options), gk.gaussian_kl(values, logvar, **options))
        assert torch.equal(gk.gaussian_kl(logvar, far, **options), gk.gaussian_kl(logvar, values, **options))


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [{}, {"capacity": 5.0}])
def test_known_failure_host_synchronisation(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step waited for the device to read a value (.item(), torch.equal; gaussian_nll_loss)."""
    arguments = _gaussians((5, 50), (5, 50), (50,), (5, 1), free_bits=0.3, logvar_clamp=(-1.0, 1.0), **options)
    leaves = {n: v.requires_grad_() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    with gk.backend("triton"), gk.testing.count_launches() as launches, no_synchronisation(monkeypatch):
        gk.gaussian_kl(**leaves).backward()
    assert launches.total() == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_inputs_on_the_cpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Up to a number of elements plain operators, beyond it ours: nobody can tell."""
    monkeypatch.setattr(api, "PLAIN_BELOW", 200)
    for shape in ((9, 22), (8, 25)):
        for options in ({}, {"reduction": "none"}, {"capacity": 20.0, "reduction": "sum"}, {"free_bits": 0.4}):
            _check(_gaussians(shape, shape, shape[1:], (1,), dtype=dtype, **options))


def test_same_bits_every_time(path: str) -> None:
    """Partial sums are added in a fixed order."""
    arguments = _gaussians((3, 3 * BLOCK), (3, 3 * BLOCK))
    assert len({gk.gaussian_kl(**arguments).item() for _ in range(2)}) == 1


def test_nothing_is_kept_where_nothing_learns() -> None:
    x = torch.randn(4, 5)
    learning = x.clone().requires_grad_()
    kept = elementwise_op.savable
    assert kept("gaussian_kl", (x, learning, None, None), 0, reducing.Reduction.SUM) == 1
    assert kept("gaussian_kl", (x, learning, x, x), api.GENERAL, reducing.Reduction.MEAN) == 2
    assert kept("gaussian_kl", (x, x, None, None), 0, reducing.Reduction.SUM) == 0
    with torch.no_grad():
        assert kept("gaussian_kl", (x, learning, None, None), 0, reducing.Reduction.SUM) == 0


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_equal_narrow_gaussians_are_at_distance_0(path: str, reduction: str) -> None:
    """Where exp(-logvar) overflows, 0 times it would be NaN."""
    for mu, logvar in ((0.0, -90.0), (0.5, -120.0), (1.0, -400.0)):
        leaves = [torch.full((300,), value).requires_grad_() for value in (mu, logvar, mu, logvar)]
        loss = gk.gaussian_kl(*leaves, reduction=reduction)
        assert not loss.any()
        for grad in torch.autograd.grad(loss.sum(), leaves):
            assert not grad.any()


def test_distance_of_narrow_gaussians_overflows_late(path: str) -> None:
    q, p = (torch.tensor([1e-3]), torch.tensor([-90.0])), (torch.tensor([0.0]), torch.tensor([-90.0]))
    exact = gk.gaussian_kl(*(t.double() for t in (*q, *p)), reduction="sum")
    gk.testing.assert_close(gk.gaussian_kl(*q, *p, reduction="sum"), exact)
