"""What each rank of a world does: the sharded loss against the whole one, which every rank computes for itself."""

from __future__ import annotations

import copy
import functools
import math
import os
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import genloss_kernels as gk
from genloss_kernels.distributed import VocabShard

from . import oracle
from .world import GATHER, Case, Ranks, traffic

CASES: dict[str, Case] = {}

V, D, N = 40, 6, 9


def case(function: Callable[[Ranks], None]) -> Case:
    CASES[function.__name__] = function
    return function


def uneven(ranks: int) -> tuple[int, ...]:
    return {1: (40,), 2: (13, 27), 4: (7, 0, 30, 3)}[ranks]


def empty(ranks: int) -> tuple[int, ...]:
    return {1: (40,), 2: (0, 40), 4: (0, 25, 0, 15)}[ranks]


class Part(NamedTuple):
    """This rank's classes among all."""

    shard: VocabShard
    classes: slice


def part(ranks: Ranks, sizes: tuple[int, ...] | None = None) -> Part:
    """Explicit sizes by their start, else even shards."""
    if sizes is None:
        shard = VocabShard.even(V, ranks.group)
        assert shard.size is not None
        return Part(shard, slice(shard.start, shard.start + shard.size))
    start = sum(sizes[: ranks.rank])
    return Part(VocabShard(start, ranks.group), slice(start, start + sizes[ranks.rank]))


def labels(n: int = N, *rest: int, ignored: int = -100) -> Tensor:
    target = torch.randint(V, (n, *rest))
    target[1] = ignored
    return target


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _upstream(results: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(result.shape, generator=generator).to(result.dtype)
        for name, result in results.items()
        if result.requires_grad
    }


def _gradients(results: dict[str, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    upstream = _upstream(results)
    return list(torch.autograd.grad([results[name] for name in upstream], leaves, list(upstream.values())))


def check_logits(ranks: Ranks, shard: Part, logits: Tensor, target: Tensor, dim: int = 1, **options: Any) -> None:
    """Values and gradient of ``cross_entropy``, and that all ranks have the same values to the bit."""
    mine = logits.detach().narrow(dim, shard.classes.start, shard.classes.stop - shard.classes.start).clone()
    mine.requires_grad_()
    found = oracle.named(gk.cross_entropy(mine, target, vocab_shard=shard.shard, **options))
    ranks.same_bits(*found.values())
    (gradient,) = _gradients(found, [mine])
    exact, like = _judged(lambda dtype, toward: _whole_logits(logits.to(dtype), target, dim, options, toward))
    _compare(found, exact[0], like[0])
    gk.testing.assert_close(ranks.whole(gradient, shard.classes.start, dim), exact[1][0], like[1][0], "gradient")


Results = tuple[dict[str, Tensor], list[Tensor]]


def _judged(function: Callable[[torch.dtype, float | None], Results]) -> tuple[Results, Results]:
    """Results and gradients in fp64, and in fp32 as far off as they may be."""
    exact = function(torch.float64, None)
    up, down = function(torch.float32, oracle.UP), function(torch.float32, oracle.DOWN)
    values = {name: oracle.worse(value, up[0][name], down[0][name]) for name, value in exact[0].items()}
    return exact, (values, [oracle.worse(*given) for given in zip(exact[1], up[1], down[1], strict=True)])


def _whole_logits(logits: Tensor, target: Tensor, dim: int, options: dict[str, Any], toward: float | None) -> Results:
    convert = _double if logits.dtype == torch.float64 else lambda value: value
    given = {name: convert(value) for name, value in options.items()}
    logits = logits.detach().clone().requires_grad_()
    rows = logits if dim else logits.unsqueeze(0)
    target = convert(target) if dim else convert(target).unsqueeze(0)
    found = oracle.cross_entropy(rows, target, toward=toward, **given)
    if not dim:
        found = {name: r.squeeze(0) if r.dim() else r for name, r in found.items()}
    return found, _gradients(found, [logits])


def _compare(found: dict[str, Tensor], exact: dict[str, Tensor], like: dict[str, Tensor]) -> None:
    for name, result in found.items():
        if result.dtype == torch.int64:
            assert torch.equal(result, exact[name]), f"{name}: {result} for {exact[name]}"
        else:
            gk.testing.assert_close(result, exact[name], like[name], name)


def check_linear(
    ranks: Ranks, shard: Part, hidden: Tensor, head: Tensor, target: Tensor, bias: Tensor | None = None, **options: Any
) -> None:
    """Values and gradients of ``linear_cross_entropy``."""
    leaves = [hidden, head[shard.classes], *([] if bias is None else [bias[shard.classes]])]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    result = gk.linear_cross_entropy(
        leaves[0], leaves[1], target, linear_bias=leaves[2] if bias is not None else None, vocab_shard=shard.shard, **options
    )
    found = oracle.named(result)
    ranks.same_bits(*found.values())
    gradients = _gradients(found, leaves)
    ranks.same_bits(gradients[0])
    options.pop("options", None)
    exact, like = _judged(
        lambda dtype, toward: _whole_linear(
            hidden.to(dtype), head.to(dtype), target, None if bias is None else bias.to(dtype), options, toward
        )
    )
    _compare(found, exact[0], like[0])
    gradients[1:] = [ranks.whole(g, shard.classes.start) for g in gradients[1:]]
    names = ("input", "linear_weight", "linear_bias")
    for name, gradient, wanted, judge in zip(names, gradients, exact[1], like[1], strict=False):
        gk.testing.assert_close(gradient, wanted, judge, f"gradient of {name}")


def _whole_linear(
    hidden: Tensor, head: Tensor, target: Tensor, bias: Tensor | None, options: dict[str, Any], toward: float | None
) -> Results:
    convert = _double if hidden.dtype == torch.float64 else lambda value: value
    given = {name: convert(value) for name, value in options.items()}
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, head, bias) if t is not None]
    target = convert(target)
    flat = leaves[0].flatten(0, -2)
    if not target.is_floating_point():
        flat = flat.masked_fill((target.flatten() == given.get("ignore_index", -100)).unsqueeze(1), 0.0)
    logits = F.linear(flat, *leaves[1:])
    if "row_weight" in given:
        given["row_weight"] = given["row_weight"].flatten()
    target = target.flatten(0, -2) if target.is_floating_point() else target.flatten()
    found = oracle.cross_entropy(logits, target, toward=toward, **given)
    shape = hidden.shape[:-1]
    found = {name: r.reshape(shape) if r.dim() else r for name, r in found.items()}
    return found, _gradients(found, leaves)


