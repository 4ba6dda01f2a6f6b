"""Cross entropy under gk.gradient_in_forward()."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import genloss_kernels as gk
from genloss_kernels.cases.cross_entropy import cross_entropy_oracle
from genloss_kernels.core import launch
from genloss_kernels.core.launch import Tile

from .comparison import aligned, check, check_second_derivatives
from .test_cross_entropy import LAYOUTS, _every_option, _indices, _probabilities

HELD, LONG, PLAIN, SUM, SCALE = (
    "_cross_entropy_loss_and_gradient_held_kernel",
    "_cross_entropy_loss_and_gradient_kernel",
    "_cross_entropy_forward_rows_kernel",
    "_reduction_kernel",
    "_scale_kernel",
)

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _in_forward() -> Iterator[None]:
    with gk.backend("triton"), gk.gradient_in_forward():
        yield


@pytest.fixture
def unshared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows are not shared among programs, as many are not."""
    monkeypatch.setattr(launch, "splits", lambda *_: 1)


@pytest.fixture(params=[HELD, LONG])
def kernel(request: pytest.FixtureRequest, unshared: None, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == LONG:
        monkeypatch.setattr(launch, "_HELD_ROW", dict.fromkeys((2, 4, 8), (1, 1)))
        monkeypatch.setattr(launch, "_LONG_ROW_TILES", dict.fromkeys((2, 4, 8), (Tile(512, 4), Tile(256, 4))))
    return request.param


def _row_options(logits: Tensor) -> dict[str, dict[str, Any]]:
    every = _every_option(logits)
    return {
        "plain": {},
        "sum": {"reduction": "sum"},
        "smoothing": {"label_smoothing": 0.125},
        "class weights": {"weight": every["weight"]},
        "class weights and smoothing": {"weight": every["weight"], "label_smoothing": 0.125},
        "row weights": {"row_weight": every["row_weight"]},
        "scale and z-loss": {"logit_scale": 0.75, "z_loss": 2.0**-9},
        "divisor": {"divisor": 7.5},
        "divisor on the device": {"divisor": torch.tensor(7.5)},
    }


@pytest.mark.parametrize("name", list(_row_options(torch.zeros(2, 2))))
@pytest.mark.parametrize("classes", [1024, 1293])
def test_options(kernel: str, classes: int, name: str) -> None:
    logits = aligned(5, classes)
    with gk.testing.count_launches() as launches:
        check(gk.cross_entropy, cross_entropy_oracle, _indices(logits, **_row_options(logits)[name]))
    # Whose coefficients a program cannot hold as well.
    chosen = LONG if name == "class weights and smoothing" else kernel
    assert launches == {chosen: 1, SUM: 1, SCALE: 1}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str) -> None:
    """As the plan has it: shared rows and tiles of short ones take two launches."""
    check(gk.cross_entropy, cross_entropy_oracle, _indices(LAYOUTS[name]()))


