"""Cross entropy on both paths against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.cases.cross_entropy import cross_entropy_oracle
from genloss_kernels.core import launch
from genloss_kernels.core.launch import Tile, observe_launches
from genloss_kernels.core.reduction import Reduction
from genloss_kernels.losses.cross_entropy import api, eager, op, reference

from .comparison import (
    DTYPES,
    HALVES,
    aligned,
    check,
    check_outputs,
    check_second_derivatives,
    no_synchronisation,
    untouched,
)

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our operators also where the built-in would be quicker, in blocks that a small test has several of."""
    monkeypatch.setattr(api, "BUILTIN_BELOW", 0)
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 2**11)


def _labels(logits: Tensor, ignored: int | None = 3) -> Tensor:
    """Labels for each row of logits (N, C, d1, ...), the first and the last class among them, every third ignored."""
    target = torch.randint(logits.size(1), (logits.size(0), *logits.shape[2:]))
    flat = target.view(-1)
    flat[:1], flat[-1:] = logits.size(1) - 1, 0
    if ignored is not None:
        flat[1::ignored] = -100
    return target


def _indices(logits: Tensor, **options: Any) -> dict[str, Any]:
    return {"input": logits, "target": _labels(logits), **options}


def _probabilities(logits: Tensor, **options: Any) -> dict[str, Any]:
    """Probabilities in the layout of the logits, not normalised so that their mass matters."""
    target = torch.empty_like(logits).copy_(torch.softmax(torch.randn_like(logits), 1) * 1.25)
    return {"input": logits, "target": target, **options}


def _every_option(logits: Tensor) -> dict[str, Any]:
    """Numbers that fp32 holds exactly: the interpreter hands a kernel nothing wider."""
    rows = (logits.size(0), *logits.shape[2:])
    return {
        "weight": (torch.rand(logits.size(1)) + 0.5).to(logits.dtype),
        "row_weight": (torch.rand(rows) + 0.5).to(logits.dtype),
        "label_smoothing": 0.125,
        "softcap": 8.0,
        "logit_scale": 0.75,
        "z_loss": 2.0**-9,
    }


def _channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