# --- cross entropy ---------------------------------------------------------------------------------------------------

ROW_WEIGHT = torch.linspace(0.0, 2.0, N)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "softcap_and_scale": {"softcap": 3.0, "logit_scale": 0.7},
    "z_loss": {"z_loss": 0.02},
    "class_weight": {"weight": torch.linspace(0.1, 2.0, V)},
    "row_weight": {"row_weight": ROW_WEIGHT},
    "divisor": {"divisor": 17.0},
    "divisor_tensor": {"divisor": torch.tensor(23.0)},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "statistics": {"return_stats": True},
    "everything": {
        "label_smoothing": 0.2, "softcap": 5.0, "logit_scale": 1.2, "z_loss": 0.03, "return_stats": True,
        "weight": torch.linspace(0.1, 2.0, V), "row_weight": ROW_WEIGHT,
    },
    "everything_none": {
        "label_smoothing": 0.2, "softcap": 5.0, "z_loss": 0.03, "return_stats": True, "reduction": "none",
        "weight": torch.linspace(0.1, 2.0, V), "row_weight": ROW_WEIGHT,
    },
}  # fmt: skip

SHARDS: dict[str, Callable[[int], tuple[int, ...]] | None] = {"even": None, "uneven": uneven, "empty": empty}


def _logits_case(options: dict[str, Any], cut: Callable[[int], tuple[int, ...]] | None, soft: bool, ranks: Ranks) -> None:
    logits = torch.randn(N, V) * 3.0
    target = torch.randn(N, V).softmax(1) if soft else labels()
    if not soft:
        logits[1] = float("nan")
    check_logits(ranks, part(ranks, cut and cut(ranks.size)), logits, target, **options)


def _linear_case(options: dict[str, Any], cut: Callable[[int], tuple[int, ...]] | None, soft: bool, ranks: Ranks) -> None:
    hidden, head, bias = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    target = torch.randn(N, V).softmax(1) if soft else labels()
    if not soft:
        hidden[1] = float("nan")
    chunks = gk.LinearCrossEntropyOptions(batch_chunk_size=4)
    check_linear(ranks, part(ranks, cut and cut(ranks.size)), hidden, head, target, bias, options=chunks, **options)


for _name, _options in OPTIONS.items():
    for _kind, _soft in (("labels", False), ("probabilities", True)):
        _cuts = SHARDS if _name.startswith(("plain", "everything")) else {"uneven": uneven}
        for _shards, _cut in _cuts.items():
            CASES[f"logits_{_kind}_{_name}_{_shards}"] = functools.partial(_logits_case, _options, _cut, _soft)
            CASES[f"linear_{_kind}_{_name}_{_shards}"] = functools.partial(_linear_case, _options, _cut, _soft)


@case
def logits_of_any_shape(ranks: Ranks) -> None:
    shard = part(ranks, uneven(ranks.size))
    options = {"label_smoothing": 0.1, "return_stats": True}
    check_logits(ranks, shard, torch.randn(3, V, 2, 2), torch.randint(V, (3, 2, 2)), **options)
    check_logits(ranks, shard, torch.randn(3, 5, V).transpose(1, 2), torch.randint(V, (3, 5)), **options)
    check_logits(ranks, shard, torch.randn(V), torch.randint(V, ()), dim=0, **options)
    check_logits(ranks, shard, torch.randn(V), torch.randn(V).softmax(0), dim=0, reduction="none")


@case
def hidden_states_of_any_shape(ranks: Ranks) -> None:
    shard = part(ranks, uneven(ranks.size))
    check_linear(ranks, shard, torch.randn(3, 4, D), torch.randn(V, D), labels(3, 4), row_weight=torch.rand(3, 4))
    check_linear(ranks, shard, torch.randn(3, 4, D), torch.randn(V, D), labels(3, 4), return_stats=True)


