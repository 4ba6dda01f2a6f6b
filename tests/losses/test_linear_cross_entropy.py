"""Linear cross entropy on both paths against float64: chunks, both ways to the gradient, and what others got wrong."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import genloss_kernels as gk
from genloss_kernels.cases.linear_cross_entropy import linear_cross_entropy_oracle as _oracle
from genloss_kernels.core import launch, scaling, scratch
from genloss_kernels.core.backend import INTERPRETED
from genloss_kernels.losses.linear_cross_entropy import api, chunks, flops, functions, options

from ..refusals import refused
from .comparison import HALVES, aligned, check, check_outputs, check_second_derivatives

NAN = math.nan
LAYER = ("input", "linear_weight", "linear_bias")


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(options.DEFAULT_ROWS, "cpu", 8)
    monkeypatch.setitem(options.DEFAULT_ROWS, "cuda", 8)
    monkeypatch.setattr(options, "WHOLE_BATCH", 4)
    monkeypatch.setattr(api, "LOGITS_BELOW", 0)


def _labels(n_rows: int = 20, n_classes: int = 300, width: int = 12, bias: bool = True, **rest: Any) -> dict[str, Any]:
    target = torch.randint(n_classes, (n_rows,))
    target[1::3] = rest.get("ignore_index", -100)
    given = {"input": torch.randn(n_rows, width), "linear_weight": torch.randn(n_classes, width) * 0.5, "target": target}
    return given | ({"linear_bias": torch.randn(n_classes)} if bias else {}) | rest


def _probabilities(n_rows: int = 20, n_classes: int = 300, **rest: Any) -> dict[str, Any]:
    return _labels(n_rows, n_classes, **rest) | {"target": torch.softmax(torch.randn(n_rows, n_classes), 1)}


def _in(dtype: torch.dtype, given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


KINDS = {"labels": (_labels, LAYER), "probabilities": (_probabilities, (*LAYER, "target"))}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.125},
    "softcap, scale, z-loss": {"softcap": 3.0, "logit_scale": 0.5, "z_loss": 0.01},
    "class weight": {"weight": lambda: torch.rand(300) + 0.5},
    "row weight": {"row_weight": lambda: torch.rand(20) + 0.5},
    "everything": {
        "label_smoothing": 0.125, "softcap": 3.0, "z_loss": 0.01,
        "weight": lambda: torch.rand(300) + 0.5, "row_weight": lambda: torch.rand(20) + 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_options(path: str, kind: str, reduction: str, name: str) -> None:
    make, differentiable = KINDS[kind]
    drawn = {key: value() if callable(value) else value for key, value in OPTIONS[name].items()}
    check(gk.linear_cross_entropy, _oracle, make(reduction=reduction, **drawn), differentiable)


HELD, FUSED = "_cross_entropy_loss_and_gradient_held_kernel", "_cross_entropy_loss_and_gradient_kernel"


@pytest.mark.interpreter
@pytest.mark.parametrize("n_classes", [520, 1203])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_launch_makes_loss_and_gradient(kind: str, name: str, n_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chunk, in rows of several tiles, aligned and not, and in both ways that the divisor comes."""
    monkeypatch.setattr(launch, "_HELD_ROW", dict.fromkeys((2, 4, 8), (1, 1)))
    monkeypatch.setattr(launch, "long_row_tile", lambda *_, **__: None)
    monkeypatch.setattr(launch, "row_tile", lambda *_, **__: launch.Tile(256, 4))
    monkeypatch.setattr(launch, "splits", lambda *_: 1)
    make, differentiable = KINDS[kind]
    drawn = {key: value() if callable(value) else value for key, value in OPTIONS[name].items()}
    if "weight" in drawn:
        drawn["weight"] = torch.rand(n_classes) + 0.5
    if "row_weight" in drawn:
        drawn["row_weight"] = torch.rand(10) + 0.5
    for rest in ({}, {"divisor": 7.5}, {"reduction": "sum"}) if name == "plain" else ({},):
        given = make(n_rows=10, n_classes=n_classes, **drawn, **rest)
        with gk.backend("triton"), gk.testing.count_launches() as launches:
            check(gk.linear_cross_entropy, _oracle, given, differentiable, products=True)
        assert launches == {FUSED: 2, "_scale_kernel": 1}


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.125}, {"logit_scale": 0.75, "z_loss": 2.0**-9}])
def test_rows_that_a_program_holds(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient takes the place of logits that are read once; a softcap needs them again."""
    monkeypatch.setattr(launch, "splits", lambda *_: 1)
    for n_classes in (520, 1203):
        with gk.backend("triton"), gk.testing.count_launches() as launches:
            check(gk.linear_cross_entropy, _oracle, _labels(10, n_classes, **options), LAYER, products=True)
        assert launches == {HELD: 2, "_scale_kernel": 1}
    with gk.backend("triton"), gk.testing.count_launches() as launches:
        check(gk.linear_cross_entropy, _oracle, _labels(10, 520, softcap=8.0, **options), LAYER, products=True)
    assert launches == {FUSED: 2, "_scale_kernel": 1}


@pytest.mark.interpreter
def test_rows_shared_among_programs_take_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "splits", lambda *_: 3)
    with gk.backend("triton"), gk.testing.count_launches() as launches:
        check(gk.linear_cross_entropy, _oracle, _labels(n_classes=2003), LAYER)
    assert FUSED not in launches
    assert launches["_cross_entropy_merge_kernel"] == 3


@pytest.mark.interpreter
def test_scaling_by_one_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of several programs each, of three sizes; NaN times 1 would be NaN all the same, so bits are compared."""
    monkeypatch.setattr(scaling, "_BLOCK", 64)
    tensors = [torch.randn(n) for n in (1, 64, 150)] + [torch.empty(0)]
    for factor in (1.0, -2.5):
        found = [t.clone() for t in tensors]
        with gk.testing.count_launches() as launches:
            scaling.scale_(found, torch.tensor(factor), triton=True)
        assert launches.total() == 1
        assert all(torch.equal(f, t * factor) for f, t in zip(found, tensors, strict=True))


@pytest.mark.parametrize("divisor", [7.5, torch.tensor(7.5)])
def test_divisor(path: str, divisor: Any) -> None:
    check(gk.linear_cross_entropy, _oracle, _labels(divisor=divisor), LAYER)


def test_row_weight_and_divisor_learn(path: str) -> None:
    given = _labels(row_weight=torch.rand(20) + 0.5, divisor=torch.tensor(7.5))
    check(gk.linear_cross_entropy, _oracle, given, (*LAYER, "row_weight", "divisor"))
    given = _labels(row_weight=torch.rand(20) + 0.5, weight=torch.rand(300) + 0.5)
    check(gk.linear_cross_entropy, _oracle, given, ("input", "row_weight"))


@pytest.mark.parametrize("kind", KINDS)
def test_statistics(path: str, kind: str) -> None:
    """Of every row, and differentiable: what losses of reinforcement learning are built from."""
    make, differentiable = KINDS[kind]

    def ours(**given: Any) -> dict[str, Tensor]:
        stats = gk.linear_cross_entropy(**given, return_stats=True)
        return {"loss": stats.loss, "lse": stats.lse, "log_prob": stats.log_prob, "entropy": stats.entropy}

    def theirs(**given: Any) -> dict[str, Tensor]:
        logits = F.linear(given["input"], given["linear_weight"], given["linear_bias"])
        target, log_p = given["target"], torch.log_softmax(logits, 1)
        counts = torch.ones(20) if kind == "probabilities" else (target != -100).to(logits)
        log_prob = (
            (log_p * target).sum(1) if kind == "probabilities" else log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
        )
        entropy = -(log_p.exp() * log_p).sum(1)
        rows = {"lse": torch.logsumexp(logits, 1), "log_prob": log_prob, "entropy": entropy}
        return {"loss": _oracle(**given)} | {name: row * counts.to(row) for name, row in rows.items()}

    check_outputs(ours, theirs, make(), differentiable)
    stats = gk.linear_cross_entropy(**make(), return_stats=True)
    assert stats.n_valid == (13 if kind == "labels" else 20)
    assert stats.n_correct <= stats.n_valid


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_precision(path: str, reduction: str) -> None:
    check(gk.linear_cross_entropy, _oracle, _in(torch.float64, _labels(reduction=reduction)), LAYER)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision(path: str, dtype: torch.dtype, reduction: str) -> None:
    """The rounding of the logits, which are torch's own, hides the rest: the error may be larger by an eighth."""
    given = _in(dtype, _labels(n_classes=2000, reduction=reduction))
    # Triton's interpreter cuts bits off where it stores bfloat16, which a GPU rounds.
    factor = 2.5 if path == "triton" and INTERPRETED and dtype == torch.bfloat16 else 1.125

    def gradients(loss: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: given[name].to(dtype).requires_grad_() for name in LAYER}
        rows = loss(**given | leaves)
        factors = torch.linspace(0.5, 1.5, rows.numel()).to(rows).reshape(rows.shape)
        return [rows.detach(), *torch.autograd.grad((rows * factors).sum(), list(leaves.values()))]

    exact, theirs, ours = (
        gradients(_oracle, torch.float64), gradients(_oracle, dtype), gradients(gk.linear_cross_entropy, dtype)
    )  # fmt: skip
    for e, a, b in zip(exact, theirs, ours, strict=True):
        assert b.dtype == dtype
        if e.dim():
            assert (b - e).norm() <= factor * (a - e).norm()


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 5)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_dimensions(path: str, shape: tuple[int, ...], reduction: str) -> None:
    n_rows = math.prod(shape)
    given = _labels(n_rows, reduction=reduction)
    given["target"][-1] = 5
    given |= {"input": given["input"].reshape(*shape, 12), "target": given["target"].reshape(shape)}
    check(gk.linear_cross_entropy, _oracle, given, LAYER)


