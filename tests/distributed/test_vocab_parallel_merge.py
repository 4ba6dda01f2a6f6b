"""Merging of the ranks' statistics without ranks: every shard is computed in this process, and stacked as if gathered."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core.reduction import Reduction
from genloss_kernels.losses.cross_entropy.reference import Options, Rows
from genloss_kernels.losses.vocab_parallel import local, merge, op
from genloss_kernels.losses.vocab_parallel.merge import Head
from genloss_kernels.losses.vocab_parallel.shard import Layout

from . import oracle

SIZES = {
    "even": (20, 20),
    "uneven": (7, 30, 3),
    "empty": (0, 25, 0, 15),
    "one": (40,),
    "single classes": (1, 38, 1),
    "wide": (150, 300),
}


class Given(NamedTuple):
    logits: Tensor
    target: Tensor
    weight: Tensor | None
    options: dict[str, Any]


def _layouts(sizes: tuple[int, ...]) -> list[Layout]:
    starts, reached = [], 0
    for size in sizes:
        starts.append(reached)
        reached += size
    return [Layout(tuple(starts), sizes, rank, "") for rank in range(len(sizes))]


def _parallel(given: Given, sizes: tuple[int, ...], grads: Any, path: str) -> tuple[Rows, Tensor]:
    """Rows and the gradient of the logits by way of shards; ``grads`` are those of loss, lse, log-probability, entropy."""
    options = Options(**given.options, reduction=Reduction.NONE)
    heads = [Head(given.target, given.weight, options, layout) for layout in _layouts(sizes)]
    parts = given.logits.split(sizes, 1)
    triton = path == "triton"
    gathered = torch.stack([local.statistics(p, h, triton=triton) for p, h in zip(parts, heads, strict=True)])
    gradients = []
    for part, head in zip(parts, heads, strict=True):
        gradient = torch.empty_like(part)
        local.write_gradient(part, head, gathered, grads, gradient, triton=triton)
        gradients.append(gradient)
    return merge.merge(gathered, heads[0]), torch.cat(gradients, 1)


def _whole(given: Given, grads: Any, dtype: torch.dtype, toward: float | None = None) -> tuple[Rows, Tensor]:
    logits = given.logits.detach().to(dtype).requires_grad_()
    target = given.target.to(dtype) if given.target.is_floating_point() else given.target
    found = oracle.rows(logits, target, given.weight, Options(**given.options, reduction=Reduction.NONE), toward)
    pairs = [(o, g.to(o.dtype)) for o, g in zip((found.loss, *found[2:5]), grads, strict=True) if g is not None]
    (gradient,) = torch.autograd.grad([o for o, _ in pairs], logits, [g for _, g in pairs])
    return Rows(*(r.detach() for r in found)), gradient


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "every option": {"label_smoothing": 0.2, "softcap": 3.0, "logit_scale": 0.7, "z_loss": 0.05, "stats": True},
    "statistics": {"stats": True, "z_loss": 0.01},
}


def _given(options: dict[str, Any], classes: int, *, soft: bool, weighted: bool, dims: tuple[int, ...] = ()) -> Given:
    logits = torch.randn(6, classes, *dims) * 3.0
    if soft:
        target = torch.randn(6, classes, *dims).softmax(1)
    else:
        target = torch.randint(classes, (6, *dims))
        target[2] = -100
        logits[2] = float("nan")
    return Given(logits, target, torch.rand(classes) + 0.5 if weighted else None, options)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_shards_give_what_the_whole_gives(case: str, soft: bool, weighted: bool, sizes: str, path: str) -> None:
    given = _given(CASES[case], sum(SIZES[sizes]), soft=soft, weighted=weighted)
    _compare(given, SIZES[sizes], path)


@pytest.mark.parametrize("soft", [False, True])
def test_classes_in_dimension_1(soft: bool, path: str) -> None:
    given = _given(CASES["every option"], 40, soft=soft, weighted=True, dims=(2, 3))
    _compare(given, SIZES["empty"], path)


@pytest.mark.parametrize("soft", [False, True])
def test_known_failure_smoothing_with_an_outlier(soft: bool, path: str) -> None:
    """The share of a rank without it is exp(-140), which is 0 in fp32, and its logarithm is not."""
    given = _given(CASES["smoothing"], 40, soft=soft, weighted=False)
    given.logits[::2, 3] = 140.0
    _compare(given, SIZES["uneven"], path)


def _compare(given: Given, sizes: tuple[int, ...], path: str) -> None:
    stats = given.options.get("stats", False)
    shape = given.logits.select(1, 0).shape
    grads = [torch.randn(shape) if stats or i == 0 else None for i in range(4)]
    found, gradient = _parallel(given, sizes, grads, path)
    exact, exact_gradient = _whole(given, grads, torch.float64)
    (up, up_gradient), (down, down_gradient) = (_whole(given, grads, torch.float32, t) for t in (oracle.UP, oracle.DOWN))
    like = oracle.worse(exact_gradient, up_gradient, down_gradient)
    gk.testing.assert_close(gradient, exact_gradient, like, "gradient")
    for name in ("loss", "lse", "log_prob", "entropy") if stats else ("loss",):
        wanted = getattr(exact, name)
        like = oracle.worse(wanted, getattr(up, name), getattr(down, name))
        gk.testing.assert_close(getattr(found, name), wanted, like, name)
    if stats:
        assert torch.equal(found.correct, exact.correct)


def test_equal_logits_go_to_the_lowest_class(path: str) -> None:
    """Whether the two of them lie on one rank, or on two of which the first or the last holds the label."""
    sizes = (20, 0, 20)
    for pair in ((3, 30), (3, 5), (25, 30)):
        for place, label in enumerate(pair):
            logits = torch.zeros(1, 40)
            logits[0, list(pair)] = 2.0
            given = Given(logits, torch.tensor([label]), None, {"stats": True})
            rows, _ = _parallel(given, sizes, [torch.ones(1), None, None, None], path)
            assert rows.correct.tolist() == [place == 0]


@pytest.mark.parametrize("stats", [True, False])
def test_results_are_what_the_compiler_is_told(stats: bool) -> None:
    given = Given(torch.randn(3, 40), torch.tensor([1, 2, 39]), None, {"stats": True})
    rows, _ = _parallel(given, SIZES["one"], (torch.ones(3), None, None, None), "eager")
    found, told = op.results(rows, stats=stats), op.fake_results(rows.loss, (3,), stats=stats)
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in told]


def test_one_class_is_a_vocabulary() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert gk.distributed.VocabShard.even(1, dist.group.WORLD).size == 1
        with pytest.raises(ValueError, match="vocab_size must be positive, got 0"):
            gk.distributed.VocabShard.even(0, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