@case
def half_and_double_precision(ranks: Ranks) -> None:
    shard = part(ranks, uneven(ranks.size))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        check_logits(ranks, shard, torch.randn(N, V).to(dtype), labels(), label_smoothing=0.1)


@case
def linear_in_double_precision(ranks: Ranks) -> None:
    head = torch.randn(V, D).double()
    check_linear(ranks, part(ranks, uneven(ranks.size)), torch.randn(N, D).double(), head, labels(), z_loss=0.1)


@case
def shards_in_another_order(ranks: Ranks) -> None:
    """The last rank holds the first classes."""
    sizes = uneven(ranks.size)
    start = sum(sizes[ranks.rank + 1 :])
    shard = Part(VocabShard(start, ranks.group), slice(start, start + sizes[ranks.rank]))
    logits = torch.randn(N, V)
    logits[3, 5], logits[3, 35] = 9.0, 9.0
    check_logits(ranks, shard, logits, labels().index_fill(0, torch.tensor([3]), 35), return_stats=True)


@case
def ties_go_to_the_lowest_class(ranks: Ranks) -> None:
    logits = torch.zeros(4, V)
    logits[:, 2], logits[:, 30] = 5.0, 5.0
    logits[2:, 2] = 0.0
    shard = part(ranks, uneven(ranks.size))
    target = torch.tensor([2, 30, 30, 0])
    stats = gk.cross_entropy(
        logits[:, shard.classes].clone(), target, reduction="none", return_stats=True, vocab_shard=shard.shard
    )
    assert isinstance(stats, gk.CrossEntropyStats)
    assert stats.n_correct.item() == 2
    flat = gk.cross_entropy(
        torch.zeros(1, V)[:, shard.classes], torch.tensor([0]), return_stats=True, vocab_shard=shard.shard
    )
    assert isinstance(flat, gk.CrossEntropyStats)
    assert flat.n_correct.item() == 1


@case
def outlier_of_140(ranks: Ranks) -> None:
    """exp(140) is beyond fp32."""
    for column in (0, 20, V - 1):
        logits = torch.randn(N, V)
        logits[::2, column] = 140.0
        for smoothing in (0.0, 0.1):
            check_logits(ranks, part(ranks, uneven(ranks.size)), logits, labels(), label_smoothing=smoothing)
        check_logits(ranks, part(ranks, uneven(ranks.size)), logits, labels(), reduction="none", return_stats=True)


@case
def label_almost_certain(ranks: Ranks) -> None:
    """Where the label's probability is near 1, the loss is far below the unit in the last place of the logits."""
    logits = torch.randn(N, V)
    target = torch.randint(V, (N,))
    logits[torch.arange(N), target] = torch.linspace(8.0, 30.0, N)
    check_logits(ranks, part(ranks, uneven(ranks.size)), logits, target, reduction="none")


@case
def classes_masked_on_a_whole_rank(ranks: Ranks) -> None:
    """Logits of -inf on all of one rank are probabilities of 0, not NaN."""
    shard = part(ranks, uneven(ranks.size))
    logits = torch.randn(N, V)
    masked = sum(uneven(ranks.size)[:-1])
    logits[:, masked:] = -float("inf")
    target = torch.randint(7, (N,))
    check_logits(ranks, shard, logits, target, reduction="none", return_stats=True, z_loss=0.1)
    target[1] = -100
    check_logits(ranks, shard, logits, target, reduction="none", return_stats=True, z_loss=0.1)
    target[2] = masked
    for options in ({}, {"label_smoothing": 0.1}):
        part_of_logits = logits[:, shard.classes]
        found = gk.cross_entropy(part_of_logits, target, reduction="none", vocab_shard=shard.shard, **options)
        assert torch.equal(found.isinf(), gk.cross_entropy(logits, target, reduction="none", **options).isinf())  # pyright: ignore


@case
def all_ignored(ranks: Ranks) -> None:
    shard = part(ranks, uneven(ranks.size))
    target = torch.full((N,), -100)
    hidden = torch.full((N, D), float("nan"), requires_grad=True)
    head = torch.randn(V, D)[shard.classes].requires_grad_()
    logits = torch.full((N, V), float("nan"))[:, shard.classes].requires_grad_()
    for loss, leaves in (
        (functools.partial(gk.cross_entropy, logits, target), [logits]),
        (functools.partial(gk.linear_cross_entropy, hidden, head, target), [hidden, head]),
    ):
        for reduction, value in (("mean", math.nan), ("sum", 0.0)):
            result = loss(reduction=reduction, vocab_shard=shard.shard)
            assert torch.equal(torch.nan_to_num(result, nan=-1.0), torch.nan_to_num(torch.tensor(value), nan=-1.0))
            for gradient in torch.autograd.grad(result, leaves):
                assert not gradient.any()


@case
def no_rows(ranks: Ranks) -> None:
    shard = part(ranks)
    target = torch.zeros(0, dtype=torch.int64)
    head = torch.randn(V, D)[shard.classes].requires_grad_()
    hidden = torch.zeros(0, D, requires_grad=True)
    with traffic() as seen:
        assert gk.cross_entropy(torch.zeros(0, head.size(0)), target, reduction="sum", vocab_shard=shard.shard) == 0.0
        loss = gk.linear_cross_entropy(hidden, head, target, reduction="sum", vocab_shard=shard.shard)
        loss.backward()
    assert loss == 0.0
    assert head.grad is not None
    assert not head.grad.any()
    assert not seen.calls