def test_loss_of_several_dimensions(path: str) -> None:
    """A weight (V, d1, ..., D), as torch has it."""
    given = {"input": torch.randn(6, 5), "linear_weight": torch.randn(9, 2, 3, 5), "target": torch.randint(9, (6, 2, 3))}
    given["linear_bias"] = torch.randn(9, 2, 3)

    def theirs(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
        return F.cross_entropy(torch.einsum("nd,vabd->nvab", input, linear_weight) + linear_bias, target)

    check(gk.linear_cross_entropy, theirs, given, LAYER)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_of_several_dimensions_without_rows(reduction: str) -> None:
    weight = torch.randn(9, 2, 3, 5, requires_grad=True)
    target = torch.zeros(0, 2, 3, dtype=torch.int64)
    loss = gk.linear_cross_entropy(torch.zeros(0, 5), weight, target, reduction=reduction)
    wanted = F.cross_entropy(torch.zeros(0, 9, 2, 3), target, reduction=reduction)
    torch.testing.assert_close(loss, wanted, equal_nan=True)
    (grad,) = torch.autograd.grad(loss.sum(), weight)
    assert grad.shape == weight.shape


def test_strided_operands(path: str) -> None:
    given = _labels()
    given["input"] = torch.randn(20, 24)[:, ::2]
    given["linear_weight"] = torch.randn(12, 300).t()
    check(gk.linear_cross_entropy, _oracle, given, LAYER)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_known_failure_ignored_rows_of_nan(path: str, reduction: str) -> None:
    """0 * NaN would poison the whole gradient of the weight."""
    given = _labels(reduction=reduction)
    clean = copy.deepcopy(given)
    given["input"][given["target"] == -100] = NAN
    clean["input"][clean["target"] == -100] = 0.0
    for x in (given, clean):
        for name in LAYER:
            x[name].requires_grad_()
        gk.linear_cross_entropy(**x).sum().backward()
    for name in LAYER:
        assert torch.equal(given[name].grad, clean[name].grad)
    assert not given["input"].grad[1::3].any()


def test_all_ignored_and_no_rows(path: str) -> None:
    given = _labels()
    given["target"].fill_(-100)
    for reduction, expected in (("mean", NAN), ("sum", 0.0)):
        given["linear_weight"].requires_grad_().grad = None
        loss = gk.linear_cross_entropy(**given, reduction=reduction)
        assert loss.isnan() if math.isnan(expected) else loss == expected
        loss.backward()
        assert not given["linear_weight"].grad.any()
    empty = given | {"input": torch.empty(0, 12), "target": torch.empty(0, dtype=torch.int64)}
    assert gk.linear_cross_entropy(**empty, reduction="none").shape == (0,)
    total = gk.linear_cross_entropy(**empty, reduction="sum")
    total.backward()
    assert total == 0.0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_known_failure_retained_graph(path: str, reduction: str) -> None:
    """A gradient made in forward is given away once; the next backward makes the same bits again."""
    given = _labels(reduction=reduction)
    leaves = [given[name].requires_grad_() for name in LAYER]
    loss = (gk.linear_cross_entropy(**given) * 3.0).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for again in (torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(loss, leaves)):
        assert all(map(torch.equal, again, kept))


def test_second_derivatives() -> None:
    for reduction in ("mean", "none"):
        given = _labels(7, 11, reduction=reduction, softcap=3.0, z_loss=0.1)
        check_second_derivatives(gk.linear_cross_entropy, _oracle, given, LAYER)


@pytest.mark.interpreter
def test_second_derivatives_of_the_kernels() -> None:
    with gk.backend("triton"):
        check_second_derivatives(gk.linear_cross_entropy, _oracle, _labels(7, 11), LAYER)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_of_gradients(reduction: str) -> None:
    given = _labels(reduction=reduction)
    leaves = [given[name].requires_grad_() for name in LAYER]
    upstream = torch.tensor([3.0, -2.0])
    loss = gk.linear_cross_entropy(**given).sum()
    batch = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=True)
    once = torch.autograd.grad(loss, leaves)
    for found, each in zip(batch, once, strict=True):
        torch.testing.assert_close(found, torch.stack([3.0 * each, -2.0 * each]))