@pytest.mark.parametrize("name", ["ragged: blocks, tail and edges", "misaligned base", "next-token view", "sliced classes"])
def test_layout_in_one_launch(kernel: str, name: str) -> None:
    logits = LAYOUTS[name]()
    check(gk.cross_entropy, cross_entropy_oracle, _indices(logits, **_every_option(logits)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(kernel: str, dtype: torch.dtype) -> None:
    """With the upstream gradient of backward(), which rounds nothing a second time."""
    given, results = _indices(aligned(4, 1293).to(dtype)), []
    runs = (gk.cross_entropy, dtype), (cross_entropy_oracle, torch.float32), (cross_entropy_oracle, torch.float64)
    for function, wide in runs:
        leaf = given["input"].to(wide).requires_grad_()
        loss = function(**given | {"input": leaf})
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    for ours, single, double in zip(*results, strict=True):
        gk.testing.assert_close(ours, double, single)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter's NumPy
@pytest.mark.parametrize("row", [[math.inf], [-math.inf], [math.nan], [-math.inf, -math.inf], [3e38, -3e38]])
def test_extreme_rows_are_those_of_the_other_mode(kernel: str, row: list[float]) -> None:
    logits = torch.randn(6, 700)
    logits[2, : len(row)] = torch.tensor(row)
    logits[4, 1:] = row[0]
    target = torch.randint(700, (6,))
    target[5] = 699

    def both() -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        loss = gk.cross_entropy(leaf, target, reduction="sum")
        return loss, torch.autograd.grad(loss, leaf)[0]

    found = both()
    with gk.gradient_in_forward(False):
        wanted = both()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_ignored_rows_may_hold_anything_and_bad_labels_give_nan(kernel: str) -> None:
    logits, target = torch.randn(4, 700), torch.tensor([5, -100, 700, 699])
    logits[1] = math.nan
    leaf = logits.clone().requires_grad_()
    with gk.testing.device_semantics():
        loss = gk.cross_entropy(leaf, target)
        loss.backward()
    assert leaf.grad is not None
    assert loss.isnan()
    assert not leaf.grad[1].any()
    assert leaf.grad[2].isnan().all()
    assert leaf.grad[[0, 3]].isfinite().all()


def test_no_row_counts(kernel: str) -> None:
    leaf, target = torch.randn(3, 700, requires_grad=True), torch.full((3,), -100)
    gk.cross_entropy(leaf, target, reduction="sum").backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()
    assert gk.cross_entropy(leaf, target).isnan()


@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_backward_twice_and_with_any_upstream(kernel: str, upstream: float) -> None:
    logits = aligned(4, 1024).requires_grad_()
    before, given = logits.detach().clone(), _indices(logits)
    wanted = torch.autograd.grad(cross_entropy_oracle(**given) * upstream, logits)[0]
    with gk.testing.count_launches() as launches:
        loss = gk.cross_entropy(**given)
        for launched in ({kernel: 1, SUM: 1, SCALE: 1}, {kernel: 2, SUM: 2, SCALE: 2}):
            (found,) = torch.autograd.grad(loss * upstream, logits, retain_graph=True)
            torch.testing.assert_close(found, wanted)
            assert launches == launched
    assert torch.equal(logits, before)


def test_second_derivatives(kernel: str) -> None:
    check_second_derivatives(gk.cross_entropy, cross_entropy_oracle, _indices(torch.randn(3, 300)))


@pytest.mark.parametrize(
    "other",
    [
        {"reduction": "none"},
        {"return_stats": True},
        {"row_weight": torch.rand(4).requires_grad_()},
        {"input": torch.randn(4, 700).half().requires_grad_()},
        {"input": torch.randn(4, 700)},
        {"inplace_backward": True, "input": torch.randn(4, 700).requires_grad_() * 1},
    ],
)
def test_elsewhere_nothing_changes(unshared: None, other: dict[str, Any]) -> None:
    given = _indices(torch.randn(4, 700, requires_grad=True)) | other
    with gk.testing.count_launches() as launches:
        gk.cross_entropy(**given)
    assert launches[PLAIN] == 1
    assert not {HELD, LONG} & launches.keys()


def test_lazily_negated_operands_and_upstream_gradients(unshared: None) -> None:
    """Whose memory does not hold their values."""
    x, target, row_weight = torch.randn(4, 300, requires_grad=True), torch.randint(300, (4,)), torch.rand(4) + 0.5
    loss = gk.cross_entropy(x, target, row_weight=row_weight)
    for given in ((torch._neg_view(-x), row_weight), (x, torch._neg_view(-row_weight))):
        torch.testing.assert_close(gk.cross_entropy(given[0], target, row_weight=given[1]), loss)
    for upstream in (torch._neg_view(torch.tensor(-2.0)), torch._efficientzerotensor((), dtype=torch.float32)):
        (found,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
        wanted = torch.autograd.grad(cross_entropy_oracle(x, target, row_weight=row_weight), x)[0] * float(upstream)
        torch.testing.assert_close(found, wanted)


def test_checkpoints_recompute_on_any_thread(unshared: None) -> None:
    x, target, scale = (
        torch.randn(4, 300, requires_grad=True),
        torch.randint(300, (4,)),
        torch.tensor(2.0, requires_grad=True),
    )

    def step(x: Tensor) -> Tensor:
        with gk.backend("triton"):
            return gk.cross_entropy(x * 1.0, target) * scale

    wanted = torch.autograd.grad(step(x), x)[0]
    for inside in (True, False):
        with gk.gradient_in_forward(inside):
            loss = checkpoint(step, x, use_reentrant=False)
        with gk.gradient_in_forward(not inside):
            (found,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(found, wanted)


def test_an_infinite_upstream_gradient_leaves_ignored_rows_alone(kernel: str) -> None:
    x = torch.randn(3, 300, requires_grad=True)
    gk.cross_entropy(x, torch.tensor([1, -100, 4])).backward(torch.tensor(math.inf))
    assert x.grad is not None
    assert not x.grad[1].any()
    assert not x.grad[[0, 2]].isfinite().any()


def test_the_weight_of_a_label_out_of_range_counts_for_nothing(kernel: str) -> None:
    target, weight = torch.tensor([300, 1, -1]), torch.rand(300) + 0.5
    slopes = []
    for in_forward in (True, False):
        x = torch.linspace(-1, 1, 900).view(3, 300).requires_grad_()
        with gk.testing.device_semantics(), gk.gradient_in_forward(in_forward):
            gk.cross_entropy(x, target, weight).backward()
        slopes.append(x.grad)
    torch.testing.assert_close(slopes[0], slopes[1], equal_nan=True)


def test_probabilities_and_transforms_change_nothing(unshared: None) -> None:
    given = _probabilities(torch.randn(4, 700, requires_grad=True))
    target = torch.randint(700, (4,))
    with gk.testing.count_launches() as launches:
        gk.cross_entropy(**given)
        torch.func.grad(lambda x: gk.cross_entropy(x, target))(torch.randn(4, 700))
    assert launches[PLAIN] == 2
    assert not {HELD, LONG} & launches.keys()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_changes_nothing() -> None:
    x, target = torch.randn(4, 300, requires_grad=True), torch.randint(300, (4,))
    compiled = torch.compile(gk.cross_entropy, fullgraph=True, backend="aot_eager")
    with gk.testing.count_launches() as launches:
        compiled(x, target).backward()
    assert not {HELD, LONG} & launches.keys()
    torch.testing.assert_close(x.grad, torch.autograd.grad(cross_entropy_oracle(x, target), x)[0])


def test_only_where_it_was_asked_for(unshared: None) -> None:
    given = _indices(torch.randn(4, 700, requires_grad=True))
    with gk.gradient_in_forward(False), gk.testing.count_launches() as launches:
        gk.cross_entropy(**given).backward()
    assert not {HELD, LONG} & launches.keys()
    with gk.backend("eager"), gk.testing.count_launches() as launches:
        gk.cross_entropy(**given).backward()
    assert not launches


@pytest.mark.parametrize("classes", [700, 32000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_up_to_32k_classes_are_held(classes: int, dtype: torch.dtype) -> None:
    tile = launch.held_loss_tile(classes, dtype.itemsize)
    assert tile is not None
    assert tile.block >= classes
    assert launch.held_loss_tile(32769, dtype.itemsize) is None
    cpu = torch.device("cpu")
    assert launch.long_row_tile(classes, dtype.itemsize, ragged=False, device=cpu) is None
    assert launch.long_row_tile(32776, dtype.itemsize, ragged=False, device=cpu) is not None