@case
def weights_and_divisor_learn(ranks: Ranks) -> None:
    shard = part(ranks, uneven(ranks.size))
    logits, target = torch.randn(N, V), labels()
    hidden, head = torch.randn(N, D), torch.randn(V, D)
    results = []
    for sharded in (True, False):
        row_weight, divisor = torch.rand(N, generator=torch.Generator().manual_seed(1)), torch.tensor(7.0)
        leaves = [row_weight.requires_grad_(), divisor.requires_grad_()]
        given: dict[str, Any] = {"row_weight": row_weight, "divisor": divisor}
        own = given | {"vocab_shard": shard.shard} if sharded else given
        classes = shard.classes if sharded else slice(None)
        loss = gk.cross_entropy(logits[:, classes], target, **own)
        loss = loss + 2.0 * gk.linear_cross_entropy(hidden, head[classes], target, **own)
        results.append(torch.autograd.grad(loss, leaves))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


@case
def under_autocast(ranks: Ranks) -> None:
    shard, target = part(ranks, uneven(ranks.size)), labels()
    hidden, head = torch.randn(N, D), torch.randn(V, D)
    with torch.autocast("cpu", torch.bfloat16):
        found = gk.linear_cross_entropy(hidden, head[shard.classes], target, vocab_shard=shard.shard)
        wanted = gk.linear_cross_entropy(hidden, head, target)
        logits = gk.cross_entropy(hidden @ head[shard.classes].t(), target, vocab_shard=shard.shard)
    assert found.dtype == logits.dtype == torch.float32  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close([found, logits], [wanted, wanted])


@case
def modules_hold_a_shard(ranks: Ranks) -> None:
    """And are copied and pickled with it."""
    torch.manual_seed(1)
    shard, target, hidden, head = part(ranks), labels(), torch.randn(N, D), torch.randn(V, D)
    linear = torch.nn.Linear(D, shard.shard.size or 0, bias=False)
    linear.weight = torch.nn.Parameter(head[shard.classes])
    fused = gk.FusedLMHead.from_linear(linear, vocab_shard=shard.shard)
    wanted = gk.linear_cross_entropy(hidden, head, target)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(other(hidden, target), wanted)
    logits = hidden @ head.t()
    torch.testing.assert_close(gk.CrossEntropyLoss(vocab_shard=shard.shard)(logits[:, shard.classes], target), wanted)


@case
def a_shard_of_another_group_is_not_loaded(ranks: Ranks) -> None:
    state = pickle.dumps(part(ranks).shard)
    renamed = state.replace(ranks.group.group_name.encode(), b"?" * len(ranks.group.group_name))
    assert renamed != state
    with pytest.raises(RuntimeError, match="which is not here: make its groups as they were"):
        pickle.loads(renamed)


@case
def dtypes_of_wider_probabilities(ranks: Ranks) -> None:
    shard, hidden, head = part(ranks), torch.randn(N, D), torch.randn(V, D)
    target = torch.softmax(torch.randn(N, V), 1)
    for dtype, wider in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        operands = hidden.to(dtype), head.to(dtype)
        for reduction in ("mean", "none"):
            whole = gk.linear_cross_entropy(*operands, target.to(wider), reduction=reduction)
            found = gk.linear_cross_entropy(
                operands[0], operands[1][shard.classes], target.to(wider), reduction=reduction, vocab_shard=shard.shard
            )
            assert found.dtype == whole.dtype == wider  # pyright: ignore[reportAttributeAccessIssue]


@case
def ranks_that_disagree(ranks: Ranks) -> None:
    """Under GENLOSS_DEBUG=1 every rank says in what, where they would hang."""
    if ranks.size == 1:
        return
    shard, hidden, head = part(ranks), torch.randn(N, D), torch.randn(V, D)
    first = ranks.rank == 0
    weight = head[shard.classes].requires_grad_(first)
    logits = hidden @ head[shard.classes].t().detach()
    os.environ["GENLOSS_DEBUG"] = "1"
    try:
        for name, run in {
            "rows": lambda: gk.cross_entropy(logits[first:], labels(N)[first:], vocab_shard=shard.shard),
            "z_loss": lambda: gk.cross_entropy(logits, labels(N), z_loss=0.1 * first, vocab_shard=shard.shard),
            "gradients wanted": lambda: gk.linear_cross_entropy(hidden, weight, labels(N), vocab_shard=shard.shard),
        }.items():
            with pytest.raises(ValueError, match=f"the ranks' calls differ in {name}"):
                run()
        gk.cross_entropy(logits, labels(N), vocab_shard=shard.shard)
    finally:
        del os.environ["GENLOSS_DEBUG"]


@case
def dropped_rows(ranks: Ranks) -> None:
    options = gk.LinearCrossEntropyOptions(gather_rows=True, batch_chunk_size=3)
    shard = part(ranks, uneven(ranks.size))
    hidden = torch.randn(N, D)
    hidden[1] = float("nan")
    for given in ({}, {"reduction": "none"}, {"return_stats": True}):
        check_linear(ranks, shard, hidden, torch.randn(V, D), labels(), options=options, **given)