# Every way of walking the rows, each in the layout and with the edges that it has to get right.
LAYOUTS = {
    "aligned, two blocks": lambda: aligned(3, 1024),
    "ragged: blocks, tail and edges": lambda: aligned(3, 1293),
    "ragged, less than a block": lambda: aligned(4, 257),
    "one short of a multiple of 1024": lambda: aligned(3, 1023),
    "one past a multiple of 1024": lambda: aligned(3, 1025),
    "large blocks": lambda: aligned(2, 4501),
    "two shares of a row": lambda: aligned(2, 2001),
    "three shares, the last without a whole vector": lambda: aligned(2, 12290),
    "one row": lambda: aligned(1, 300),
    "one class": lambda: aligned(5, 1),
    "one class of one row": lambda: aligned(1, 1),
    "short rows": lambda: aligned(70, 10),
    "short rows, as long as they get": lambda: aligned(6, 256),
    "short rows, several tiles": lambda: aligned(11, 200),
    "classes in dimension 1": lambda: aligned(2, 19, 9, 7),
    "many classes in dimension 1": lambda: aligned(1, 300, 3, 2),
    "next-token view": lambda: aligned(2, 4, 515)[:, :-1].transpose(1, 2),
    "next-token view of short rows": lambda: aligned(3, 5, 21)[:, :-1].transpose(1, 2),
    "channels last": lambda: _channels_last(2, 19, 5, 7),
    "channels last, many channels": lambda: _channels_last(2, 300, 1, 2),
    "sliced classes": lambda: aligned(4, 1100)[:, 37:1063],
    "every other row": lambda: aligned(7, 515)[::2],
    "transposed": lambda: aligned(700, 5).t(),
    "every other class": lambda: aligned(3, 1100)[:, ::2],
    "every other class of short rows": lambda: aligned(9, 100)[:, ::2],
    "misaligned base": lambda: aligned(3, 1024, offset=1),
    "rows merge over two dimensions, not three": lambda: aligned(2, 3, 4, 20)[:, :, 1:].permute(0, 3, 1, 2),
    "three dimensions of rows": lambda: aligned(2, 3, 3, 300)[:, ::2, :2].permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(path: str, name: str) -> None:
    check(gk.cross_entropy, cross_entropy_oracle, _indices(LAYOUTS[name]()))


@pytest.mark.parametrize(
    "name",
    [
        "ragged: blocks, tail and edges",
        "aligned, two blocks",
        "three shares, the last without a whole vector",
        "short rows, several tiles",
        "classes in dimension 1",
        "channels last, many channels",
        "next-token view",
        "every other class",
        "transposed",
    ],
)
def test_layout_with_every_option(path: str, name: str) -> None:
    """Indices and probabilities, all options at once, per row: each row's loss and gradient is seen by itself."""
    logits = LAYOUTS[name]()
    options = _every_option(logits)
    check(gk.cross_entropy, cross_entropy_oracle, _indices(logits, **options, reduction="none"))
    arguments = _probabilities(logits, **options, reduction="none")
    check(gk.cross_entropy, cross_entropy_oracle, arguments, ("input", "target"))


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows split among more programs than it takes to fill them, so that a test of them stays quick."""
    monkeypatch.setattr(launch, "splits", lambda *_: 3)


@pytest.mark.parametrize("kind", [_indices, _probabilities])
@pytest.mark.parametrize("shape", [(4, 1030), (2, 37, 18)])
def test_shares_of_a_row(path: str, split: None, shape: tuple[int, ...], kind: Any) -> None:
    logits = aligned(*shape)
    _check_statistics(kind(logits, **_every_option(logits), reduction="none"))
    if kind is _indices:
        check(gk.cross_entropy, cross_entropy_oracle, kind(logits))


def test_many_shares_of_a_row(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than a power of two, all of which the merge must see: the last holds the largest logit."""
    monkeypatch.setattr(launch, "splits", lambda *_: 17)
    monkeypatch.setattr(launch, "row_tile", lambda *_, **__: Tile(64, 4))
    logits = aligned(2, 17 * 64)
    logits[:, -1] = 20.0
    check(gk.cross_entropy, F.cross_entropy, _indices(logits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(path: str, dtype: torch.dtype) -> None:
    """Blocks, tail and edges of each width of element; the row statistics stay in fp32 (fp64)."""
    logits = aligned(3, 1293 if dtype in HALVES else 773, dtype=dtype)
    check(gk.cross_entropy, cross_entropy_oracle, _indices(logits))
    check(gk.cross_entropy, cross_entropy_oracle, _indices(logits, **_every_option(logits), divisor=3.0))
    check(gk.cross_entropy, cross_entropy_oracle, _probabilities(logits, label_smoothing=0.125), ("input", "target"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_short_rows(path: str, dtype: torch.dtype) -> None:
    logits = aligned(9, 37, 3, dtype=dtype)
    check(gk.cross_entropy, cross_entropy_oracle, _indices(logits, **_every_option(logits)))


def test_probabilities_of_another_dtype(path: str) -> None:
    """Results take the dtype to which logits and target promote, and so do torch's."""
    arguments = _probabilities(aligned(3, 515, dtype=torch.bfloat16))
    arguments["target"] = arguments["target"].float()
    check(gk.cross_entropy, cross_entropy_oracle, arguments, ("input", "target"), dtype=torch.float32)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label smoothing": {"label_smoothing": 0.2},
    "label smoothing of 1": {"label_smoothing": 1.0},
    "softcap": {"softcap": 3.0},
    "logit scale": {"logit_scale": -1.7},
    "softcap and scale": {"softcap": 5.0, "logit_scale": 0.5},
    "z-loss": {"z_loss": 0.3},
    "divisor": {"divisor": 37.0},
    "divisor on the device": {"divisor": torch.tensor(37.0)},
    "divisor on the device in fp64": {"divisor": torch.tensor(37.0, dtype=torch.float64)},
    "sum": {"reduction": "sum"},
    "sum with smoothing": {"reduction": "sum", "label_smoothing": 0.2},
    "none": {"reduction": "none"},
}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("name", OPTIONS)
def test_option(path: str, name: str, weighted: bool) -> None:
    logits = aligned(4, 261)
    weights = {"weight": torch.rand(261) + 0.5} if weighted else {}
    check(gk.cross_entropy, cross_entropy_oracle, _indices(logits, **weights, **OPTIONS[name]))


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "divisor on the device in fp64"])
def test_option_of_probabilities(path: str, name: str, weighted: bool) -> None:
    logits = aligned(4, 13, 3)
    weights = {"weight": torch.rand(13) + 0.5} if weighted else {}
    arguments = _probabilities(logits, **weights, **OPTIONS[name])
    check(gk.cross_entropy, cross_entropy_oracle, arguments, ("input", "target"))


@pytest.mark.parametrize("kind", [_indices, _probabilities])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_row_weight(path: str, kind: Any, reduction: str) -> None:
    logits = aligned(3, 20, 4)
    arguments = kind(logits, reduction=reduction, row_weight=torch.rand(4, 3).t() + 0.5)
    check(gk.cross_entropy, cross_entropy_oracle, arguments)
    arguments["weight"] = torch.rand(20)
    check(gk.cross_entropy, cross_entropy_oracle, arguments)


def test_row_weight_of_0_leaves_a_row_out(path: str) -> None:
    logits = aligned(3, 300)
    arguments = _indices(logits, row_weight=torch.tensor([1.0, 1.0, 0.0]), z_loss=0.1)
    assert check(gk.cross_entropy, cross_entropy_oracle, arguments) == gk.cross_entropy(
        logits[:2], arguments["target"][:2], z_loss=0.1
    )


def test_only_the_target_has_a_gradient(path: str) -> None:
    for logits in (aligned(3, 300), aligned(3, 20, 4)):
        arguments = _probabilities(logits, label_smoothing=0.1, weight=torch.rand(logits.size(1)))
        check(gk.cross_entropy, cross_entropy_oracle, arguments, ("target",))


def test_one_sample(path: str) -> None:
    """An input (C) with one index, in either of the two shapes that it may have, or with probabilities."""
    logits = aligned(300).requires_grad_()
    row = logits.unsqueeze(0)
    probabilities = torch.softmax(aligned(300), 0)
    for reduction in ("mean", "sum", "none"):
        options = {"weight": torch.rand(300), "reduction": reduction, "label_smoothing": 0.1}
        for target, batch in ((torch.tensor(7), torch.tensor([7])), (probabilities, probabilities[None])):
            loss, wanted = gk.cross_entropy(logits, target, **options), gk.cross_entropy(row, batch, **options)
            assert loss.shape == ()
            assert loss == wanted
            assert torch.equal(*(torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (loss, wanted)))
        one = gk.cross_entropy(logits, torch.tensor([7]), **options)
        assert one.item() == gk.cross_entropy(logits, torch.tensor(7), **options).item()
    torch.testing.assert_close(loss, F.cross_entropy(logits, probabilities, **options))
    stats = gk.cross_entropy(logits, torch.tensor(7), return_stats=True, row_weight=torch.tensor(2.0), reduction="none")
    assert {s.shape for s in stats} == {torch.Size(())}
    torch.testing.assert_close(stats.loss, 2.0 * F.cross_entropy(logits, torch.tensor(7)))
    torch.testing.assert_close(stats.lse, torch.logsumexp(logits, 0))


def test_expanded_input(path: str) -> None:
    target = torch.randint(300, (6,))

    def expanded(function: Any) -> Any:
        return lambda input: function(input.expand(6, 300), target)

    check(expanded(gk.cross_entropy), expanded(cross_entropy_oracle), {"input": aligned(1, 300)})


@pytest.mark.parametrize("n_cols", [301, 5003])
def test_probabilities_of_strided_classes_in_long_rows(path: str, n_cols: int) -> None:
    """Rows of one tile and of several, whose probabilities are not neighbours in memory as the logits are."""
    target = torch.softmax(torch.randn(3, 2 * n_cols), 1)[:, ::2]
    check(gk.cross_entropy, cross_entropy_oracle, {"input": aligned(3, n_cols), "target": target})


def test_labels_of_one_byte(path: str) -> None:
    logits = aligned(9, 200)
    target = _labels(logits, ignored=None).to(torch.uint8)
    target[5] = 255
    check(gk.cross_entropy, F.cross_entropy, {"input": logits, "target": target, "ignore_index": 255})


@pytest.mark.parametrize("shape", [(7, 10), (5, 300)])
def test_any_label_may_be_the_ignored_one(path: str, shape: tuple[int, ...]) -> None:
    logits = aligned(*shape)
    target = _labels(logits, ignored=None)
    for ignore_index in (int(target.flatten()[1]), -(2**40)):
        labels = target.clone()
        labels.view(-1)[2] = ignore_index
        arguments = {"input": logits, "target": labels, "ignore_index": ignore_index, "label_smoothing": 0.1}
        check(gk.cross_entropy, F.cross_entropy, arguments)


def test_strided_labels_and_upstream(path: str) -> None:
    """Labels, weights and the upstream gradient come in any layout; that of ``.sum()`` has stride 0."""
    logits, target = aligned(3, 300, 4), torch.randint(300, (4, 6)).t()[::2]
    assert not target.is_contiguous()
    factors = torch.rand(4, 3).t()
    for combine in (lambda rows: (rows * factors).sum(), lambda rows: rows.sum()):
        check(
            lambda combine=combine, **given: combine(gk.cross_entropy(**given, reduction="none")),
            lambda combine=combine, **given: combine(F.cross_entropy(**given, reduction="none")),
            {"input": logits, "target": target},
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 300), (0, 10), (0, 10, 5), (4, 10, 0)])
def test_empty_batch(shape: tuple[int, ...], reduction: str) -> None:
    """No launch is needed to know the result, so there is no path to choose."""
    rows = (shape[0], *shape[2:])
    for target in (torch.zeros(rows, dtype=torch.int64), torch.zeros(shape)):
        logits = torch.zeros(shape, requires_grad=True)
        loss = gk.cross_entropy(logits, target, reduction=reduction)
        wanted = F.cross_entropy(logits, target, reduction=reduction)
        torch.testing.assert_close(loss, wanted, equal_nan=True)
        loss.sum().backward()
        assert logits.grad is not None
        assert logits.grad.shape == shape


