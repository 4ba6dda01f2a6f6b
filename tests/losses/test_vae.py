"""The loss of variational autoencoders on both paths against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core import elementwise, formulas, pair
from genloss_kernels.core.launch import ELEMENTWISE_TILES, Tile
from genloss_kernels.losses.binary_cross_entropy import reference as binary
from genloss_kernels.losses.vae import api

from ..refusals import refused
from .comparison import DTYPES, check_outputs, no_synchronisation

INF = math.inf
BLOCK = ELEMENTWISE_TILES[4].block
TENSORS = ("recon", "target", "mu", "logvar")
KINDS = ("mse", "l1", "bce", "bce_with_logits")
REDUCTIONS = ("batchmean", "none", "sum", "mean")


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of ours also where torch's operators would be quicker, in blocks of which a small test has several."""
    monkeypatch.setattr(api, "PARTS_BELOW", 0)
    monkeypatch.setattr(formulas, "BLOCK_ELEMENTS", 2**7)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 and sums by twos, so that a few elements go through every loop of the kernels more than once."""
    monkeypatch.setattr(elementwise, "ELEMENTWISE_TILES", dict.fromkeys((2, 4, 8), Tile(16, 4)))
    monkeypatch.setattr(elementwise, "TILES_PER_PROGRAM", 2)
    monkeypatch.setattr(pair, "REDUCTION_TILE", Tile(2, 4))


def _oracle(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    recon_loss: str = "mse",
    beta: float | Tensor = 1.0,
    reduction: str = "batchmean",
    free_bits: float | None = None,
    capacity: float | None = None,
) -> dict[str, Tensor]:
    if recon_loss == "mse":
        pixels = (recon - target).square()
    elif recon_loss == "l1":
        pixels = (recon - target).abs()
    else:
        function = F.binary_cross_entropy if recon_loss == "bce" else F.binary_cross_entropy_with_logits
        pixels = function(recon, target, reduction="none")
    kl = 0.5 * (torch.expm1(logvar) - logvar + mu.square())
    if free_bits is not None:
        kl = torch.where(kl > free_bits, kl, free_bits)
    first, second = (term.flatten(1).sum(1) if term.dim() > 1 else term for term in (pixels, kl))
    if capacity is not None:
        second = (second - capacity).abs()
    if reduction == "mean":
        first, second = pixels.mean(), kl.mean() if capacity is None else second.mean()
    elif reduction != "none":
        divisor = mu.size(0) if reduction == "batchmean" else 1
        first, second = first.sum() / divisor, second.sum() / divisor
    return {"loss": first + beta * second, "recon": first, "kl": second}


def _arguments(
    shape: tuple[int, ...] = (5, 3, 7), latent: tuple[int, ...] = (5, 9), dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Any]:
    recon = 0.05 + 0.9 * torch.rand(shape) if options.get("recon_loss") == "bce" else torch.randn(shape) * 2.0
    tensors = recon, torch.rand(shape), torch.randn(latent), torch.randn(latent)
    return {name: t.to(dtype) for name, t in zip(TENSORS, tensors, strict=True)} | options


def _check(arguments: dict[str, Any], differentiable: tuple[str, ...] = TENSORS) -> dict[str, Tensor]:
    return check_outputs(lambda **given: gk.vae_loss(**given)._asdict(), _oracle, arguments, differentiable)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_options(path: str, kind: str, reduction: str) -> None:
    """Each output's gradient alone and all together, in all four inputs."""
    for options in ({}, {"free_bits": 0.3}, {"capacity": 9.0}, {"free_bits": 0.3, "capacity": 9.0, "beta": 4.0}):
        _check(_arguments(recon_loss=kind, reduction=reduction, **options))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_few_elements_of_a_cpu(kind: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's operators up to a number of elements, and nobody can tell; not per sample, nor at an infinite logit."""
    plain, calls = api.plain_sum, []
    monkeypatch.setattr(api, "plain_sum", lambda *given: calls.append(1) or plain(*given))
    for options in ({}, {"beta": 2.5}, {"beta": torch.tensor(0.25)}):
        arguments = _arguments(recon_loss=kind, reduction=reduction, **options)
        monkeypatch.setattr(api, "PARTS_BELOW", arguments["recon"].numel() + 1)
        _check(arguments)
        assert bool(calls) == (reduction != "none")
        calls.clear()
        monkeypatch.setattr(api, "PARTS_BELOW", arguments["recon"].numel())
        _check(arguments)
        _check(arguments | {"free_bits": 0.3, "capacity": 9.0})
        assert calls == []
    if kind == "bce_with_logits":
        arguments["recon"][:] = INF
        arguments["target"][:] = 1.0
        monkeypatch.setattr(api, "PARTS_BELOW", 2**18)
        found = gk.vae_loss(**arguments)
        assert not found.recon.any()
        torch.testing.assert_close(found.loss, 0.25 * found.kl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_dtype(path: str, kind: str, dtype: torch.dtype) -> None:
    for reduction in ("batchmean", "none"):
        found = _check(_arguments(dtype=dtype, recon_loss=kind, reduction=reduction))
        assert {found[name].dtype for name in ("loss", "recon", "kl")} == {dtype}


def test_dtypes_promote(path: str) -> None:
    """A half-precision decoder beside a posterior in fp32, and beside one in fp64."""
    for half in (torch.float16, torch.bfloat16):
        for wide in (torch.float32, torch.float64):
            arguments = _arguments(dtype=half)
            arguments |= {name: arguments[name].to(wide) for name in ("mu", "logvar")}
            assert _check(arguments)["loss"].dtype == wide


SHAPES = {
    "one sample": ((1, 4), (1, 2)),
    "no dimension but the samples'": ((6,), (6,)),
    "more latents than pixels": ((3, 5), (3, 2 * BLOCK + 3)),
    "several programs and a tail": ((3, 2 * BLOCK + 5), (3, 7)),
    "aligned": ((4, BLOCK), (4, 16)),
    "latent maps": ((2, 3, 8, 6), (2, 4, 4, 3)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(path: str, name: str) -> None:
    shape, latent = SHAPES[name]
    for options in ({}, {"reduction": "none", "capacity": 5.0}):
        _check(_arguments(shape, latent, recon_loss="bce_with_logits", **options))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_loop_runs_twice(path: str, reduction: str) -> None:
    for capacity in (None, 30.0):
        _check(_arguments((5, 101), (5, 67), reduction=reduction, capacity=capacity))


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "samples fastest": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(path: str, name: str) -> None:
    """Of both operands of a term, then of the first alone."""
    arguments = _arguments((3, 5, 4, 6), (3, 2, 4, 4))
    for names in (TENSORS, ("recon", "mu")):
        given = arguments | {tensor: LAYOUTS[name](arguments[tensor]) for tensor in names}
        _check(given)
        _check(given | {"reduction": "none"})


def test_one_log_variance_for_all(path: str) -> None:
    arguments = _arguments()
    _check(arguments | {"logvar": torch.randn(9)})
    _check(arguments | {"logvar": torch.randn(5, 1), "capacity": 9.0})


@pytest.mark.parametrize("names", [("mu",), ("recon",), ("target", "logvar"), ("recon", "mu", "logvar")])
def test_only_what_is_asked_for(path: str, names: tuple[str, ...]) -> None:
    _check(_arguments(), names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_beta_on_the_device(path: str, reduction: str, dtype: torch.dtype) -> None:
    """A tensor gives the bits that the float gives, in any dtype that holds it."""
    arguments = _arguments(reduction=reduction, capacity=3.0)
    leaves = [arguments[name].requires_grad_() for name in TENSORS]
    results = []
    for beta in (0.75, torch.tensor(0.75, dtype=dtype)):
        loss = gk.vae_loss(**arguments, beta=beta).loss
        results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_terms_alone_take_no_part_of_the_other(path: str) -> None:
    """An infinite divergence leaves the reconstruction and its gradient alone."""
    arguments = _arguments()
    arguments["mu"][0, 0] = INF
    leaves = [arguments[name].requires_grad_() for name in TENSORS]
    found = gk.vae_loss(**arguments)
    assert found.kl == INF
    assert found.recon.isfinite()
    recon, _, mu, _ = torch.autograd.grad(found.recon, leaves, allow_unused=True)
    assert recon.isfinite().all()
    assert mu is None


def test_distance_from_capacity_at_its_kink(path: str) -> None:
    mu, logvar = torch.full((2, 2), 2.0, requires_grad=True), torch.zeros(2, 2)
    for capacity, slope in ((4.0, 0.0), (3.0, 2.0), (5.0, -2.0)):
        kl = gk.vae_loss(torch.zeros(2, 3), torch.zeros(2, 3), mu, logvar, capacity=capacity, reduction="none").kl
        assert kl.tolist() == [abs(4.0 - capacity)] * 2
        (grad,) = torch.autograd.grad(kl.sum(), mu)
        assert (grad == slope).all()


def test_known_failure_nan_beside_free_bits(path: str) -> None:
    """The loss was NaN, and its gradient 0."""
    mu = torch.full((4, 3), 2.0)
    mu[1, 2] = math.nan
    mu.requires_grad_()
    loss = gk.vae_loss(torch.zeros(4, 5), torch.ones(4, 5), mu, torch.ones(4, 3), free_bits=0.5).loss
    loss.backward()
    assert loss.isnan()
    assert mu.grad is not None
    assert mu.grad.isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("beta", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_no_beta_hides_an_infinite_divergence(path: str, beta: float | Tensor, reduction: str) -> None:
    """Of which fp64 holds the sum."""
    logvar = torch.tensor([[100.0, 0.0]], requires_grad=True)
    image = torch.zeros(1, 4)
    found = gk.vae_loss(image + 1.0, image, torch.zeros(1, 2), logvar, beta=beta, reduction=reduction)
    assert found.loss.isnan().all()
    assert found.kl.isinf().all()
    assert torch.autograd.grad(found.loss.sum(), logvar)[0].isnan().tolist() == [[True, False]]


def test_infinite_logits(path: str) -> None:
    recon = torch.tensor([[INF, -INF, INF, 1e4, -1e4]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]])
    found = gk.vae_loss(recon, target, torch.zeros(1, 2), torch.zeros(1, 2), recon_loss="bce_with_logits")
    assert found.loss == 0.0
    (grad,) = torch.autograd.grad(found.loss, recon)
    assert not grad.any()
    assert gk.vae_loss(recon, 1.0 - target, torch.zeros(1, 2), torch.zeros(1, 2), recon_loss="bce_with_logits").loss == INF


def test_probabilities_at_their_bounds(path: str) -> None:
    """Logarithms stop at -100 and the gradient's divisor at 1e-12, as torch's do."""
    recon = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1e-30, 1e-10]], requires_grad=True)
    target = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0]])
    latent = torch.zeros(1, 2)
    found = gk.vae_loss(recon, target, latent, latent, recon_loss="bce", reduction="sum").loss
    expected = F.binary_cross_entropy(recon, target, reduction="sum")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, recon), torch.autograd.grad(expected, recon))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(path: str, reduction: str) -> None:
    arguments = _arguments((0, 4), (0, 2), reduction=reduction, capacity=1.0)
    leaves = [arguments[name].requires_grad_() for name in TENSORS]
    # Without samples there is nothing that a kernel would store.
    gk.vae_loss(**_arguments())
    found = gk.vae_loss(**arguments)
    for result in found:
        assert result.shape == ((0,) if reduction == "none" else ())
        assert reduction == "none" or (result == 0.0 if reduction == "sum" else result.isnan())
    assert [g.shape for g in torch.autograd.grad(found.loss.sum(), leaves)] == [(0, 4), (0, 4), (0, 2), (0, 2)]


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [{}, {"capacity": 3.0, "free_bits": 0.1}, {"reduction": "none"}])
def test_two_launches_and_one(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing waits for the device, a tensor beta and its range included."""
    arguments = _arguments(beta=torch.tensor(2.0), recon_loss="bce", **options)
    leaves = [arguments[name].requires_grad_() for name in TENSORS]
    with gk.backend("triton"), gk.testing.count_launches() as launches, no_synchronisation(monkeypatch):
        loss = gk.vae_loss(**arguments).loss
        assert launches.total() == 2
        torch.autograd.grad(loss, leaves, torch.ones_like(loss))
    assert launches.total() == 3


@pytest.mark.parametrize("shape", [(7, 64), (7, 3, 5), (2, 1001)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_sum_by_products(shape: tuple[int, ...], scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager sum of logits' losses, made with the gradient or, where that lacks digits, for itself."""
    calls = []
    made = binary._total_and_gradient
    monkeypatch.setattr(binary, "_total_and_gradient", lambda *given: calls.append(1) or made(*given))
    for dtype in (torch.float32, torch.bfloat16):
        arguments = _arguments(shape, (shape[0], 3), dtype=dtype, recon_loss="bce_with_logits")
        arguments["recon"] *= scale
        _check(arguments, ("recon", "mu", "logvar"))
        # Sure and right: each element's loss is far below the rounding of a factor near 1. Torch's own keeps its digits
        # for positive logits alone.
        arguments["target"] = torch.ones(shape, dtype=dtype)
        arguments["recon"] = 10.0 + arguments["recon"].abs()
        _check(arguments, ("recon",))
    assert calls


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("number", [False, True], ids=["tensor", "number"])
def test_annealing_does_not_recompile(path: str, number: bool) -> None:
    """With numbers once, when dynamo sees the first one change."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, beta: float | Tensor) -> Tensor:
        return gk.vae_loss(recon, target, mu, logvar, beta=beta).loss

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    arguments = [_arguments()[name] for name in TENSORS]
    for beta in (0.1, 0.5, 1.0, 4.0, 0.0):
        value = beta if number else torch.tensor(beta)
        torch.testing.assert_close(compiled(*arguments, value), step(*arguments, value))
    assert counter.frame_count == 1 + number
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"capacity": 2.0}, {"reduction": "none"}], ids=["plain", "capacity", "none"])
def test_autocast_on_a_cpu_is_fp32(dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where fp16 does not hold the sum."""
    arguments = _arguments((2, 300), (2, 3), dtype=dtype) | options
    arguments["recon"] += 40.0
    exact = _oracle(**{k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()})
    for below in (0, 2**18):
        monkeypatch.setattr(api, "PARTS_BELOW", below)
        with gk.backend("eager"), torch.autocast("cpu", dtype):
            found = gk.vae_loss(**arguments)
        for name, wanted in exact.items():
            assert getattr(found, name).dtype == torch.float32
            torch.testing.assert_close(getattr(found, name), wanted.float())


def test_module() -> None:
    arguments = [_arguments()[name] for name in TENSORS]
    options: dict[str, Any] = {"recon_loss": "l1", "reduction": "sum", "free_bits": 0.2, "capacity": 3.0}
    module = gk.VAELoss(beta=2.0, **options)
    assert module(*arguments) == gk.vae_loss(*arguments, beta=2.0, **options)
    assert module(*arguments, beta=3.0) == gk.vae_loss(*arguments, beta=3.0, **options)
    assert repr(module) == "VAELoss(recon_loss='l1', beta=2.0, reduction='sum', free_bits=0.2, capacity=3.0)"


BAD = {
    "recon": [
        ([1.0], TypeError, "recon must be a Tensor, not list"),
        (torch.ones(5, 3, 7).long(), NotImplementedError, "recon"),
    ],
    "target": [(torch.ones(5, 21), ValueError, r"target must have the shape \[5, 3, 7\] of recon, got \[5, 21\]")],
    "mu": [
        (torch.ones(4, 9), RuntimeError, r"do not broadcast together: mu \[4, 9\], logvar \[5, 9\]"),
        (None, TypeError, "mu must be a Tensor"),
        (torch.ones(5, 9, device="meta"), RuntimeError, "mu must be on the input's device"),
    ],
    "recon_loss": [("huber", ValueError, "huber is not a valid value for recon_loss"), (None, ValueError, "recon_loss")],
    "reduction": [("batch", ValueError, "batch is not a valid value for reduction")],
    "beta": [
        (-0.5, ValueError, "beta must not be negative, got -0.5"),
        (math.nan, ValueError, "beta must not be negative, got nan"),
        ("1", TypeError, "beta must be a number"),
        (torch.tensor(-0.5), ValueError, "beta must not be negative"),
        (torch.ones(1), ValueError, r"beta must be a number or a 0-d tensor, got shape \[1\]"),
        (torch.tensor(1), NotImplementedError, "beta must be a real floating point"),
        (torch.tensor(1.0, requires_grad=True), RuntimeError, "beta, which has requires_grad=True"),
        (torch.tensor(1.0, device="meta"), RuntimeError, "beta must be on the input's device"),
    ],
    "free_bits": [
        (-1.0, ValueError, "free_bits must not be negative, got -1.0"),
        ("1", TypeError, "free_bits must be a number"),
    ],
    "capacity": [
        (-1.0, ValueError, "capacity must not be negative, got -1.0"),
        (True, TypeError, "capacity must be a number"),
    ],
}


@pytest.mark.parametrize(("name", "value", "error", "message"), [(n, *row) for n, rows in BAD.items() for row in rows])
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_bad_input(backend: str, name: str, value: Any, error: type[Exception], message: str) -> None:
    with gk.backend(backend), refused("vae_loss", {name: value}, error, message):
        gk.vae_loss(**(_arguments() | {name: value}))


def test_bad_shapes_and_probabilities() -> None:
    with pytest.raises(ValueError, match="as many samples along dimension 0, got 5 and 4"):
        gk.vae_loss(**_arguments(latent=(4, 9)))
    with pytest.raises(ValueError, match="must have samples along dimension 0"):
        gk.vae_loss(**_arguments((), ()))
    good = _arguments(recon_loss="bce")
    for name in ("recon", "target"):
        with pytest.raises(RuntimeError, match=f"{name} should be between 0 and 1.*a range of -?[0-9.]+ to 1.5"):
            gk.vae_loss(**(good | {name: good[name].clone().index_fill_(0, torch.tensor([2]), 1.5)}))


@pytest.mark.parametrize("wide", TENSORS)
def test_known_failure_one_operand_in_double_precision(wide: str) -> None:
    """What the other term kept for its backward was never written."""
    arguments = _arguments(reduction="mean")
    arguments[wide] = arguments[wide].double()
    leaves = [arguments[name].requires_grad_() for name in TENSORS]
    junk = [torch.full((n,), 1e30) for n in range(1, 200)]
    del junk
    found = torch.autograd.grad(gk.vae_loss(**arguments).loss, leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = torch.autograd.grad(gk.vae_loss(**arguments | dict(zip(TENSORS, exact, strict=True))).loss, exact)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-9)


def test_nan_hides_no_probability() -> None:
    bad = torch.tensor([[float("nan"), 2.0]])
    with pytest.raises(RuntimeError, match="all elements of recon should be between 0 and 1"):
        gk.vae_loss(bad, torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), recon_loss="bce")