@case
def budgets_cut_alike_on_every_rank(ranks: Ranks) -> None:
    """A budget is that of the largest shard: ranks that cut differently would wait for each other forever."""
    options = gk.LinearCrossEntropyOptions(memory_budget=2 * 4 * 4 * max(empty(ranks.size)))
    hidden, head, target = torch.randn(600, D), torch.randn(V, D), torch.randint(V, (600,))
    shard = part(ranks, empty(ranks.size))
    shard.shard._fitting("linear_weight", shard.classes.stop - shard.classes.start, hidden.device)
    with traffic() as seen:
        leaf = head[shard.classes].requires_grad_()
        gk.linear_cross_entropy(hidden, leaf, target, options=options, vocab_shard=shard.shard)
    assert seen.calls == [GATHER] * 150


# --- by the kernels, of which those of the gradient want more than 128 classes ---------------------------------------

KERNELS: dict[str, Case] = {}
WIDE = (171, 140)


def _kernel_case(options: dict[str, Any], soft: bool, ranks: Ranks) -> None:
    classes, shard = sum(WIDE), part(ranks, WIDE)
    target = torch.randn(N, classes).softmax(1) if soft else torch.randint(classes, (N,))
    logits, hidden = torch.randn(N, classes) * 3.0, torch.randn(N, D)
    if not soft:
        target[1] = -100
        logits[1], hidden[1] = float("nan"), float("nan")
    chunks = gk.LinearCrossEntropyOptions(batch_chunk_size=4)
    with gk.backend("triton"), gk.testing.count_launches() as launches:
        check_logits(ranks, shard, logits, target, **options)
        check_linear(ranks, shard, hidden, torch.randn(classes, D), target, torch.randn(classes), options=chunks, **options)
    for way in ("forward", "backward"):
        assert any(way in name for name in launches), launches


_WEIGHT = torch.linspace(0.1, 2.0, sum(WIDE))


for _kind, _soft in (("labels", False), ("probabilities", True)):
    KERNELS[f"{_kind}_plain"] = functools.partial(_kernel_case, {}, _soft)
    KERNELS[f"{_kind}_smoothing"] = functools.partial(_kernel_case, {"label_smoothing": 0.1}, _soft)
    KERNELS[f"{_kind}_everything"] = functools.partial(
        _kernel_case, {"label_smoothing": 0.2, "softcap": 5.0, "z_loss": 0.03, "return_stats": True}, _soft
    )
    KERNELS[f"{_kind}_weighted"] = functools.partial(_kernel_case, {"weight": _WEIGHT, "row_weight": ROW_WEIGHT}, _soft)
    KERNELS[f"{_kind}_weighted_smoothing"] = functools.partial(
        _kernel_case, {"weight": _WEIGHT, "label_smoothing": 0.2, "reduction": "none"}, _soft
    )


# --- what is exchanged -----------------------------------------------------------------------------------------------

LOGITS = [
    (8, {}), (8, {"z_loss": 0.1, "softcap": 3.0}), (12, {"label_smoothing": 0.1}), (16, {"return_stats": True}),
    (20, {"return_stats": True, "label_smoothing": 0.1}),
]  # fmt: skip


@case
def one_collective_and_8_bytes_a_row(ranks: Ranks) -> None:
    target = labels()
    for shard in (part(ranks), part(ranks, uneven(ranks.size))):
        width = shard.classes.stop - shard.classes.start
        with traffic() as seen:
            gk.cross_entropy(torch.randn(N, width), target, vocab_shard=shard.shard)
        explicit = shard.shard.start == sum(uneven(ranks.size)[: ranks.rank]) and len(seen.calls) == 2
        # Asking for the others' sizes happens once, and never where they are known.
        assert len(seen.calls) == 1 or explicit
        for wanted, options in LOGITS:
            logits = torch.randn(N, width, requires_grad=True)
            with traffic() as seen:
                loss = oracle.named(gk.cross_entropy(logits, target, vocab_shard=shard.shard, **options))["loss"]
            assert (seen.calls, seen.bytes) == ([GATHER], wanted * N), (options, seen.bytes)
            with traffic() as seen:
                loss.backward()
            assert not seen.calls


@case
def even_shards_ask_nobody(ranks: Ranks) -> None:
    shard = part(ranks)
    with traffic() as seen:
        gk.cross_entropy(torch.randn(N, shard.shard.size or 0), labels(), vocab_shard=shard.shard)
    assert seen.calls == [GATHER]


@case
def collectives_of_the_linear_form(ranks: Ranks) -> None:
    """One for each chunk whose gradients are made in forward, else one for all rows; one for the input's gradient."""
    shard, target = part(ranks), labels()
    chunks = gk.LinearCrossEntropyOptions(batch_chunk_size=4)
    for (wanted, options), in_forward in [(row, in_forward) for row in LOGITS for in_forward in (True, False)]:
        made = in_forward and "return_stats" not in options
        given = options if made or "return_stats" in options else options | {"reduction": "none"}
        leaves = [torch.randn(N, D, requires_grad=True), torch.randn(V, D)[shard.classes].requires_grad_()]
        with traffic() as seen:
            result = gk.linear_cross_entropy(*leaves, target, options=chunks, vocab_shard=shard.shard, **given)
        assert seen.calls == [GATHER] * (3 if made else 1), (given, seen.calls)
        assert seen.bytes == wanted * N, (given, seen.bytes)
        with traffic() as seen:
            oracle.named(result)["loss"].sum().backward()
        assert (seen.calls, seen.bytes) == (["all_reduce"], N * D * 4)