@pytest.mark.interpreter
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_by_the_kernels(reduction: str) -> None:
    for shape in ((0, 300), (0, 10, 5), (4, 10, 0)):
        logits = torch.zeros(shape, requires_grad=True)
        target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
        with gk.backend("triton"):
            loss = gk.cross_entropy(logits, target, reduction=reduction)
            stats = gk.cross_entropy(logits, target, reduction=reduction, return_stats=True)
        torch.testing.assert_close(loss, F.cross_entropy(logits, target, reduction=reduction), equal_nan=True)
        assert stats.n_valid.item() == stats.n_correct.item() == 0
        assert stats.lse.shape == target.shape
        loss.sum().backward()
        assert logits.grad is not None


@pytest.mark.parametrize(
    ("shape", "options"),
    [((3, 300), {}), ((3, 300), {"label_smoothing": 0.1, "z_loss": 0.1}), ((40, 10), {}), ((3, 10, 4), {"z_loss": 0.1})],
)
def test_known_failure_all_tokens_ignored(path: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """A batch without a valid token divided by zero or raised (Unsloth #7677): here NaN for the mean, else 0."""
    logits = aligned(*shape).requires_grad_()
    target = torch.full((shape[0], *shape[2:]), -100)
    assert gk.cross_entropy(logits, target, **options).isnan()
    assert gk.cross_entropy(logits, target, **options, divisor=3.0) == 0.0
    for reduction in ("sum", "none"):
        loss = gk.cross_entropy(logits, target, **options, reduction=reduction)
        assert not loss.any()
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.equal(grad, torch.zeros_like(grad))
    stats = gk.cross_entropy(logits, target, **options, return_stats=True)
    assert not any(s.any() for s in (stats.lse, stats.log_prob, stats.entropy, stats.n_valid, stats.n_correct))
    # The gradient of ignored rows is 0 whatever the mean is.
    (grad,) = torch.autograd.grad(stats.loss, logits)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_weights_of_0(path: str) -> None:
    logits, target = aligned(4, 300), torch.tensor([3, 3, -100, 5])
    weight = torch.ones(300)
    weight[[3, 5]] = 0.0
    assert gk.cross_entropy(logits, target, weight).isnan()
    assert gk.cross_entropy(logits, target, weight, reduction="sum") == 0.0


@pytest.mark.parametrize(("shape", "hold"), [((4, 300), NAN), ((4, 300), INF), ((9, 10), NAN), ((4, 10, 3), INF)])
def test_ignored_rows_may_hold_anything(path: str, shape: tuple[int, ...], hold: float) -> None:
    logits = aligned(*shape)
    target = _labels(logits)
    ignored = target == -100
    finite = logits.clone()
    logits.movedim(1, -1)[ignored] = hold
    options = _every_option(logits)
    logits.requires_grad_()
    finite.requires_grad_()
    loss = gk.cross_entropy(logits, target, **options, return_stats=True)
    clean = gk.cross_entropy(finite, target, **options, return_stats=True)
    for result, wanted in zip(loss, clean, strict=True):
        assert torch.equal(result, wanted)
    grad, wanted = (
        torch.autograd.grad(s.loss + s.lse.sum() + s.entropy.sum() + s.log_prob.sum(), x)[0]
        for s, x in ((loss, logits), (clean, finite))
    )
    assert torch.equal(grad, wanted)
    assert not grad.movedim(1, -1)[ignored].any()


def test_masked_vocabulary(path: str) -> None:
    """Classes at -inf take no part; the label among them costs inf, a row of nothing else is NaN, as in torch."""
    for shape in ((5, 700), (5, 20)):
        logits = aligned(*shape)
        target = torch.tensor([3, 4, 5, 6, -100])
        logits[0, 10:] = -INF
        logits[1, :4] = -INF
        for options in ({"reduction": "none"}, {"reduction": "none", "logit_scale": 0.5, "z_loss": 0.1}):
            check(gk.cross_entropy, cross_entropy_oracle, {"input": logits[:2], "target": target[:2], **options})
            lost = logits.clone()
            lost[2, 5] = -INF
            lost[3:] = -INF
            rows = gk.cross_entropy(lost, target, **options)
            assert rows[2] == INF
            assert rows[3].isnan()
            assert rows[4] == 0.0


def test_statistics_of_a_vocabulary_masked_by_the_lowest_number(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the others, in several tiles: a rise from there times what a lane has added up is infinite."""
    monkeypatch.setattr(launch, "row_tile", lambda *_, **__: Tile(64, 4))
    logits = aligned(2, 700)
    logits[:, :600] = torch.finfo(torch.float32).min
    stats = gk.cross_entropy(logits, torch.tensor([650, 690]), return_stats=True)
    wanted = gk.cross_entropy(logits[:, 600:], torch.tensor([50, 90]), return_stats=True)
    for name in ("loss", "lse", "log_prob", "entropy"):
        torch.testing.assert_close(getattr(stats, name), getattr(wanted, name))


@pytest.mark.parametrize("classes", [3, 128, 700])
def test_every_class_at_the_lowest_number(path: str, classes: int) -> None:
    logits = torch.full((2, classes), torch.finfo(torch.float32).min, requires_grad=True)
    loss = gk.cross_entropy(logits, torch.tensor([0, classes - 1]))
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, torch.tensor(math.log(classes)))
    torch.testing.assert_close(found, (1 / classes - F.one_hot(torch.tensor([0, classes - 1]), classes)) / 2)


def test_statistics_of_a_masked_vocabulary(path: str) -> None:
    for shape in ((2, 700), (2, 20)):
        logits = aligned(*shape)
        logits[:, 3:] = -INF
        logits.requires_grad_()
        stats = gk.cross_entropy(logits, torch.tensor([0, 1]), return_stats=True)
        (grad,) = torch.autograd.grad(stats.entropy.sum(), logits, retain_graph=True)
        few = logits.detach()[:, :3].requires_grad_()
        wanted = gk.cross_entropy(few, torch.tensor([0, 1]), return_stats=True)
        assert stats.n_correct == wanted.n_correct
        torch.testing.assert_close(stats.entropy, wanted.entropy)
        torch.testing.assert_close(stats.lse, wanted.lse)
        assert not grad[:, 3:].any()
        torch.testing.assert_close(grad[:, :3], torch.autograd.grad(wanted.entropy.sum(), few)[0])


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e30, -3e30])
def test_large_logits(path: str, offset: float) -> None:
    """Sums are relative to the maximum: what is lost is lost in the logits themselves."""
    for shape in ((3, 1293), (3, 20)):
        arguments = _indices(aligned(*shape) + offset, label_smoothing=0.1, reduction="none")
        check(gk.cross_entropy, cross_entropy_oracle, arguments)


def test_known_failure_running_maximum_started_at_0(path: str) -> None:
    """All logits below -104 gave a loss of -inf where the maximum began at 0 (FlagGems)."""
    for shape, value in (((3, 1293), -105.0), ((3, 300), -1e38), ((3, 20), -105.0), ((2, 10, 3), -1e5)):
        logits = torch.full(shape, value)
        logits[:, 1] -= value * 1e-3
        check(gk.cross_entropy, cross_entropy_oracle, _indices(logits, reduction="none"))


def test_known_failure_padded_lanes_under_softcap(path: str) -> None:
    """Lanes masked before the softcap took part with -softcap, not -inf (CCE, fla, Unsloth #10616)."""
    for n_cols in (5, 257):
        # All logits far below the cap: a lane of padding at -2 would have the largest share of all.
        logits = aligned(5, n_cols) - 50.0
        arguments = _indices(logits, softcap=2.0, reduction="none")
        check(gk.cross_entropy, cross_entropy_oracle, arguments)
        check(gk.cross_entropy, cross_entropy_oracle, _probabilities(aligned(5, n_cols), softcap=9.0))


@pytest.mark.parametrize("n_cols", [255, 257, 1000, 1022, 1026])
def test_known_failure_classes_no_multiple_of_a_block(path: str, n_cols: int) -> None:
    """Log-probabilities were wrong where V is not a multiple of 256 or 1024 (verl #2656, #2899)."""
    logits = aligned(2, n_cols)
    target = torch.tensor([n_cols - 1, 0])
    stats = gk.cross_entropy(logits, target, return_stats=True, reduction="none")
    wanted = torch.log_softmax(logits.double(), 1).gather(1, target[:, None])[:, 0]
    like = torch.log_softmax(logits, 1).gather(1, target[:, None])[:, 0]
    gk.testing.assert_close(stats.log_prob, wanted, like)
    gk.testing.assert_close(-stats.loss, wanted, like)


@pytest.mark.parametrize("dtype", HALVES)
def test_known_failure_gradient_of_a_probable_target(path: str, dtype: torch.dtype) -> None:
    """The target's gradient, p - 1 near p = 1, was rounded twice and 20 to 100% off (Liger #1329)."""
    for shape in ((9, 300), (64, 16)):
        logits = torch.rand(shape)
        logits[:, 3] += 5.0 + 7.0 * torch.rand(shape[:1])
        target = torch.full(shape[:1], 3)
        arguments = {"input": logits.to(dtype), "target": target, "reduction": "none"}
        check(gk.cross_entropy, cross_entropy_oracle, arguments)


def test_known_failure_first_rows_upstream_gradient(path: str) -> None:
    """With reduction="none" the first row's upstream gradient served every row (Liger #968, #1298)."""
    for logits in (aligned(4, 300), aligned(4, 10), aligned(2, 10, 2)):
        x = logits.requires_grad_()
        target = torch.zeros((x.size(0), *x.shape[2:]), dtype=torch.int64)
        rows = gk.cross_entropy(x, target, reduction="none")
        (ones,) = torch.autograd.grad(rows, x, torch.ones_like(rows), retain_graph=True)
        factors = 2.0 ** torch.arange(rows.numel(), dtype=torch.float32).view_as(rows)
        (grad,) = torch.autograd.grad(rows, x, factors)
        assert torch.equal(grad, ones * factors.unsqueeze(1))


def test_known_failure_backward_skipped_at_upstream_1(path: str) -> None:
    """A backward that did nothing at an upstream gradient of 1 hid that gradients vanished (TransformerEngine #2139)."""
    x = aligned(3, 300).requires_grad_()
    target = torch.tensor([1, 2, -100])
    loss = gk.cross_entropy(x, target)
    one, explicit, two, none = (
        torch.autograd.grad(loss, x, upstream, retain_graph=True)[0]
        for upstream in (None, torch.ones(()), torch.full((), 2.0), torch.zeros(()))
    )
    torch.testing.assert_close(one, torch.autograd.grad(F.cross_entropy(x, target), x)[0])
    assert torch.equal(explicit, one)
    assert torch.equal(two, 2.0 * one)
    assert not none.any()


def test_known_failure_overwritten_logits(path: str) -> None:
    """The caller's logits were overwritten, even under no_grad; a second backward was scaled twice (Liger)."""
    logits = aligned(3, 300)
    before, target = logits.clone(), torch.tensor([1, 2, -100])
    with torch.no_grad():
        gk.cross_entropy(logits, target)
    assert torch.equal(logits, before)
    hidden = logits.clone().requires_grad_()
    x = hidden * 1.0
    values, version = x.detach().clone(), x._version
    loss = 3.0 * gk.cross_entropy(x, target)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert torch.equal(first, second)
    assert torch.equal(x, values)
    assert x._version == version


def test_known_failure_retained_graph_and_double_backward(path: str) -> None:
    """retain_graph failed, and a second derivative was silently wrong (QuACK #209, Liger JSD)."""
    for logits, reduction in ((aligned(2, 260), "none"), (aligned(3, 10, 4), "mean")):
        options = {**_every_option(logits), "reduction": reduction}
        check_second_derivatives(gk.cross_entropy, cross_entropy_oracle, _indices(logits, **options))
        arguments = _probabilities(logits, **options)
        check_second_derivatives(gk.cross_entropy, cross_entropy_oracle, arguments, ("input", "target"))


def test_known_failure_accumulated_micro_batches(path: str) -> None:
    """The mean of the micro-batches' means is not the batch's mean (Liger #802, transformers #37886)."""
    logits, target = aligned(6, 300), torch.tensor([1, -100, -100, 4, 5, 6])
    x = logits.clone().requires_grad_()
    whole = gk.cross_entropy(x, target)
    (wanted,) = torch.autograd.grad(whole, x)
    items = (target != -100).sum()
    for divisor in (int(items), items, items.float()):
        y = logits.clone().requires_grad_()
        parts = [gk.cross_entropy(y[s], target[s], divisor=divisor) for s in (slice(0, 3), slice(3, 6))]
        total = torch.stack(parts).sum()
        total.backward()
        torch.testing.assert_close(total, whole)
        torch.testing.assert_close(y.grad, wanted)


def test_known_failure_smoothing_with_an_outlier(path: str) -> None:
    """Smoothing by the log of an underflowed probability was inf beside a logit 140 above the rest (Megatron #7464)."""
    for n_cols in (300, 20):
        logits = aligned(2, n_cols)
        logits[:, 5] = 140.0
        arguments = _indices(logits, label_smoothing=0.1, reduction="none")
        assert check(gk.cross_entropy, cross_entropy_oracle, arguments).isfinite().all()


@pytest.mark.parametrize("shape", [(6, 261), (7, 20), (2, 20, 4), (3, 520)])
def test_known_failure_target_out_of_range(path: str, shape: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    """A bad label was silent, had loss 0 with a gradient, or was stored out of bounds (Liger FLCE, flash-attn)."""
    n_cols = shape[1]
    if n_cols == 520:
        request.getfixturevalue("split")
    logits = aligned(*shape).requires_grad_()
    target = _labels(logits.detach(), ignored=None)
    for bad in (n_cols, -1):
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            gk.cross_entropy(logits, target.masked_fill(target == target.flatten()[1], bad))
    labels = target.clone()
    bad = torch.tensor([-100, n_cols, -1, 2**40, -(2**40), 0])[: labels.numel()]
    labels.view(-1)[: bad.numel()] = bad
    where = (labels != -100) & ((labels < 0) | (labels >= n_cols))
    weight = {"weight": torch.rand(n_cols) + 0.5}
    every = weight | {"label_smoothing": 0.1, "z_loss": 0.1, "return_stats": True}
    for options in ({}, weight, every) if n_cols != 520 else (every,):
        with gk.testing.device_semantics():
            result = gk.cross_entropy(logits, labels, reduction="none", **options)
            rows = result.loss if "return_stats" in options else result
            (grad,) = torch.autograd.grad(rows.sum(), logits)
        clean = gk.cross_entropy(logits, labels.masked_fill(where, -100), reduction="none", **options)
        clean = clean.loss if "return_stats" in options else clean
        assert torch.equal(rows.isnan(), where)
        assert torch.equal(rows[~where], clean[~where])
        assert torch.equal(grad.isnan(), where.unsqueeze(1).expand(shape))
        assert torch.equal(grad.nan_to_num(), torch.autograd.grad(clean.sum(), logits)[0])
    with gk.testing.device_semantics():
        assert gk.cross_entropy(logits, labels).isnan()


def test_labels_out_of_range_under_debug(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One below and one above the range, and the ends of it."""
    logits = torch.zeros(2, 300)
    gk.cross_entropy(logits, torch.tensor([0, 299]))
    for bad in (-1, 300):
        with pytest.raises(IndexError, match=str(bad)):
            gk.cross_entropy(logits, torch.tensor([0, bad]))
    gk.cross_entropy(logits, torch.tensor([0, 300]), ignore_index=300)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["rows", "split rows", "tiles", "probabilities", "every option", "statistics"])
def test_known_failure_host_synchronisation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step waited for the device to read a value (.item(), torch.equal; Liger)."""
    logits = {"split rows": aligned(2, 2001), "tiles": aligned(3, 20, 4)}.get(name, aligned(5, 300)).requires_grad_()
    arguments = (_probabilities if name == "probabilities" else _indices)(logits.detach()) | {"input": logits}
    if name == "every option":
        arguments |= _every_option(logits.detach()) | {"divisor": torch.tensor(3.0)}
    with gk.backend("triton"), gk.testing.count_launches() as launches, no_synchronisation(monkeypatch):
        result = gk.cross_entropy(**arguments, return_stats=name == "statistics")
        (result.loss + result.entropy.sum() if isinstance(result, gk.CrossEntropyStats) else result).backward()
    assert launches.total() >= 3


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["long rows", "short rows", "strided classes", "many strided classes"])
def test_known_failure_int32_offsets(name: str) -> None:
    """Elements past 2**31 were addressed modulo 2**32 (pytorch #111484, fla #1080, trl #7266).

    The logits lie in the second half of memory that is mapped but not touched, so that an offset that wraps around
    reads the zeros before them. The gradient is written over them and is as far apart.
    """
    far = 2**30
    size, stride = {
        "long rows": ((4, 300), (far, 1)),
        "short rows": ((4, 3), (far, 1)),
        "strided classes": ((2, 5), (1, far)),
        "many strided classes": ((1, 300), (1, far // 64)),
    }[name]
    extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    memory = untouched(2**31 + 2**31 + extent)
    logits = memory[2**32 :].as_strided(size, stride, 2**32)
    values = aligned(*size, dtype=torch.bfloat16)
    logits.copy_(values)
    target = torch.full(size[:1], size[1] - 1)
    leaf = values.clone().requires_grad_()
    want = F.cross_entropy(leaf.double(), target, reduction="none")
    (wanted,) = torch.autograd.grad(want.sum(), leaf)
    with gk.backend("triton"):
        x = logits.requires_grad_()
        loss = gk.cross_entropy(_Same.apply(x), target, reduction="none", inplace_backward=True)
        gk.testing.assert_close(loss, want)
        loss.sum().backward()
    gk.testing.assert_close(memory.as_strided(size, stride, 2**32), wanted.double())


class _Same(torch.autograd.Function):
    """The same memory, but not a leaf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


# These come from Dynamo's own way with an autograd.Function, and from its tracing of what caches.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["ignored rows", "softcap"])
def test_known_failure_compile(path: str, options: dict[str, Any]) -> None:
    """Ignored rows gave a wrong loss under torch.compile (Liger #1338), and a softcap did not compile (Liger #1362)."""
    logits, target = aligned(5, 300), torch.tensor([1, -100, 2, -100, 3])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(input: Tensor, target: Tensor) -> Tensor:
        return gk.cross_entropy(input, target, **options)

    def oracle(input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy_oracle(input, target, **options)

    check(compiled, oracle, {"input": logits, "target": target})


def _stats_oracle(input: Tensor, target: Tensor, ignore_index: int = -100, **options: Any) -> dict[str, Tensor]:
    y = input * options.get("logit_scale", 1.0)
    if options.get("softcap"):
        y = options["softcap"] * torch.tanh(y / options["softcap"])
    log_p = torch.log_softmax(y, 1)
    if target.is_floating_point():
        valid = torch.ones_like(log_p[:, 0], dtype=torch.bool)
        log_prob, hit = (target * log_p).sum(1), target.argmax(1)
    else:
        valid, hit = target != ignore_index, target
        log_prob = log_p.gather(1, target.masked_fill(~valid, 0).unsqueeze(1)).squeeze(1)
    rows = {"lse": torch.logsumexp(y, 1), "log_prob": log_prob, "entropy": -(log_p.exp() * log_p).sum(1)}
    rows = {name: torch.where(valid, row, 0.0) for name, row in rows.items()}
    return rows | {"n_valid": valid.sum(), "n_correct": (valid & (y.argmax(1) == hit)).sum()}


STATISTICS = {
    "ragged rows": (lambda: aligned(4, 1293), _indices),
    "short rows": (lambda: aligned(11, 37), _indices),
    "strided classes": (lambda: aligned(5, 37, 7), _indices),
    "probabilities": (lambda: aligned(3, 781), _probabilities),
    "probabilities of strided classes": (lambda: aligned(5, 37, 7), _probabilities),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(path: str, name: str) -> None:
    make, kind = STATISTICS[name]
    logits = make()
    _check_statistics(kind(logits, **_every_option(logits), reduction="none"))


def _check_statistics(arguments: dict[str, Any]) -> None:
    """Each output's value, the gradient through it alone and through all of them, and the counts."""
    logits, target = arguments["input"], arguments["target"]
    if not target.is_floating_point():
        # A few rows whose largest logit is the label's.
        target = arguments["target"] = target.clone()
        target.view(-1)[::2] = logits.argmax(1).flatten()[::2]
        target.view(-1)[-1] = -100
    check_outputs(
        lambda **given: gk.cross_entropy(**given, return_stats=True)._asdict(),
        lambda **given: {"loss": cross_entropy_oracle(**given), **_stats_oracle(**given)},
        arguments,
        ("input", "target") if target.is_floating_point() else ("input",),
    )


def test_statistics_under_each_reduction(path: str) -> None:
    logits = aligned(6, 300, dtype=torch.bfloat16)
    arguments = _indices(logits)
    wanted = _stats_oracle(logits.double(), arguments["target"])
    own = _stats_oracle(logits.float(), arguments["target"])
    for reduction in ("mean", "sum", "none"):
        stats = gk.cross_entropy(**arguments, reduction=reduction, return_stats=True)
        assert stats.loss.dtype == torch.bfloat16
        assert stats.lse.dtype == stats.log_prob.dtype == stats.entropy.dtype == torch.float32
        for name in ("lse", "log_prob", "entropy"):
            gk.testing.assert_close(getattr(stats, name), wanted[name], own[name], name)
        assert stats.n_valid == 4


@pytest.mark.parametrize(
    ("n_cols", "first", "second"),
    [
        pytest.param(20, 3, 17, id="short row"),
        pytest.param(1293, 700, 701, id="neighbours"),
        pytest.param(1293, 5, 517, id="same lane of two blocks"),
        pytest.param(1293, 600, 1292, id="body and edge"),
        pytest.param(1293, 520, 521, id="two shares"),
    ],
)
def test_ties_go_to_the_lowest_index(
    path: str, n_cols: int, first: int, second: int, request: pytest.FixtureRequest
) -> None:
    if "two shares" in request.node.name:
        request.getfixturevalue("split")
    logits, target = torch.zeros(3, n_cols), torch.zeros(3, n_cols)
    logits[:, [first, second]] = 4.0
    stats = gk.cross_entropy(logits, torch.tensor([first, second, first]), return_stats=True)
    assert stats.n_correct == 2
    target[:, [first, second]] = 0.5
    logits[2, second] = 5.0
    assert gk.cross_entropy(logits, target, return_stats=True).n_correct == 2


def test_nothing_is_correct_in_a_row_of_nan(path: str) -> None:
    logits = torch.zeros(2, 300)
    logits[0, 5] = NAN
    stats = gk.cross_entropy(logits, torch.tensor([0, 0]), return_stats=True, reduction="none")
    assert stats.n_correct == 1
    assert stats.loss.isnan().tolist() == [True, False]


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(3, 1293), (5, 20), (2, 20, 7)])
@pytest.mark.parametrize("kind", [_indices, _probabilities])
def test_gradient_in_place(shape: tuple[int, ...], kind: Any) -> None:
    """The logits hold their gradient afterwards; nothing else can then be got from them."""
    leaf = aligned(*shape).requires_grad_()
    arguments = kind(leaf.detach(), label_smoothing=0.1)
    with gk.backend("triton"):
        arguments["input"] = leaf * 1.0
        (wanted,) = torch.autograd.grad(gk.cross_entropy(**arguments), leaf)
        logits = arguments["input"] = leaf * 1.0
        version = logits._version
        loss = gk.cross_entropy(**arguments, inplace_backward=True)
        (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert torch.equal(grad, wanted)
        assert torch.equal(logits.detach(), wanted)
        assert logits._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaf)
        loss = gk.cross_entropy(**{**arguments, "input": leaf * 1.0}, inplace_backward=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(loss, leaf, create_graph=True)
        # Where only the target has a gradient there is nothing to write over.
        if kind is _probabilities:
            target = arguments["target"].clone().requires_grad_()
            given = {**arguments, "input": leaf.detach().clone(), "target": target, "inplace_backward": True}
            torch.autograd.grad(gk.cross_entropy(**given), target)
            assert torch.equal(given["input"], leaf)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", [_indices, _probabilities])
@pytest.mark.parametrize("n_cols", [301, 5003])
def test_gradient_in_place_of_strided_classes(n_cols: int, kind: Any) -> None:
    """Rows of their own whose gradient is strided as they are: shorter and longer than one tile."""
    leaf = torch.randn(2, 2 * n_cols, requires_grad=True)
    arguments = kind(leaf.detach()[:, ::2])
    with gk.backend("triton"):
        (wanted,) = torch.autograd.grad(gk.cross_entropy(**{**arguments, "input": (leaf * 1.0)[:, ::2]}), leaf)
        logits = (leaf * 1.0)[:, ::2]
        (grad,) = torch.autograd.grad(gk.cross_entropy(**{**arguments, "input": logits}, inplace_backward=True), leaf)
    assert torch.equal(grad, wanted)
    assert torch.equal(logits.detach(), wanted[:, ::2])


@pytest.mark.interpreter
def test_gradient_in_place_is_refused() -> None:
    leaf, target = aligned(3, 300).requires_grad_(), torch.tensor([1, 2, 3])
    with gk.backend("triton"):
        with pytest.raises(ValueError, match="leaf"):
            gk.cross_entropy(leaf, target, inplace_backward=True)
        with pytest.raises(ValueError, match="expanded"):
            gk.cross_entropy((leaf[:1] * 1.0).expand(3, 300), target, inplace_backward=True)
        # Without a gradient there is nothing to refuse.
        gk.cross_entropy(leaf.detach(), target, inplace_backward=True)


def test_gradient_in_place_is_ignored_by_the_eager_path() -> None:
    leaf, target = aligned(3, 300).requires_grad_(), torch.tensor([1, 2, 3])
    logits = leaf * 1.0
    with gk.backend("eager"):
        loss = gk.cross_entropy(logits, target, inplace_backward=True)
        loss.backward(retain_graph=True)
        loss.backward()
        gk.cross_entropy(leaf, target, inplace_backward=True)
        gk.cross_entropy(leaf[:1].expand(3, 300), target, inplace_backward=True)
    assert torch.equal(logits, leaf * 1.0)


@pytest.mark.parametrize("kind", [_indices, _probabilities])
def test_gradients_of_row_weight_and_divisor(path: str, kind: Any) -> None:
    logits = aligned(4, 20)
    for reduction, divisor in (("mean", torch.tensor(2.5)), ("mean", None), ("sum", None), ("none", None)):
        given = kind(logits, row_weight=torch.rand(4) + 0.5, divisor=divisor, z_loss=0.1, reduction=reduction)
        if kind is _indices:
            given |= {"weight": torch.rand(20) + 0.5, "ignore_index": int(given["target"][1])}
        learning = ("input", "row_weight") + (() if divisor is None else ("divisor",))
        check(gk.cross_entropy, cross_entropy_oracle, given, learning)
    stats = gk.cross_entropy(logits, torch.zeros(4).long(), row_weight=torch.ones(4, requires_grad=True), return_stats=True)
    assert stats.n_valid == 4
    assert stats.lse.shape == (4,)


def test_gradient_of_class_weight() -> None:
    """As torch has it for probabilities; there is no kernel, so that ``auto`` runs the reference."""
    arguments = _probabilities(aligned(4, 20), weight=torch.rand(20) + 0.5, label_smoothing=0.1)
    check(gk.cross_entropy, F.cross_entropy, arguments, ("input", "weight", "target"))


@pytest.mark.interpreter
def test_gradient_of_class_weight_is_refused_where_kernels_are_asked_for() -> None:
    arguments = _probabilities(aligned(4, 20), weight=torch.rand(20, requires_grad=True))
    with gk.backend("triton"), pytest.raises(RuntimeError, match="no kernel for the gradient of weight"):
        gk.cross_entropy(**arguments)


@pytest.fixture
def builtin_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of elements with which the built-in was called, where it is the better one up to 1024 of them."""
    calls: list[int] = []
    builtin = api._torch_cross_entropy
    monkeypatch.setattr(api, "BUILTIN_BELOW", 1024)
    monkeypatch.setattr(api, "BUILTIN_CLASSES", 16)
    monkeypatch.setattr(api, "_torch_cross_entropy", lambda x, *a, **k: calls.append(x.numel()) or builtin(x, *a, **k))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_inputs_on_the_cpu_take_the_builtin(builtin_calls: list[int], dtype: torch.dtype) -> None:
    logits = torch.randn(6, 30, dtype=dtype)
    options = {"weight": torch.rand(30, dtype=dtype), "label_smoothing": 0.125}
    check(gk.cross_entropy, F.cross_entropy, _indices(logits, **options))
    check(gk.cross_entropy, F.cross_entropy, _indices(logits, reduction="none"))
    check(gk.cross_entropy, F.cross_entropy, _probabilities(logits, reduction="sum"), ("input", "target"))
    logits[1] = NAN
    logits.requires_grad_()
    target = torch.tensor([0, -100, 1, 2, 3, 4])
    (grad,) = torch.autograd.grad(gk.cross_entropy(logits, target), logits)
    assert grad.isfinite().all()
    assert not grad[1].any()
    assert gk.cross_entropy(logits[1], target[1], reduction="sum") == 0.0
    assert builtin_calls == [180, 180, 180, 180, 30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_inputs_take_the_builtin_where_it_is_better(builtin_calls: list[int], dtype: torch.dtype) -> None:
    for logits in (
        torch.randn(31, 33, dtype=dtype),
        torch.randn(150, 15, dtype=dtype),
        torch.randn(33, 64, dtype=dtype).t(),
    ):
        check(gk.cross_entropy, cross_entropy_oracle, _indices(logits))
    assert builtin_calls == [1023, 2250, 2112]
    check(gk.cross_entropy, cross_entropy_oracle, _indices(torch.randn(64, 16, dtype=dtype)))
    assert builtin_calls == [1023, 2250, 2112]


def test_the_builtin_is_not_asked_for_what_it_lacks(builtin_calls: list[int]) -> None:
    with gk.testing.device_semantics():
        gk.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 3]))
    for options in ({"softcap": 1.0}, {"logit_scale": 2.0}, {"z_loss": 1.0}, {"divisor": 1.0}, {"return_stats": True}):
        gk.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 2]), **options)
    gk.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 2]), row_weight=torch.ones(2))
    assert builtin_calls == []


def test_same_bits_every_time(path: str) -> None:
    """Partial sums are added in a fixed order."""
    arguments = _indices(aligned(9, 300), **_every_option(aligned(9, 300)))
    results = {gk.cross_entropy(**arguments).item() for _ in range(3)}
    assert len(results) == 1


@pytest.mark.interpreter
def test_launches() -> None:
    """Forward, reduction and backward; one more where rows are split. A call under no_grad launches no backward."""
    with gk.backend("triton"):
        for shape, forward in (((3, 300), 2), ((2, 2001), 3), ((9, 20), 2)):
            logits = aligned(*shape).requires_grad_()
            with gk.testing.count_launches() as launches:
                loss = gk.cross_entropy(logits, torch.zeros(shape[0], dtype=torch.int64))
                assert launches.total() == forward
                loss.backward()
                assert launches.total() == forward + 1


@pytest.mark.interpreter
def test_rows_are_counted_in_integers() -> None:
    """Of which fp32 loses one beyond 2**24."""
    counts: list[torch.dtype] = []

    def watch(kernel: Any, grid: int, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
        if kernel.__name__ == "_reduction_kernel":
            counts.extend(t.dtype for tensors in args[:2] for t in tensors[2:])
        return True

    with gk.backend("triton"), observe_launches(watch):
        gk.cross_entropy(aligned(3, 300), torch.zeros(3, dtype=torch.int64), return_stats=True)
    assert counts == [torch.int32] * 2 + [torch.int64] * 2


def test_second_derivative_of_a_statistic_that_leaves_the_target_alone(path: str) -> None:
    x, target = aligned(3, 300), torch.softmax(torch.randn(3, 300), 1).requires_grad_()

    def second(lse: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(lse(x).sum(), x, create_graph=True)
        return torch.autograd.grad(grad[:, 0].sum(), x)[0]

    def torchs(x: Tensor) -> Tensor:
        return torch.logsumexp(x, 1)

    found = second(lambda x: gk.cross_entropy(x, target, return_stats=True, reduction="none").lse, x)
    gk.testing.assert_close(found, second(torchs, x.double()), second(torchs, x))


def test_classes_stay_last_where_they_are_contiguous() -> None:
    view = torch.empty(2, 5, 300).transpose(1, 2)
    assert eager._class_dim(view) == 2
    assert eager._class_dim(view.contiguous()) == 1
    assert eager._class_dim(torch.empty(300, 4).t()) == 1


def test_labels_of_uint8_are_not_wrapped_around_ignore_index(path: str) -> None:
    """156 is -100 and 44 is 300 in eight bits."""
    logits, target = torch.randn(6, 301), torch.tensor([156, 3, 156, 200, 7, 44], dtype=torch.uint8)
    for ignore_index in (-100, 300):
        for options in ({}, {"softcap": 30.0}, {"row_weight": torch.ones(6, requires_grad=True)}):
            loss = gk.cross_entropy(logits, target, ignore_index=ignore_index, **options)
            assert torch.equal(loss, gk.cross_entropy(logits, target.long(), ignore_index=ignore_index, **options))
    with pytest.raises(IndexError, match="Target 156 is out of bounds"):
        gk.cross_entropy(logits[:1, :150], target[:1], z_loss=0.1)
    gk.cross_entropy(logits, target)


def test_log_prob_of_half_probabilities_has_a_gradient_in_full_precision(path: str) -> None:
    logits, target = torch.randn(4, 1000), torch.softmax(torch.randn(4, 1000), 1).bfloat16()

    def torchs(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad((torch.log_softmax(x, 1) * target.to(x.dtype)).sum(), x)[0]

    x = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(gk.cross_entropy(x, target, return_stats=True).log_prob.sum(), x)
    gk.testing.assert_close(found, torchs(logits.double()), torchs(logits.clone()))


@pytest.mark.parametrize("n_cols", [3, 300])
def test_large_finite_logits(path: str, n_cols: int) -> None:
    logits = torch.zeros(2, n_cols)
    logits[:, 0] = 1e32
    stats = gk.cross_entropy(logits, torch.tensor([0, 1]), label_smoothing=0.125, return_stats=True, reduction="none")
    assert stats.loss.isfinite().all()
    assert not stats.entropy.any()


@pytest.mark.interpreter
def test_gradient_in_place_needs_memory_of_its_own() -> None:
    target = torch.arange(8)
    with gk.backend("triton"):
        for logits in (
            (torch.randn(400, requires_grad=True) * 1.0).unfold(0, 300, 1)[:8],
            (torch.randn(8, 300, dtype=torch.complex64, requires_grad=True) * 1.0).conj().imag,
        ):
            with pytest.raises(ValueError, match="no memory of their own"):
                gk.cross_entropy(logits, target, inplace_backward=True)
            gk.cross_entropy(logits, target)


def test_known_failure_half_precision_targets_beside_double(path: str) -> None:
    logits = torch.randn(3, 300, dtype=torch.float64)
    target = torch.softmax(torch.randn(3, 300), 1).bfloat16().requires_grad_()
    exact = target.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(gk.cross_entropy(logits, target), target)
    (wanted,) = torch.autograd.grad(gk.cross_entropy(logits, exact), exact)
    torch.testing.assert_close(found.double(), wanted, rtol=2.0**-7, atol=1e-9)


def test_smoothed_probabilities_of_no_classes() -> None:
    empty = torch.zeros(3, 0)
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    assert gk.cross_entropy(empty, empty, **options) == F.cross_entropy(empty, empty, **options)


@pytest.mark.parametrize("probabilities", [False, True])
def test_class_weights_in_any_layout(path: str, probabilities: bool) -> None:
    """The kernels read the elements between those of a strided weight."""
    logits, weight = aligned(4, 5), torch.rand(10)[::2]
    target = torch.softmax(aligned(4, 5), 1) if probabilities else torch.arange(4)
    for strided in (weight, weight[:1].expand(5)):
        found, wanted = (gk.cross_entropy(logits, target, w) for w in (strided, strided.contiguous()))
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_no_class(backend: str) -> None:
    """Weighted rows, all of them ignored, found no class to look up, and probabilities gave NaN on the kernels."""
    logits, row_weight = torch.zeros(4, 0, requires_grad=True), torch.rand(4, requires_grad=True)
    for target in (torch.full((4,), -100), torch.zeros(4, 0)):
        with gk.backend(backend):
            loss = gk.cross_entropy(logits, target, torch.zeros(0), row_weight=row_weight, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, row_weight)
        assert not loss
        assert not gradient.any()


@pytest.mark.interpreter
@pytest.mark.parametrize(("make", "kind"), [(_indices, "_held"), (_probabilities, "")])
def test_loss_and_gradient_in_one_launch(make: Callable[..., dict[str, Any]], kind: str) -> None:
    """As linear cross entropy has it: the gradient takes the logits' place."""
    given = make(torch.randn(5, 700))
    logits, target = given["input"], given["target"]
    options = reference.Options(-100, 0.0, None, 1.0, 0.0, None, Reduction.SUM, False)
    leaf = logits.clone().double().requires_grad_()
    wanted = F.cross_entropy(leaf, target.double() if target.is_floating_point() else target, reduction="none")
    (slope,) = torch.autograd.grad(wanted.sum(), leaf)
    with gk.testing.count_launches() as launches:
        loss = op.loss_and_gradient(logits, target, None, None, None, torch.ones(()), options, logits, None, True)
    assert launches == {f"_cross_entropy_loss_and_gradient{kind}_kernel": 1}
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.double(), slope, rtol=1e-5, atol=1e-6)


def test_rows_saved_for_the_backward() -> None:
    plain = reference.Options(-100, 0.0, None, 1.0, 0.0, None, Reduction.SUM, False)
    labels, mass = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 300)
    smooth, counted = plain._replace(label_smoothing=0.1), plain._replace(stats=True)
    assert [op.saved_rows(n, labels, None, plain) for n in (launch.WHOLE_ROW, launch.WHOLE_ROW + 1)] == [0, 3]
    assert [op.saved_rows(300, labels, weight, smooth) for weight in (None, torch.ones(300))] == [3, 4]
    assert [op.saved_rows(n, mass, None, plain) for n in (launch.WHOLE_ROW, 300)] == [1, 3]
    assert op.saved_rows(300, mass, None, counted) == 4


@pytest.mark.interpreter
@pytest.mark.parametrize(("options", "heavy"), [({}, False), ({"return_stats": True}, True)])
def test_rows_that_carry_more_get_smaller_tiles(
    options: dict[str, Any], heavy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, seen = op.plan, []
    monkeypatch.setattr(op, "plan", lambda *given, **rest: seen.append(rest.get("heavy", False)) or plan(*given, **rest))
    with gk.backend("triton"):
        gk.cross_entropy(**_indices(torch.randn(2, 300)), **options)
        gk.cross_entropy(**_probabilities(torch.randn(2, 300)))
    assert seen == [heavy, True]