def test_statistics_that_nothing_came_of_take_no_gradient(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros for them would cost what a gradient costs, and beside an infinite one give NaN."""
    seen = []
    real = functions.linear_cross_entropy_rows_backward

    def watched(*arguments: Any) -> Any:
        seen.append([g is None for g in arguments[8:12]])
        return real(*arguments)

    monkeypatch.setattr(functions, "linear_cross_entropy_rows_backward", watched)
    given = _labels(reduction="none") | {"return_stats": True}
    given["input"].requires_grad_()
    gk.linear_cross_entropy(**given).loss.sum().backward()
    gk.linear_cross_entropy(**given).lse.sum().backward()
    assert seen == [[False, True, True, True], [True, False, True, True]]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_batch_of_second_derivatives(whole: bool, reduction: str) -> None:
    """What a vectorised Hessian asks for; in chunks too."""
    given = _labels(40, 11, reduction=reduction) | {"options": gk.LinearCrossEntropyOptions(batch_chunk_size=8)}
    leaves = [given[name].requires_grad_() for name in LAYER]
    gradients = torch.autograd.grad(gk.linear_cross_entropy(**given).sum(), leaves, create_graph=True)
    directions = [torch.randn(3, *g.shape) for g in gradients]
    used = slice(None) if whole else slice(1)
    one_by_one = [
        torch.autograd.grad(gradients[used], leaves, [d[k] for d in directions[used]], retain_graph=True) for k in range(3)
    ]
    batch = torch.autograd.grad(gradients[used], leaves, directions[used], is_grads_batched=True)
    for found, each in zip(batch, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(each))


def _largest_allocation(run: Callable[[], Any]) -> int:
    """In bytes, by one operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("transform", ["create_graph", "func.grad"])
def test_further_derivatives_never_hold_all_logits(transform: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "POOLED_BUFFER", 0)
    n_rows, n_classes = 512, 1000
    given = _labels(n_rows, n_classes, 2, bias=False, reduction=reduction)
    target, leaves = given["target"], tuple(given[name].requires_grad_() for name in LAYER[:2])
    options = gk.LinearCrossEntropyOptions(batch_chunk_size=32)

    def loss(input: Tensor, linear_weight: Tensor) -> Tensor:
        return gk.linear_cross_entropy(input, linear_weight, target, reduction=reduction, options=options).sum()

    def run() -> None:
        if transform == "func.grad":
            torch.func.grad(loss, (0, 1))(*(leaf.detach() for leaf in leaves))
        else:
            slopes = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
            torch.autograd.grad(sum(s.square().sum() for s in slopes), leaves)

    assert 32 * n_classes * 4 <= _largest_allocation(run) < n_rows * n_classes * 4 / 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inputs_are_unchanged(path: str, kind: str, reduction: str) -> None:
    make, differentiable = KINDS[kind]
    given = make(reduction=reduction)
    before = copy.deepcopy(given)
    loss = gk.linear_cross_entropy(**{k: v.requires_grad_() if k in differentiable else v for k, v in given.items()})
    loss.sum().backward()
    for name, tensor in before.items():
        assert not isinstance(tensor, Tensor) or torch.equal(given[name], tensor), name


@pytest.mark.parametrize("learning", [("input",), ("linear_weight",), ("linear_bias",), ("input", "linear_bias")])
def test_nothing_is_computed_for_what_does_not_learn(path: str, learning: tuple[str, ...], monkeypatch: Any) -> None:
    made: list[chunks.Gradients] = []
    result = chunks._Sums.result
    monkeypatch.setattr(chunks._Sums, "result", lambda self: made.append(result(self)) or made[-1])
    check(gk.linear_cross_entropy, _oracle, _labels(), learning)
    for gradients in made:
        assert {name for name in LAYER if getattr(gradients, name) is not None} == set(learning)


def test_without_gradients_nothing_is_made(path: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(chunks, "_Sums", None)
    with torch.no_grad():
        given = {k: v.requires_grad_() if k in LAYER else v for k, v in _labels().items()}
        gk.testing.assert_close(
            gk.linear_cross_entropy(**given),
            _oracle(**_in(torch.float64, given)),
            _oracle(**given),
        )


@pytest.fixture
def logits_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each chunk."""
    seen: list[int] = []
    cut = chunks.equal_chunks

    def watched(n_rows: int, most: int) -> Iterator[slice]:
        for rows in cut(n_rows, most):
            seen.append(rows.stop - rows.start)
            yield rows

    monkeypatch.setattr(chunks, "equal_chunks", watched)
    return seen


def test_chunks_are_equal_and_never_the_whole_batch(logits_rows: list[int]) -> None:
    gk.linear_cross_entropy(**_labels(20))
    assert logits_rows == [7, 7, 6]
    for given, expected in (
        ({"batch_chunk_size": 19}, [10, 10]),
        ({"batch_chunk_size": 6}, [5] * 4),
        ({"memory_budget": 2 * 9 * 300 * 4}, [7, 7, 6]),
    ):
        logits_rows.clear()
        gk.linear_cross_entropy(**_labels(20), options=gk.LinearCrossEntropyOptions(**given))
        assert logits_rows == expected
    for dtype in HALVES:
        logits_rows.clear()
        budget = gk.LinearCrossEntropyOptions(memory_budget=4 * 9 * 300 * 2)
        gk.linear_cross_entropy(**_in(dtype, _labels(20)), options=budget)
        assert logits_rows == [7, 7, 6]


def test_torchs_own_options(logits_rows: list[int]) -> None:
    kind = getattr(torch.nn, "LinearCrossEntropyOptions", gk.LinearCrossEntropyOptions)
    check(gk.linear_cross_entropy, _oracle, _labels(), LAYER)
    logits_rows.clear()
    gk.linear_cross_entropy(**_labels(), options=kind(batch_chunk_size=10, chunking_method=None))
    assert logits_rows == [10, 10]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gathered_rows(path: str, reduction: str, logits_rows: list[int]) -> None:
    given = _labels(reduction=reduction, row_weight=torch.rand(20) + 0.5)
    gather = gk.LinearCrossEntropyOptions(gather_rows=True)
    check(lambda **g: gk.linear_cross_entropy(**g, options=gather), _oracle, given, LAYER)
    assert set(logits_rows) <= {6, 7}
    stats = gk.linear_cross_entropy(**given, options=gather, return_stats=True)
    whole = gk.linear_cross_entropy(**given, return_stats=True)
    gk.testing.assert_close(stats.lse, whole.lse.double())
    assert stats.n_valid == whole.n_valid


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_rows_are_not_gathered_where_their_number_may_not_be_known() -> None:
    given, options = _labels(bias=False), gk.LinearCrossEntropyOptions(gather_rows=True)
    x, w, target = given["input"], given["linear_weight"], given["target"]
    wanted = gk.linear_cross_entropy(x, w, target)
    compiled = torch.compile(gk.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, target, options=options), wanted)
    twice = torch.func.vmap(lambda rows, labels: gk.linear_cross_entropy(rows, w, labels, options=options))
    torch.testing.assert_close(twice(torch.stack([x, x]), torch.stack([target, target])), torch.stack([wanted, wanted]))


def test_chunk_size_does_not_change_the_result(path: str) -> None:
    given = _labels(reduction="none")
    for size in (1, 7, 20):
        check(gk.linear_cross_entropy, _oracle, given, LAYER)
        rows = gk.linear_cross_entropy(**given, options=gk.LinearCrossEntropyOptions(batch_chunk_size=size))
        gk.testing.assert_close(rows, _oracle(**_in(torch.float64, given)), _oracle(**given))


def test_ten_runs_give_the_same_bits(path: str) -> None:
    given = _labels()
    runs = []
    for _ in range(10):
        leaves = [given[name].detach().requires_grad_() for name in LAYER]
        loss = gk.linear_cross_entropy(**given | dict(zip(LAYER, leaves, strict=True)))
        runs.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_activation_checkpointing(path: str) -> None:
    given = _labels()
    hidden, weight = given["input"].requires_grad_(), given["linear_weight"].requires_grad_()

    def loss(hidden: Tensor) -> Tensor:
        return gk.linear_cross_entropy(hidden.tanh(), weight, given["target"])

    wanted = torch.autograd.grad(loss(hidden), [hidden, weight])
    found = torch.autograd.grad(checkpoint(loss, hidden, use_reentrant=False), [hidden, weight])
    assert all(map(torch.equal, found, wanted))


def test_autocast(path: str, device: torch.device) -> None:
    given = _labels()
    leaves = [given[name].requires_grad_() for name in LAYER]
    with torch.autocast(device.type, torch.bfloat16):
        loss = gk.linear_cross_entropy(**given)
        like = _oracle(**given)
    assert loss.dtype == torch.float32
    exact = _oracle(**_in(torch.float64, given))
    gk.testing.assert_close(loss, exact, like)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, leaves))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(path: str, compiler: str, reduction: str) -> None:
    """One graph for every number of rows, ignored ones among them."""
    torch._dynamo.reset()

    def step(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        return gk.linear_cross_entropy(input, linear_weight, target, reduction=reduction).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for n_rows in (20, 12, 17):
        given = _labels(n_rows, bias=False)
        leaves = [given["input"].requires_grad_(), given["linear_weight"].requires_grad_()]
        found, wanted = compiled(*leaves, given["target"]), step(*leaves, given["target"])
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves))


def test_functional_transforms() -> None:
    given = _labels(bias=False)
    x, w, target = given["input"], given["linear_weight"], given["target"]
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    wanted = torch.autograd.grad(gk.linear_cross_entropy(*leaves, target), leaves)
    torch.testing.assert_close(torch.func.grad(gk.linear_cross_entropy, (0, 1))(x, w, target), wanted)
    rows = torch.func.vmap(lambda row, label: gk.linear_cross_entropy(row, w, label))(x, target.clamp(min=0))
    torch.testing.assert_close(rows, F.cross_entropy(x @ w.t(), target.clamp(min=0), reduction="none"))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "width": ({"linear_weight": torch.ones(300, 11)}, RuntimeError, "expected equal input and linear_weight last"),
    "bias": ({"linear_bias": torch.ones(299)}, RuntimeError, "expected linear_bias shape"),
    "bias dtype": ({"linear_bias": torch.ones(300, dtype=torch.float64)}, RuntimeError, "linear_bias must have the input's"),
    "weight dtype": ({"linear_weight": torch.ones(300, 12).double()}, RuntimeError, "linear_weight must have the input's"),
    "integer weight": ({"linear_weight": torch.ones(300, 12).long()}, NotImplementedError, "linear_weight must be"),
    "empty weight": ({"linear_weight": torch.ones(0)}, RuntimeError, "is empty: if its parameters are sharded"),
    "vector weight": ({"linear_weight": torch.ones(12)}, RuntimeError, r"linear_weight must have shape \(V, D\)"),
    "scalar input": ({"input": torch.ones(())}, RuntimeError, "0-d"),
    "batch": ({"target": torch.zeros(19).long()}, ValueError, r"input batch_size \(\[20\]\) .* batch_size \(\[19\]\)"),
    "target shape": ({"target": torch.zeros(20, 2).long()}, RuntimeError, "target of class indices must have the shape"),
    "probability shape": ({"target": torch.zeros(20, 299)}, RuntimeError, "target of probabilities must have the shape"),
    "label": ({"target": torch.full((20,), 300)}, IndexError, "Target 300 is out of bounds"),
    "ignore_index with probabilities": (
        {"target": torch.zeros(20, 300), "ignore_index": 3}, RuntimeError, "ignore_index cannot be specified",
    ),
    "reduction": ({"reduction": "batchmean"}, ValueError, "reduction"),
    "scale": ({"logit_scale": NAN}, ValueError, "logit_scale must be finite"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be positive"),
    "row weight": ({"row_weight": torch.ones(19)}, ValueError, "row_weight must have the shape"),
    "divisor": ({"divisor": 3.0, "reduction": "sum"}, ValueError, "divisor"),
    "shard": ({"vocab_shard": object()}, TypeError, "vocab_shard must be a .*VocabShard, not object"),
    "options": ({"options": 5}, TypeError, "options must be a LinearCrossEntropyOptions"),
    "budget": ({"options": gk.LinearCrossEntropyOptions(memory_budget=100)}, ValueError, "too small for one row"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("chosen", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_bad_input(chosen: str, name: str) -> None:
    given, error, message = BAD[name]
    with gk.backend(chosen), refused("linear_cross_entropy", given, error, message):
        gk.linear_cross_entropy(**_labels() | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"acc_policy": "exact"}, "invalid acc_policy"),
        ({"chunking_method": "rows"}, "invalid chunking_method"),
        ({"chunking_method": "aspect_ratio:0"}, "invalid chunking_method"),
        ({"batch_chunk_size": 0}, "batch_chunk_size must be positive"),
        ({"memory_budget": True}, "memory_budget must be positive"),
        ({"acc_dtype": torch.int32}, "acc_dtype must be"),
    ],
)
def test_bad_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.LinearCrossEntropyOptions(**given)


@pytest.mark.parametrize(("reduction", "products"), [("mean", 3), ("none", 4)])
def test_operations_are_counted(reduction: str, products: int) -> None:
    """6 N V D with the gradients made in the forward, 8 where logits are computed again; less for a frozen head."""
    given = _labels(bias=False, reduction=reduction)
    for learning, fewer in (("input", "linear_weight"), 0), (("input",), 1):
        leaves = {name: given[name].detach().requires_grad_(name in learning) for name in ("input", "linear_weight")}
        with FlopCounterMode(display=False) as counter:
            gk.linear_cross_entropy(**given | leaves).sum().backward()
        assert counter.get_total_flops() == 2 * 20 * 300 * 12 * (products - fewer)


def test_module(path: str) -> None:
    module = gk.LinearCrossEntropyLoss(12, 300, bias=True, weight=torch.rand(300) + 0.5, z_loss=0.01)
    assert isinstance(module, getattr(torch.nn, "LinearCrossEntropyLoss", torch.nn.Module))
    given = _labels()
    own = {"linear_weight": module.linear.weight, "linear_bias": module.linear.bias, "weight": module.weight}
    wanted = gk.linear_cross_entropy(**given | own, z_loss=0.01)
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(given["input"], given["target"]), wanted)


def test_fused_head(path: str) -> None:
    linear = torch.nn.Linear(12, 300)
    head = gk.FusedLMHead.from_linear(linear, softcap=3.0)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    given = _labels()
    assert torch.equal(head(given["input"]), linear(given["input"]))
    loss = head(given["input"], given["target"], z_loss=0.01)
    direct = {"linear_weight": linear.weight, "linear_bias": linear.bias, "softcap": 3.0, "z_loss": 0.01}
    assert torch.equal(loss, gk.linear_cross_entropy(**given | direct))
    with pytest.raises(TypeError, match=r"torch.nn.Linear, not Embedding"):
        gk.FusedLMHead.from_linear(torch.nn.Embedding(3, 4))  # pyright: ignore[reportArgumentType]
    assert not gk.FusedLMHead.from_linear(linear.eval()).training
    weighted = gk.FusedLMHead.from_linear(linear.double(), weight=torch.rand(300) + 0.5).double()
    wide = _in(torch.float64, given)
    direct = {"linear_weight": linear.weight, "linear_bias": linear.bias, "weight": weighted.class_weight}
    assert torch.equal(weighted(wide["input"], wide["target"]), gk.linear_cross_entropy(**wide | direct))
    with pytest.raises(TypeError, match="soft_cap"):
        gk.FusedLMHead(3, 4, soft_cap=1.0)


def test_known_failure_probability_near_one(path: str) -> None:
    """p - 1 keeps its digits where the label has almost all the mass: 1 - p is 2.5e-4 and 8e-8."""
    given = _labels(bias=False, reduction="sum")
    given["target"] = torch.arange(20)
    given["linear_weight"] = torch.eye(300, 12).clone()
    given["target"].clamp_(max=11)
    for logit in (14.0, 22.0):
        given["input"] = torch.eye(12)[given["target"]] * logit
        check(gk.linear_cross_entropy, _oracle, given, ("input", "linear_weight"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_few_logits_of_a_cpu_are_whole(kind: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every option and statistics, as the chunks give them."""
    monkeypatch.setattr(api, "LOGITS_BELOW", 2**20)
    monkeypatch.setattr(options, "WHOLE_BATCH", 256)
    make, differentiable = KINDS[kind]
    drawn = {key: value() if callable(value) else value for key, value in OPTIONS["everything"].items()}
    given = make(reduction=reduction, **drawn)
    given = {k: v.reshape(4, 5, *v.shape[1:]) if k in ("input", "target", "row_weight") else v for k, v in given.items()}
    if kind == "labels":
        given["input"][given["target"] == -100] = NAN
    with monkeypatch.context() as patch:
        patch.setattr(api, "_compute", None)
        check(gk.linear_cross_entropy, _clean_oracle, given, differentiable)
        whole = gk.linear_cross_entropy(**given, return_stats=True)
    monkeypatch.setattr(api, "LOGITS_BELOW", 0)
    for ours, theirs in zip(whole, gk.linear_cross_entropy(**given, return_stats=True), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("given", [{"batch_chunk_size": 4}, {"memory_budget": 2 * 4 * 300 * 4}])
def test_few_logits_are_in_chunks_where_that_is_asked_for(given: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "LOGITS_BELOW", 2**20)
    monkeypatch.setattr(api, "_by_logits", None)
    check(gk.linear_cross_entropy, _oracle, _labels(options=gk.LinearCrossEntropyOptions(**given)), LAYER)


def _clean_oracle(input: Tensor, **rest: Any) -> Tensor:
    return _oracle(input.nan_to_num(0.0), **rest)


def test_known_failure_weight_gradient_summed_in_half_precision(path: str) -> None:
    """Over 64 chunks, whose products all point the same way: sums in bfloat16 would stop growing."""
    given = _in(torch.bfloat16, _labels(128, 300, bias=False, reduction="sum"))
    given |= {"input": given["input"].abs() + 0.5, "target": torch.full((128,), 7)}
    gradients = []
    for size in (2, 128):
        leaf = given["linear_weight"].detach().requires_grad_()
        options = gk.LinearCrossEntropyOptions(batch_chunk_size=size)
        (grad,) = torch.autograd.grad(gk.linear_cross_entropy(**given | {"linear_weight": leaf}, options=options), leaf)
        gradients.append(grad.double())
    many, one = gradients
    assert (many - one).norm() <= 2.0**-9 * one.norm()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_dtype_of_accumulation(reduction: str) -> None:
    """Triton's interpreter stores bfloat16 less exactly, and the sum is torch's on either path."""
    given = _in(torch.bfloat16, _labels(64, 300, bias=False, reduction=reduction)) | {"target": torch.full((64,), 7)}
    errors = []
    for acc_dtype in (None, torch.float32, torch.bfloat16):
        leaf = given["linear_weight"].detach().requires_grad_()
        options = gk.LinearCrossEntropyOptions(batch_chunk_size=2, acc_dtype=acc_dtype)
        (found,) = torch.autograd.grad(
            gk.linear_cross_entropy(**given | {"linear_weight": leaf}, options=options).sum(), leaf
        )
        wide = {**_in(torch.float64, given), "linear_weight": leaf.detach().double().requires_grad_()}
        (wanted,) = torch.autograd.grad(_oracle(**wide).sum(), wide["linear_weight"])
        errors.append(float((found.double() - wanted).norm() / wanted.norm()))
    assert errors[0] == errors[1]
    assert errors[2] > 1.5 * errors[0]
    for asked in (torch.float64, torch.float16):
        options = gk.LinearCrossEntropyOptions(acc_dtype=asked)
        with pytest.raises(RuntimeError, match=r"acc_dtype must be torch.bfloat16 or torch.float32"):
            gk.linear_cross_entropy(**given, options=options)


def test_known_failure_loss_scale(path: str) -> None:
    """The gradients of fp16, divided by many tokens, are 0 before a loss scale, and the scale itself is infinite in fp16."""
    given = _labels(divisor=2.0**20) | {"target": torch.randint(300, (20,))}
    half = _in(torch.float16, given)
    for scale in (2.0**16, 2.0**20):
        gradients = []
        for loss, arguments in ((gk.linear_cross_entropy, half), (_oracle, _in(torch.float64, half))):
            leaves = {name: arguments[name].requires_grad_() for name in LAYER}
            with torch.autocast("cpu", torch.float16, enabled=arguments is half):  # whose loss is fp32
                value = loss(**arguments | leaves)
            gradients.append([g.double() for g in torch.autograd.grad(value * scale, list(leaves.values()))])
        for found, wanted in zip(*gradients, strict=True):
            assert (found - wanted).norm() <= 4e-3 * wanted.norm()


def test_upstream_gradient_is_not_rounded() -> None:
    """1.0039 is 1 in bfloat16, and would be so for the whole gradient. Triton's interpreter stores less exactly."""
    given = _in(torch.bfloat16, _labels(bias=False, reduction="sum"))
    leaf = given["linear_weight"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # whose loss is fp32
        loss = gk.linear_cross_entropy(**given | {"linear_weight": leaf})
    one, more = (torch.autograd.grad(loss * factor, leaf, retain_graph=True)[0].double() for factor in (1.0, 1.0039))
    assert abs(more.abs().sum() / one.abs().sum() - 1.0039) < 2.5e-3


@pytest.mark.parametrize("rest", [{"reduction": "none"}, {"reduction": "sum", "return_stats": True}])
def test_no_rows_have_a_gradient_of_0(rest: dict[str, Any]) -> None:
    """Nor those that gathering leaves; there is nothing to launch."""
    options = gk.LinearCrossEntropyOptions(gather_rows=True)
    for given in (_labels(0), _labels(9, options=options) | {"target": torch.full((9,), -100)}):
        leaves = {name: given[name].requires_grad_() for name in LAYER}
        result = gk.linear_cross_entropy(**given | leaves | rest)
        loss = result if isinstance(result, Tensor) else result.loss
        assert not any(g.any() for g in torch.autograd.grad(loss.sum(), list(leaves.values())))


# Dynamo makes an instance of every Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_once_for_all_lengths(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "WHOLE_BATCH", 256)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gk.linear_cross_entropy, fullgraph=True, dynamic=True, backend=counter)
    for n_rows in (10, 200, 300, 500, 700):
        given = _labels(n_rows, 40, reduction=reduction)
        torch.testing.assert_close(compiled(**given), gk.linear_cross_entropy(**given))
    assert counter.frame_count <= 2


def test_dtype_of_wider_probabilities() -> None:
    given = _probabilities()
    given["target"] = given["target"].double()
    logits = F.linear(given["input"], given["linear_weight"], given["linear_bias"])
    assert gk.linear_cross_entropy(**given).dtype == F.cross_entropy(logits, given["target"]).dtype


def test_known_failure_micro_batches_of_unequal_length(path: str) -> None:
    """A divisor counts the labels of all micro-batches, where a mean of means would weigh the short one's more."""
    given = _labels(divisor=13.0)

    def accumulated(input: Tensor, target: Tensor, **rest: Any) -> Tensor:
        parts = [slice(0, 15), slice(15, 20)]
        return torch.stack([gk.linear_cross_entropy(input[p], target=target[p], **rest) for p in parts]).sum()

    def whole(divisor: float, **rest: Any) -> Tensor:
        return _oracle(**rest)

    assert (given["target"] != -100).sum() == 13
    check(accumulated, whole, given, LAYER)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_label_out_of_range_on_a_device(path: str, reduction: str) -> None:
    """Its row and the gradient of the layer are NaN, and nothing else is."""
    given = _labels(bias=False, reduction=reduction)
    given["target"][4] = 300
    leaves = {name: given[name].detach().requires_grad_() for name in ("input", "linear_weight")}
    with gk.testing.device_semantics():
        rows = gk.linear_cross_entropy(**given | leaves)
        input, weight = torch.autograd.grad(rows.sum(), list(leaves.values()))
    assert rows.isnan().any()
    for result in (rows, input[:, 0]) if reduction == "none" else (input[:, 0],):
        assert result.isnan().nonzero().tolist() == [[4]]
    assert weight.isnan().all()


def test_aligned_classes(path: str) -> None:
    given = _labels(bias=False)
    given["input"], given["linear_weight"] = aligned(20, 16), aligned(304, 16)
    check(gk.linear_cross_entropy, _oracle, given, ("input", "linear_weight"))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("place", range(3))
def test_known_failure_compiled_second_derivative_of_constants(place: int, reduction: str, stats: bool) -> None:
    """In each operand, whatever views and copies of it are made on the way, beside a loss that has a gradient of its own."""
    torch._dynamo.reset()
    given = _labels(12)
    # AOT autograd itself forgets what a saved tensor is a view of.
    given["input"] = given["input"].view(3, 4, -1).clone()
    leaves = [given[name].requires_grad_() for name in LAYER]

    def step(input: Tensor, linear_weight: Tensor, linear_bias: Tensor) -> Tensor:
        result = gk.linear_cross_entropy(
            input, linear_weight, given["target"].view(3, 4), linear_bias=linear_bias, reduction=reduction,
            return_stats=stats,
        )  # fmt: skip
        return result.entropy.sum() if isinstance(result, gk.CrossEntropyStats) else result.sum()

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    slopes = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss + slopes[0].square().sum(), leaves[place])


def test_reverse_over_reverse() -> None:
    given = _labels(5, 7, bias=False)
    x, w, target = (given[name].double() if name != "target" else given[name] for name in (*LAYER[:2], "target"))
    for reduction in ("mean", "none"):

        def loss(x: Tensor, reduction: str = reduction) -> Tensor:
            return gk.linear_cross_entropy(x, w, target, reduction=reduction).sum()

        wanted = torch.autograd.functional.hessian(loss, x)
        for found in (torch.func.jacrev(torch.func.jacrev(loss))(x), torch.func.jacrev(torch.func.grad(loss))(x)):
            torch.testing.assert_close(found, wanted)


def test_second_derivative_where_the_target_alone_learns() -> None:
    """Of which the log-sum-exp and the entropy are no functions."""
    given = _probabilities(7, 11)
    target = given.pop("target").double().requires_grad_()
    given = _in(torch.float64, given)
    for loss in (gk.linear_cross_entropy, _by_cross_entropy):
        stats = loss(**given, target=target, return_stats=True)
        value = (stats.loss * stats.log_prob.sum() + stats.lse.mean() + stats.entropy.sum()) ** 2
        (slope,) = torch.autograd.grad(value, target, create_graph=True)
        assert torch.autograd.grad(slope.sum(), target)[0].isfinite().all()


def _by_cross_entropy(input: Tensor, linear_weight: Tensor, linear_bias: Tensor, **rest: Any) -> Any:
    return gk.cross_entropy(F.linear(input, linear_weight, linear_bias), **rest)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # of what a closure holds
@pytest.mark.parametrize("classes", [7, 300])
def test_fake_tensors_and_recordings(classes: int) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    given = _labels(9, classes)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in given.items()}
        leaves = [fake[name].requires_grad_() for name in LAYER]
        gk.linear_cross_entropy(**fake).backward()
        gk.cross_entropy(F.linear(*leaves), fake["target"]).backward()
        assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]
    tensors = tuple(given[name] for name in LAYER)
    tensors = (*tensors, given["target"])
    graph = make_fx(lambda x, w, b, t: gk.linear_cross_entropy(x, w, t, linear_bias=b))(*tensors)
    torch.testing.assert_close(graph(*tensors), gk.linear_cross_entropy(**given))
    value, along = torch.func.linearize(lambda x: gk.linear_cross_entropy(**given | {"input": x}), given["input"])
    torch.testing.assert_close(value, gk.linear_cross_entropy(**given))
    assert along(given["input"]).isfinite()


def test_jacobian_of_no_rows() -> None:
    given = _labels(0)
    layer = tuple(given[name] for name in LAYER)

    def rows(*layer: Tensor) -> Tensor:
        return gk.linear_cross_entropy(**given | dict(zip(LAYER, layer, strict=True)), reduction="none")

    found = torch.func.jacrev(rows, (0, 1, 2))(*layer)
    assert [jacobian.shape for jacobian in found] == [(0, *t.shape) for t in layer]


@pytest.mark.parametrize("shape", [(7, 5), (7, 2, 5)])
def test_options_are_checked_whatever_the_size(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "LOGITS_BELOW", 2**16)
    monkeypatch.setattr(options, "WHOLE_BATCH", 256)
    operands = torch.randn(3, 5), torch.randn(shape), torch.zeros(3, *shape[1:-1], dtype=torch.int64)
    for given, error, message in (
        ({"memory_budget": 1}, ValueError, "too small for one row"),
        ({"acc_dtype": torch.float16}, RuntimeError, "acc_dtype must be torch.float32"),
    ):
        with pytest.raises(error, match=message):
            gk.linear_cross_entropy(*operands, options=gk.LinearCrossEntropyOptions(**given))


def test_known_failure_ignored_rows_of_nan_with_several_labels() -> None:
    weight = torch.randn(30, 4).requires_grad_()
    input, target = torch.randn(6, 4), torch.randint(10, (6, 3))
    input[2], target[2] = NAN, -100
    gk.linear_cross_entropy(input, weight.view(10, 3, 4), target).backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_head_of_a_head_keeps_its_options() -> None:
    head = gk.FusedLMHead(4, 5, softcap=3.0, weight=torch.rand(5))
    again = gk.FusedLMHead.from_linear(head, label_smoothing=0.1)
    hidden, target = torch.randn(3, 4), torch.tensor([0, 4, 2])
    torch.testing.assert_close(again(hidden, target), head(hidden, target, label_smoothing=0.1))


def test_class_weights_in_any_layout(path: str) -> None:
    """The kernels read the elements between those of a strided weight."""
    x, head, weight, target = aligned(4, 3), aligned(5, 3), torch.rand(10)[::2], torch.arange(4)
    for strided in (weight, weight[:1].expand(5)):
        found, wanted = (gk.linear_cross_entropy(x, head, target, weight=w) for w in (strided, strided.contiguous()))
        assert torch.equal(found, wanted)


def test_products_that_a_flop_counter_sees() -> None:
    """Of logits and of the gradients of input and linear weight; those of bias and target are none."""
    each = 2 * 3 * 5 * 4
    for needed in range(16):
        assert flops._products((3, 4), (5, 4), needed) == each * (1 + (needed & 1) + (needed >> 1) % 2)