@case
def a_dispatch_mode_sees_the_collectives(ranks: Ranks) -> None:
    from torch.distributed.tensor.debug import CommDebugMode

    shard = part(ranks)
    logits = torch.randn(N, shard.shard.size or 0, requires_grad=True)
    mode = CommDebugMode()
    with mode:
        gk.cross_entropy(logits, labels(), vocab_shard=shard.shard).backward()
    assert mode.get_total_counts() == 1


@case
def input_gradient_is_left_to_a_wrapper(ranks: Ranks) -> None:
    hidden, head, target = torch.randn(N, D), torch.randn(V, D), labels()
    start = part(ranks).shard.start
    for options in ({}, {"reduction": "sum", "return_stats": True}):
        gradients = []
        for reduce_input_grad in (True, False):
            shard = VocabShard(start, ranks.group, reduce_input_grad)
            leaf = hidden.clone().requires_grad_()
            own = head[start : start + (part(ranks).shard.size or 0)]
            loss = oracle.named(gk.linear_cross_entropy(leaf, own, target, vocab_shard=shard, **options))["loss"]
            with traffic() as seen:
                gradients += torch.autograd.grad(loss, leaf)
            assert seen.calls == (["all_reduce"] if reduce_input_grad else [])
        dist.all_reduce(gradients[1], group=ranks.group)
        assert torch.equal(*gradients)


@case
def frozen_parts_send_nothing(ranks: Ranks) -> None:
    shard = part(ranks)
    head = torch.randn(V, D)[shard.classes].requires_grad_()
    loss = gk.linear_cross_entropy(torch.randn(N, D), head, labels(), vocab_shard=shard.shard)
    with traffic() as seen:
        loss.backward()
    assert not seen.calls
    assert head.grad is not None


@case
def same_bits_every_time(ranks: Ranks) -> None:
    logits, target, hidden, head = torch.randn(N, V), labels(), torch.randn(N, D), torch.randn(V, D)
    shard = part(ranks, uneven(ranks.size))
    found = []
    for _ in range(10):
        mine = logits[:, shard.classes].clone().requires_grad_()
        leaves = [hidden.clone().requires_grad_(), head[shard.classes].clone().requires_grad_()]
        loss = gk.cross_entropy(mine, target, label_smoothing=0.1, vocab_shard=shard.shard)
        fused = gk.linear_cross_entropy(*leaves, target, vocab_shard=shard.shard)
        found.append([loss, fused, *torch.autograd.grad(loss, mine), *torch.autograd.grad(fused, leaves)])
    ranks.same_bits(*found[0][:2])
    assert all(torch.equal(a, b) for run in found for a, b in zip(run, found[0], strict=True))


@case
def a_second_backward_gives_the_same(ranks: Ranks) -> None:
    shard = part(ranks)
    leaves = [torch.randn(N, D, requires_grad=True), torch.randn(V, D)[shard.classes].requires_grad_()]
    for options in ({}, {"reduction": "none"}):
        loss = gk.linear_cross_entropy(*leaves, labels(), vocab_shard=shard.shard, **options)
        upstream = torch.full_like(loss, 3.0)
        first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
        first = [g.clone() for g in first]
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves, upstream), strict=True))


# --- errors ----------------------------------------------------------------------------------------------------------


@case
def a_second_derivative_raises(ranks: Ranks) -> None:
    shard = part(ranks)
    logits = torch.randn(N, shard.shard.size or 0, requires_grad=True)
    leaves = [torch.randn(N, D, requires_grad=True), torch.randn(V, D)[shard.classes].requires_grad_()]
    for loss, of in (
        (gk.cross_entropy(logits, labels(), vocab_shard=shard.shard), [logits]),
        (gk.linear_cross_entropy(*leaves, labels(), vocab_shard=shard.shard), leaves),
        (gk.linear_cross_entropy(*leaves, labels(), vocab_shard=shard.shard, reduction="none").sum(), leaves),
    ):
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(loss, of, create_graph=True)


@case
def shards_that_do_not_fit(ranks: Ranks) -> None:
    """On every rank, and nobody is left waiting."""
    even = part(ranks).shard
    target = labels()
    with pytest.raises(ValueError, match=rf"input must hold the {even.size} classes of vocab_shard on rank {ranks.rank}"):
        gk.cross_entropy(torch.randn(N, V + 1), target, vocab_shard=even)
    with pytest.raises(ValueError, match=r"linear_weight must hold the .* classes of vocab_shard"):
        gk.linear_cross_entropy(torch.randn(N, D), torch.randn(V + 1, D), target, vocab_shard=even)
    size = even.size or 0
    for start, width in ((even.start, size + (ranks.rank == 0)), (0, size), (even.start + 1, size)):
        with pytest.raises(ValueError, match=r"vocab_shard: the ranks' shards must hold every class once.*\(start, size\)"):
            gk.cross_entropy(torch.randn(N, width), target, vocab_shard=VocabShard(start, ranks.group))
    with pytest.raises(ValueError, match="no rank holds a class"):
        gk.cross_entropy(torch.randn(N, 0), target, vocab_shard=VocabShard(0, ranks.group))
    shard = VocabShard(even.start, ranks.group)
    gk.cross_entropy(torch.randn(N, size), target, vocab_shard=shard)
    assert shard.size == size
    with pytest.raises(ValueError, match="input must hold"):
        gk.cross_entropy(torch.randn(N, size + 1), target, vocab_shard=shard)


@case
def other_bad_input(ranks: Ranks) -> None:
    shard = part(ranks)
    logits, head, hidden = torch.randn(N, V)[:, shard.classes], torch.randn(V, D)[shard.classes], torch.randn(N, D)
    for bad in (V, -1):
        target = labels().index_fill(0, torch.tensor([0]), bad)
        with pytest.raises(
            IndexError, match=f"Target {bad} is out of bounds: target must hold class indices from 0 to {V - 1}"
        ):
            gk.cross_entropy(logits, target, vocab_shard=shard.shard)
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            gk.linear_cross_entropy(hidden, head, target, vocab_shard=shard.shard)
    target = labels()
    with pytest.raises(TypeError, match=r"vocab_shard must be a genloss_kernels\.distributed\.VocabShard, not str"):
        gk.cross_entropy(logits, target, vocab_shard="even")
    with pytest.raises(RuntimeError, match=f"weight tensor should be defined either for all {V} classes"):
        gk.cross_entropy(logits, target, weight=torch.ones(logits.size(1)), vocab_shard=shard.shard)
    with pytest.raises(RuntimeError, match=rf"must have the shape \[{N}, {V}\]"):
        gk.linear_cross_entropy(hidden, head, torch.rand(N, head.size(0)), vocab_shard=shard.shard)
    with pytest.raises(RuntimeError, match="not differentiable with respect to target"):
        gk.cross_entropy(logits, torch.rand(N, V, requires_grad=True), vocab_shard=shard.shard)
    with pytest.raises(RuntimeError, match="not differentiable with respect to weight"):
        gk.cross_entropy(logits, torch.rand(N, V), torch.rand(V, requires_grad=True), vocab_shard=shard.shard)
    with pytest.raises(RuntimeError, match=r"vocab_shard needs a linear_weight of shape \(V, D\)"):
        gk.linear_cross_entropy(hidden, head.unsqueeze(1), target, vocab_shard=shard.shard)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda x: gk.cross_entropy(x, target, vocab_shard=shard.shard))(logits.unsqueeze(0))
    for start, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="start"):
            VocabShard(start, ranks.group)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="group must be"):
        VocabShard(0, "world")
    with pytest.raises(TypeError, match="reduce_input_grad must be bool"):
        VocabShard(0, ranks.group, 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="vocab_size must be positive"):
        VocabShard.even(0, ranks.group)
    with pytest.raises(TypeError, match="t must be a DTensor"):
        VocabShard.from_dtensor(head)
    assert VocabShard(0, None).group is dist.group.WORLD


@case
def bad_labels_on_a_device_are_nan(ranks: Ranks) -> None:
    shard = part(ranks)
    logits = torch.randn(N, V)[:, shard.classes].requires_grad_()
    target = labels().index_fill(0, torch.tensor([0]), V)
    with gk.testing.device_semantics():
        loss = gk.cross_entropy(logits, target, reduction="none", vocab_shard=shard.shard)
        loss.sum().backward()
    assert logits.grad is not None
    assert loss.isnan().tolist() == [True] + [False] * (N - 1)
    assert logits.grad.isnan().any(1).tolist() == [bool(logits.size(1))] + [False] * (N - 1)


# --- DTensors, FSDP2 and compilers -----------------------------------------------------------------------------------


def _mesh(ranks: Ranks) -> DeviceMesh:
    return DeviceMesh.from_group(ranks.group, "cpu")


def _distributed(tensor: Tensor, ranks: Ranks, dim: int) -> Any:
    return distribute_tensor(tensor, _mesh(ranks), [Shard(dim)]).requires_grad_()


@case
def dtensors_are_unwrapped(ranks: Ranks) -> None:
    """41 classes: the last rank has fewer."""
    hidden, head, bias, logits = torch.randn(N, D), torch.randn(41, D), torch.randn(41), torch.randn(N, 41)
    target, wanted = labels(), []
    leaves = [t.clone().requires_grad_() for t in (hidden, head, bias, logits)]
    wanted = [
        gk.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2]),
        gk.cross_entropy(leaves[3], target),
    ]
    gradients = torch.autograd.grad(wanted[0] + wanted[1], leaves)
    weight, bias, logits = _distributed(head, ranks, 0), _distributed(bias, ranks, 0), _distributed(logits, ranks, 1)
    shard = VocabShard.from_dtensor(weight)
    assert shard.start == ranks.rank * -(-41 // ranks.size)
    replicated = distribute_tensor(hidden, _mesh(ranks), [Replicate()])
    for given in (hidden, replicated):
        own = given.clone().requires_grad_()
        for t in (weight, bias, logits):
            t.grad = None
        found = [
            gk.linear_cross_entropy(own, weight, target, linear_bias=bias, vocab_shard=shard),
            gk.cross_entropy(logits, target, vocab_shard=VocabShard.from_dtensor(logits)),
        ]
        torch.testing.assert_close(found, wanted)
        (found[0] + found[1]).backward()
        for tensor, gradient in zip((own, weight, bias, logits), gradients, strict=True):
            own_gradient = tensor.grad
            whole = own_gradient.full_tensor() if isinstance(own_gradient, DTensor) else own_gradient
            torch.testing.assert_close(whole, gradient)


@case
def dtensors_in_the_wrong_place(ranks: Ranks) -> None:
    hidden, head, target = torch.randn(N, D), torch.randn(V, D), labels()
    weight, across = _distributed(head, ranks, 0), _distributed(head, ranks, 1)
    same = distribute_tensor(head, _mesh(ranks), [Replicate()])
    shard = VocabShard.from_dtensor(weight)
    for wrong in (weight, across, same):
        with pytest.raises(TypeError, match=r"linear_weight is a DTensor .*VocabShard\.from_dtensor\(linear_weight\)"):
            gk.linear_cross_entropy(hidden, wrong, target)
    with pytest.raises(TypeError, match="linear_bias is a DTensor"):
        gk.linear_cross_entropy(hidden, head, target, linear_bias=_distributed(torch.randn(V), ranks, 0))
    for wrong in (across, same):
        with pytest.raises(ValueError, match=r"linear_weight is a DTensor .* where vocab_shard wants Shard\(0\)"):
            gk.linear_cross_entropy(hidden, wrong, target, vocab_shard=shard)
    with pytest.raises(ValueError, match=r"input is a DTensor .* must be the same on all ranks"):
        gk.linear_cross_entropy(_distributed(hidden, ranks, 0), weight, target, vocab_shard=shard)
    with pytest.raises(ValueError, match=r"input is a DTensor .* where vocab_shard wants Shard\(1\)"):
        gk.cross_entropy(_distributed(torch.randn(N, V), ranks, 0), target, vocab_shard=shard)
    with pytest.raises(ValueError, match="t must be sharded over one dimension of its mesh"):
        VocabShard.from_dtensor(same)


@case
def a_head_under_fsdp2(ranks: Ranks) -> None:
    """A head that is an FSDP2 group of its own: whole while it runs, and its gradient is the ranks' mean."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(D, D), gk.FusedLMHead(D, V))
    alone = copy.deepcopy(model)
    inputs = [torch.randn(N, D) for _ in range(ranks.size)]
    targets = [labels() for _ in range(ranks.size)]
    losses = [alone[1](alone[0](x), t) for x, t in zip(inputs, targets, strict=True)]
    torch.stack(losses).mean().backward()
    fully_shard(model[1], mesh=_mesh(ranks))
    fully_shard(model, mesh=_mesh(ranks))
    model.forward = lambda x, t: model[1](model[0](x), t)  # pyright: ignore[reportAttributeAccessIssue]
    loss = model(inputs[ranks.rank], targets[ranks.rank])
    torch.testing.assert_close(loss, losses[ranks.rank])
    loss.backward()
    for sharded, whole in zip(model.parameters(), alone.parameters(), strict=True):
        assert isinstance(sharded.grad, DTensor)
        torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad)
    weight: Any = model[1].weight
    model[1].reshard()
    with pytest.raises(TypeError, match=r"linear_weight is a DTensor .* call the layer itself inside its FSDP module"):
        gk.linear_cross_entropy(inputs[0], model[1].weight, targets[0])
    with pytest.raises(RuntimeError, match="is empty: if its parameters are sharded"):
        gk.linear_cross_entropy(inputs[0], weight.to_local()[:0], targets[0])


@case
def compiled_in_one_graph(ranks: Ranks) -> None:
    shard = part(ranks)
    target = labels()
    logits, hidden, head = torch.randn(N, V)[:, shard.classes], torch.randn(N, D), torch.randn(V, D)[shard.classes]

    def everything(logits: Tensor, hidden: Tensor, head: Tensor) -> list[Tensor]:
        stats = gk.cross_entropy(logits, target, label_smoothing=0.1, return_stats=True, vocab_shard=shard.shard)
        assert isinstance(stats, gk.CrossEntropyStats)
        return [
            stats.loss + stats.entropy.sum(),
            gk.cross_entropy(logits, target, vocab_shard=shard.shard),
            gk.linear_cross_entropy(hidden, head, target, vocab_shard=shard.shard),
            gk.linear_cross_entropy(hidden, head, target, reduction="none", vocab_shard=shard.shard).sum(),
        ]

    results = []
    for function in (everything, torch.compile(everything, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (logits, hidden, head)]
        found = function(*leaves)
        results.append([*found, *torch.autograd.grad(sum(found[1:], found[0]), leaves)])
    torch.testing.assert_close(*results)
    fresh = VocabShard(shard.shard.start, ranks.group)
    with pytest.raises(RuntimeError, match="vocab_shard has not been used yet"):
        torch.compile(lambda x: gk.cross_entropy(x, target, vocab_shard=fresh), fullgraph=True, backend="eager")(logits)
