"""Divergences and entropy from logits on both paths against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels import cases
from genloss_kernels.cases.divergence import categorical_entropy_oracle, js_div_with_logits_oracle, kl_div_with_logits_oracle
from genloss_kernels.core import launch
from genloss_kernels.core.backend import INTERPRETED
from genloss_kernels.core.launch import Tile
from genloss_kernels.losses.divergence import api, eager, op, reference

from .comparison import DTYPES, HALVES, aligned, check, check_second_derivatives, no_synchronisation, untouched

INF, NAN = math.inf, math.nan
BOTH = ("input", "target")


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our operators also where plain ones would be quicker, in blocks that a small test has several of."""
    monkeypatch.setattr(api, "PLAIN_BELOW", 0)
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 2**9)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 that hold no row, so that a few elements go through every loop more than once."""
    monkeypatch.setattr(launch, "row_tile", lambda *_, **__: Tile(64, 4))
    monkeypatch.setattr(op, "PAIR_ROW_TILES", dict.fromkeys((2, 4, 8), Tile(64, 4)))
    monkeypatch.setattr(op, "SCATTERED_PAIR_ROW_TILE", Tile(64, 4))
    monkeypatch.setattr(op, "held_row_tile", lambda *_: None)


def _entropy(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """In the form of the others; the target takes no part."""
    return gk.categorical_entropy(input, **options)


def _entropy_oracle(input: Tensor, target: Tensor, reduction: str = "none") -> Tensor:
    return categorical_entropy_oracle(input, reduction)


# The loss, its definition in torch's operators, and options under which every term differs.
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "forward": (gk.kl_div_with_logits, kl_div_with_logits_oracle, {"temperature": 1.5}),
    "reverse": (gk.kl_div_with_logits, kl_div_with_logits_oracle, {"temperature": 0.75, "direction": "reverse"}),
    "js": (gk.js_div_with_logits, js_div_with_logits_oracle, {"temperature": 1.5, "beta": 0.25}),
    "entropy": (_entropy, _entropy_oracle, {}),
}

every_loss = pytest.mark.parametrize("name", LOSSES)


def _names(name: str) -> tuple[str, ...]:
    return BOTH[: 1 if name == "entropy" else 2]


def _pair(x: Tensor) -> dict[str, Any]:
    """Logits of a student and of a teacher in the same layout."""
    return {"input": x, "target": torch.empty_like(x).copy_(torch.randn_like(x) * 2.0)}


def _check(name: str, arguments: dict[str, Any], **rest: Any) -> Tensor:
    loss, oracle, options = LOSSES[name]
    # Most gradients are p * (value - mean): where these nearly cancel, an element is off by what its terms are off by.
    return check(loss, oracle, options | arguments, _names(name), products=name != "forward", **rest)


def _values(name: str, student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Losses of rows, without a temperature, and their gradients."""
    tensors = [student.clone().requires_grad_(), teacher.clone().requires_grad_()]
    kept = {key: value for key, value in LOSSES[name][2].items() if key != "temperature"}
    rows = LOSSES[name][0](*tensors, **(kept | {"reduction": "none"} | options))
    return rows.detach(), list(torch.autograd.grad(rows.sum(), tensors[: len(_names(name))]))


LAYOUTS = {
    "aligned rows": lambda: aligned(3, 1024),
    "ragged rows": lambda: aligned(3, 1293),
    "rows longer than are held": lambda: aligned(1, 8205),
    "one row": lambda: aligned(1, 300),
    "one vector": lambda: aligned(300),
    "one class": lambda: aligned(5, 1),
    "one number": lambda: aligned(1, 1),
    "short rows": lambda: aligned(70, 10),
    "short rows, several tiles": lambda: aligned(11, 200),
    "leading dimensions": lambda: aligned(2, 3, 4, 20)[:, ::2, 1:],
    "leading dimensions of ragged rows": lambda: aligned(2, 3, 3, 301)[:, ::2, :2],
    "transposed": lambda: aligned(300, 5).t(),
    "transposed short rows": lambda: aligned(10, 70).t(),
    "every other class": lambda: aligned(3, 1100)[:, ::2],
    "sliced classes": lambda: aligned(4, 700)[:, 37:663],
    "misaligned base": lambda: aligned(3, 512, offset=1),
    "expanded rows": lambda: aligned(1, 300).expand(4, 300),
}


@every_loss
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(path: str, name: str, layout: str) -> None:
    _check(name, {**_pair(LAYOUTS[layout]()), "reduction": "none"})


@every_loss
@pytest.mark.parametrize("shape", [(2, 256), (2, 331), (2, 300, 3)])
def test_every_loop_more_than_once(path: str, small_tiles: None, name: str, shape: tuple[int, ...]) -> None:
    x = aligned(*shape)
    _check(name, {**_pair(x if x.dim() == 2 else x.movedim(1, -1)), "reduction": "none"})


@every_loss
def test_a_share_of_a_row(path: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(launch, "splits", lambda *_: 3)
    for x in (aligned(2, 1030), aligned(2, 300, 3).movedim(1, -1)):
        _check(name, _pair(x))
        if name in ("forward", "entropy"):
            # So far above the others that no other share's maximum could stand for it.
            x[..., 0] = 200.0
            _check(name, _pair(x))


@every_loss
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
def test_reduction(path: str, name: str, reduction: str) -> None:
    rows = _check(name, {**_pair(aligned(2, 3, 33)), "reduction": "none"})
    assert rows.shape == (2, 3)
    arguments = _pair(aligned(2, 3, 33)) | {"reduction": reduction}
    found = _check(name, arguments)
    rows = LOSSES[name][0](**(LOSSES[name][2] | arguments | {"reduction": "none"}))
    divisor = {"mean": 6, "batchmean": 2, "sum": 1}.get(reduction)
    torch.testing.assert_close(found, rows if divisor is None else rows.sum() / divisor)


@every_loss
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(path: str, name: str, dtype: torch.dtype) -> None:
    for x in (aligned(3, 773 if dtype not in HALVES else 1293, dtype=dtype), aligned(9, 37, dtype=dtype)):
        _check(name, _pair(x))
        _check(name, {**_pair(x), "reduction": "none"})


@pytest.mark.parametrize("name", ["forward", "reverse", "js"])
def test_operands_of_different_dtypes_and_layouts(path: str, name: str) -> None:
    student = aligned(3, 301, dtype=torch.bfloat16)
    _check(name, {"input": student, "target": aligned(3, 301)}, dtype=torch.float32)
    _check(name, {"input": aligned(4, 300), "target": aligned(300, 4).t()})
    _check(name, {"input": aligned(4, 301), "target": aligned(4, 305, offset=2)[:, 2:-2]})
    _check(name, {"input": aligned(4, 30), "target": aligned(1, 30).expand(4, 30)})


@every_loss
def test_one_gradient_alone(path: str, name: str) -> None:
    loss, oracle, options = LOSSES[name]
    for x in (aligned(3, 300), aligned(5, 20)):
        for wanted in _names(name):
            check(loss, oracle, options | _pair(x), (wanted,), products=True)


@every_loss
def test_upstream_gradients_of_any_kind(path: str, name: str) -> None:
    loss, oracle, options = LOSSES[name]
    factors = torch.rand(4, 3).t()
    for combine in (lambda rows: (rows * factors).sum(), lambda rows: rows.sum(), lambda rows: rows[:, :2].sum()):
        check(
            lambda combine=combine, **given: combine(loss(**given, reduction="none")),
            lambda combine=combine, **given: combine(oracle(**given, reduction="none")),
            options | _pair(aligned(3, 4, 19)),
            _names(name),
            products=True,
        )


# --- values ----------------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("columns", [10, 300])
@pytest.mark.parametrize("scale", [5e3, 1e-3])
def test_extreme_logits(path: str, name: str, columns: int, scale: float) -> None:
    x = aligned(4, columns)
    arguments = {"input": x * scale, "target": torch.randn_like(x) * scale}
    _check(name, arguments | {"reduction": "none"})


@every_loss
@pytest.mark.parametrize("columns", [10, 300])
def test_offsets_cost_no_digits(path: str, name: str, columns: int) -> None:
    """Integers at either end of what fp32 holds exactly."""
    student, teacher = (torch.randint(-8, 8, (4, columns)).float() for _ in range(2))
    plain, grads = _values(name, student, teacher)
    far, far_grads = _values(name, student + 2.0**20, teacher - 2.0**20)
    torch.testing.assert_close(far, plain, rtol=1e-6, atol=1e-7)
    for found, wanted in zip(far_grads, grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def _infinities(columns: int) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(4, columns) * 2.0, torch.randn(4, columns) * 2.0
    student[:, 3] = teacher[:, 3] = -INF
    student[0, :5] = teacher[0, :5] = -INF
    return student, teacher


@every_loss
@pytest.mark.parametrize("columns", [10, 300])
def test_classes_without_mass_on_either_side(path: str, name: str, columns: int) -> None:
    """As if they were not there."""
    student, teacher = _infinities(columns)
    rows, grads = _values(name, student, teacher)
    for row in range(4):
        kept = student[row] != -INF
        wanted, wanted_grads = _values(name, student[row, kept].double(), teacher[row, kept].double())
        torch.testing.assert_close(rows[row].double(), wanted, rtol=1e-6, atol=0.0)
        for found, grad in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(found[row, kept].double(), grad, rtol=1e-5, atol=1e-6)
            assert not found[row, ~kept].any()


@pytest.mark.parametrize("columns", [10, 300, 600, 2100])
def test_every_class_at_the_lowest_number(path: str, columns: int) -> None:
    """As masks fill them, a whole row: each has the same mass."""
    logits = torch.full((3, columns), torch.finfo(torch.float32).min)
    torch.testing.assert_close(gk.categorical_entropy(logits, reduction="none"), torch.full((3,), math.log(columns)))
    assert not gk.js_div_with_logits(logits, logits, reduction="none").any()


@pytest.mark.parametrize("columns", [10, 300])
@pytest.mark.parametrize("name", ["forward", "reverse", "js"])
def test_classes_without_mass_on_one_side(path: str, name: str, columns: int) -> None:
    for lowest in (-INF, torch.finfo(torch.float32).min):
        few, all_ = torch.randn(4, columns), torch.randn(4, columns)
        few[:, 2] = lowest
        few[1, -3:] = lowest
        first, second = (few, all_) if name != "reverse" else (all_, few)
        # KL(teacher || student) with the mass missing on the teacher's side, and reverse.
        finite, grads = _values(name, second, first)
        assert finite.isfinite().all()
        assert all(grad.isfinite().all() for grad in grads)
        wanted, _ = _values(name, second.double(), first.double())
        torch.testing.assert_close(finite.double(), wanted, rtol=1e-5, atol=0.0)
        if name != "js":
            missing, grads = _values(name, first, second)
            assert (missing == INF).all()
            # That with the mass missing learns all the same: of a KL's second argument the gradient is q - p.
            learning = grads[0 if name == "forward" else 1]
            p, q = (torch.softmax(x, -1) for x in ((second, first) if name == "forward" else (first, second)))
            torch.testing.assert_close(learning, q - p)


def _masked(columns: int) -> tuple[Tensor, Tensor]:
    """Rows with logits at the ends of fp32, and what they count as."""
    rows, lowest = torch.randn(8, columns), torch.finfo(torch.float32).min
    rows[1, -3:] = rows[2, :3] = rows[3, 1::2] = rows[5:8] = lowest
    rows[4, 5], rows[7, columns // 2] = 1e32, 0.0
    below = (rows - rows.amax(-1, keepdim=True)).double()
    return rows, below.masked_fill(below < -1e30, -INF)


@pytest.mark.parametrize("columns", [10, 300, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["forward", "reverse"])
def test_known_failure_masks_of_the_lowest_number(
    path: str, name: str, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A logit far below its row's maximum counts as -inf, and a row that is low throughout is like any other."""
    if columns == 10:
        monkeypatch.setattr(api, "PLAIN_BELOW", 2**13)
    if columns == 300:
        request.getfixturevalue("small_tiles")
    student, counted_student = _masked(columns)
    teacher, counted_teacher = _masked(columns)
    # Masks that meet masks, and others.
    for shift in (0, 1, 3):
        rows, grads = _values(name, student.to(dtype), teacher.to(dtype).roll(shift, 0))
        counted = counted_student, counted_teacher.roll(shift, 0)
        wanted = kl_div_with_logits_oracle(*counted, direction=name, reduction="none")
        torch.testing.assert_close(rows.double(), wanted, rtol=1e-5, atol=1e-7)
        (of_q, of_p), (q, p) = (pair if name == "forward" else pair[::-1] for pair in (grads, counted))
        p, q = torch.softmax(p, -1), torch.softmax(q, -1)
        torch.testing.assert_close(of_q.double(), q - p, rtol=1e-5, atol=1e-6)
        finite = rows.isfinite()
        wanted = torch.where(p > 0.0, p * (p.log() - q.log() - wanted.unsqueeze(-1)), 0.0)
        torch.testing.assert_close(of_p[finite].double(), wanted[finite], rtol=1e-5, atol=1e-6)
        assert not (of_p[~finite].isfinite() & (p[~finite] > 0.0)).any()


@pytest.mark.parametrize("columns", [10, 300])
def test_no_mass_where_the_probability_rounds_to_0(path: str, columns: int) -> None:
    student, teacher = torch.randn(2, columns), torch.randn(2, columns)
    student[:, 1], teacher[:, 1] = -INF, -2000.0
    rows, grads = _values("forward", student, teacher)
    student[:, 1], teacher[:, 1] = -INF, -INF
    wanted, wanted_grads = _values("forward", student, teacher)
    torch.testing.assert_close(rows, wanted)
    for found, grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(found, grad)


@every_loss
@pytest.mark.parametrize("columns", [10, 300])
def test_rows_that_are_no_distribution(path: str, name: str, columns: int) -> None:
    """NaN for that row, and for no other."""
    for value in (NAN, INF, "all"):
        student, teacher = torch.randn(4, columns), torch.randn(4, columns)
        if value == "all":
            student[1], teacher[2] = -INF, -INF
        else:
            student[1, 5] = teacher[2, 7] = value
        rows, grads = _values(name, student, teacher)
        wanted = [False, True, name != "entropy", False]
        assert rows.isnan().tolist() == wanted
        assert all(grad[[0, 3]].isfinite().all() for grad in grads)


@pytest.mark.parametrize("columns", [10, 300])
@pytest.mark.parametrize("name", ["forward", "reverse", "js"])
def test_equal_logits_give_0(path: str, name: str, columns: int) -> None:
    x = torch.randn(3, columns) * 3.0
    for y in (x, x + 0.0, x.double()):
        rows, grads = _values(name, x, y)
        assert (rows.abs() < 1e-9).all()
        assert all((grad.abs() < 1e-6).all() for grad in grads)


@pytest.mark.parametrize("columns", [10, 300, 1000])
@pytest.mark.parametrize("name", ["forward", "reverse", "js"])
def test_close_logits_keep_their_digits(path: str, name: str, columns: int) -> None:
    """A divergence of 1e-7, as much as fp32 log-probabilities are off by."""
    teacher = torch.randn(3, columns) * 2.0
    for distance in (3e-2, 1e-3):
        student = teacher + distance * torch.randn(3, columns)
        # One row is far, and must be as it was.
        student[1] = torch.randn(columns)
        rows, _ = _values(name, student, teacher)
        wanted, _ = _values(name, student.double(), teacher.double())
        torch.testing.assert_close(rows.double(), wanted, rtol=2e-4, atol=0.0)
        assert (rows > 0.0).all()


def _of_second_order(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """What a divergence of ever closer logits tends to: the variance of their difference, times a factor."""
    difference, p = student.double() - teacher.double(), torch.softmax(teacher.double(), -1)
    surplus = difference - (p * difference).sum(-1, keepdim=True)
    factor = 0.25 * 0.75 if name == "js" else 1.0
    return 0.5 * factor * (p * surplus.square()).sum(-1)


@pytest.mark.parametrize("below", [0, 2**13])
@pytest.mark.parametrize("columns", [10, 300, 1000])
@pytest.mark.parametrize("name", ["forward", "reverse", "js"])
def test_known_failure_close_logits_in_double_precision(
    path: str, name: str, columns: int, below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divergences as small as the last places of their terms were negative."""
    monkeypatch.setattr(api, "PLAIN_BELOW", below)
    teacher = torch.randn(3, columns, dtype=torch.float64)
    for distance in (1e-7, 1e-8):
        student = teacher + distance * torch.randn_like(teacher)
        rows, _ = _values(name, student, teacher)
        torch.testing.assert_close(rows, _of_second_order(name, student, teacher), rtol=1e-6, atol=0.0)
        total = LOSSES[name][0](student, teacher, **(LOSSES[name][2] | {"temperature": 1.0, "reduction": "sum"}))
        torch.testing.assert_close(total, rows.sum())


@pytest.mark.parametrize("below", [0, 2**13])
@pytest.mark.parametrize("name", ["forward", "reverse", "js"])
def test_known_failure_logits_a_last_place_apart(name: str, below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "PLAIN_BELOW", below)
    student = torch.randn(3, 64)
    teacher = torch.where(torch.rand(3, 64) < 0.2, student.nextafter(torch.tensor(9.0)), student)
    rows, _ = _values(name, student, teacher)
    torch.testing.assert_close(rows.double(), _of_second_order(name, student, teacher), rtol=1e-6, atol=0.0)


def test_known_failure_close_logits_of_a_mixture(path: str) -> None:
    """The difference of two rounded log-probabilities was off by more than that of logits below their maxima."""
    teacher = torch.randn(3, 600)
    student = teacher + 1e-3 * torch.randn(3, 600)
    rows, _ = _values("js", student, teacher)
    wanted, _ = _values("js", student.double(), teacher.double())
    torch.testing.assert_close(rows.double(), wanted, rtol=2e-5, atol=0.0)


def test_close_rows_in_every_tile(path: str, small_tiles: None) -> None:
    teacher = torch.randn(331, 3)
    student = teacher + 1e-3 * torch.randn(331, 3)
    for x, y in ((student.t(), teacher.t()), (student.t().contiguous(), teacher.t().contiguous())):
        rows, _ = _values("forward", x, y)
        wanted, _ = _values("forward", x.double(), y.double())
        torch.testing.assert_close(rows.double(), wanted, rtol=2e-4, atol=0.0)


def test_cross_entropy_is_entropy_and_divergence(path: str) -> None:
    student, teacher = aligned(5, 300), aligned(5, 300)
    cross = gk.cross_entropy(student, torch.softmax(teacher, -1), reduction="none")
    found = gk.categorical_entropy(teacher) + gk.kl_div_with_logits(student, teacher, reduction="none")
    torch.testing.assert_close(found, cross)


def test_symmetry(path: str) -> None:
    for shape in ((5, 300), (5, 20)):
        x, y = aligned(*shape), aligned(*shape)
        torch.testing.assert_close(gk.js_div_with_logits(x, y), gk.js_div_with_logits(y, x))
        torch.testing.assert_close(
            gk.js_div_with_logits(x, y, beta=0.2, temperature=3.0), gk.js_div_with_logits(y, x, beta=0.8, temperature=3.0)
        )
        forward, reverse = gk.kl_div_with_logits(x, y), gk.kl_div_with_logits(y, x, direction="reverse")
        torch.testing.assert_close(forward, reverse)
        assert (gk.js_div_with_logits(x * 50.0, y * 50.0, reduction="none") <= math.log(2.0) * (1.0 + 1e-6)).all()


@pytest.mark.parametrize("beta", [1e-3, 0.999])
def test_beta_near_its_ends(path: str, beta: float) -> None:
    _check("js", {**_pair(aligned(3, 300)), "beta": beta})


def test_uniform_and_certain_distributions(path: str) -> None:
    for columns in (7, 300):
        certain = torch.full((2, columns), -200.0)
        certain[:, 3] = 200.0
        assert gk.categorical_entropy(certain).tolist() == [0.0, 0.0]
        uniform = torch.zeros(2, columns)
        torch.testing.assert_close(gk.categorical_entropy(uniform), torch.full((2,), math.log(columns)))
        torch.testing.assert_close(gk.kl_div_with_logits(uniform, certain), torch.tensor(math.log(columns)))


# --- everything else -------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("shape", [(0, 10), (3, 0, 300), (0, 0), (2, 0)])
def test_empty(name: str, shape: tuple[int, ...]) -> None:
    for backend in ("eager", "auto", *(["triton"] if INTERPRETED else [])):
        for reduction in ("none", "sum", "mean"):
            x, y = (torch.zeros(shape, requires_grad=True) for _ in range(2))
            with gk.backend(backend):
                found = LOSSES[name][0](x, y, reduction=reduction)
            torch.testing.assert_close(found, LOSSES[name][1](x, y, reduction=reduction), equal_nan=True)
            found.sum().backward()
            assert x.grad is not None
            assert x.grad.shape == shape


@every_loss
def test_known_failure_retained_graph_and_double_backward(path: str, name: str) -> None:
    """retain_graph failed, and a second derivative was silently wrong (QuACK #209, Liger JSD)."""
    loss, oracle, options = LOSSES[name]
    for reduction in ("none", "mean"):
        for shape in ((3, 10), (2, 260)):
            arguments = options | _pair(aligned(*shape)) | {"reduction": reduction}
            check_second_derivatives(loss, oracle, arguments, _names(name))


@every_loss
def test_inputs_stay_and_bits_repeat(path: str, name: str) -> None:
    arguments = LOSSES[name][2] | _pair(aligned(3, 301))
    kept = {key: arguments[key].clone() for key in BOTH}
    results = []
    for _ in range(3):
        tensors = {key: arguments[key].detach().requires_grad_() for key in BOTH}
        found = LOSSES[name][0](**(arguments | tensors))
        results.append((found, *torch.autograd.grad(found.sum(), [tensors[key] for key in _names(name)])))
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))
    assert all(torch.equal(arguments[key], value) and arguments[key]._version <= 1 for key, value in kept.items())


def test_modules(path: str) -> None:
    x, y = aligned(3, 20), aligned(3, 20)
    options = {"temperature": 2.0, "direction": "reverse", "reduction": "sum"}
    assert torch.equal(gk.KLDivWithLogitsLoss(**options)(x, y), gk.kl_div_with_logits(x, y, **options))
    options = {"temperature": 2.0, "beta": 0.3, "reduction": "none"}
    assert torch.equal(gk.JSDivWithLogitsLoss(**options)(x, y), gk.js_div_with_logits(x, y, **options))


def test_nothing_is_kept_where_nothing_learns() -> None:
    """The eager path leaves gradients behind only for whom they are wanted."""
    sizes = []
    original = eager.forward

    def spy(input: Tensor, target: Tensor, options: Any, *into: Tensor | None) -> Tensor:
        sizes.append(tuple(t is not None for t in into))
        return original(input, target, options, *into)

    x, y = aligned(3, 20).requires_grad_(), aligned(3, 20)
    with pytest.MonkeyPatch.context() as patch, gk.backend("eager"):
        patch.setattr(eager, "forward", spy)
        gk.kl_div_with_logits(x, y)
        gk.kl_div_with_logits(y, x)
        with torch.no_grad():
            gk.kl_div_with_logits(x, x)
    assert sizes == [(True, False), (False, True), (False, False)]


@pytest.mark.interpreter
@every_loss
def test_known_failure_int32_offsets(name: str) -> None:
    """Elements past 2**31 were addressed modulo 2**32 (pytorch #111484, fla #1080, trl #7266)."""
    for size, stride in (((3, 300), (2**30, 1)), ((2, 5), (1, 2**30)), ((2, 270), (1, 2**24))):
        extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        x = untouched(2**32 + extent).as_strided(size, stride, 2**32)
        values, teacher = aligned(*size, dtype=torch.bfloat16), aligned(*size, dtype=torch.bfloat16)
        x.copy_(values)
        with gk.backend("triton"):
            found, wanted = (LOSSES[name][0](y, teacher, reduction="none") for y in (x, values))
        torch.testing.assert_close(found, wanted)


@pytest.mark.interpreter
@every_loss
def test_known_failure_host_synchronisation(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every step waited for the device to read a value (.item(), torch.equal; Liger)."""
    arguments = _pair(aligned(5, 300).requires_grad_())
    with gk.backend("triton"), gk.testing.count_launches() as launches, no_synchronisation(monkeypatch):
        LOSSES[name][0](**arguments, reduction="mean").backward()
    assert launches.total() == 3


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="loads and stores are counted by Triton's interpreter")
def test_only_what_must_be_read_twice_is(monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> None:
    """A long Jensen-Shannon row, and a row whose student is close to the teacher; no other."""
    from genloss_kernels.meters.bytes import measure

    def case(loss: str, close: bool = False) -> cases.Case:
        def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> cases.Call:
            target = torch.randn(2, 4096, generator=generator)
            input = target + 1e-3 if close else torch.randn(2, 4096, generator=generator)
            return cases.Call({"input": input, "target": target}, ("input",))

        return cases.Case(loss, "a test", make, kl_div_with_logits_oracle)

    assert measure(case("kl_div_with_logits")).element_ratio == pytest.approx(1.0, abs=0.01)
    assert measure(case("kl_div_with_logits", close=True)).element_ratio == pytest.approx(7 / 5, abs=0.01)
    assert measure(case("js_div_with_logits")).element_ratio == pytest.approx(7 / 5, abs=0.01)
    monkeypatch.undo()
    monkeypatch.setattr(api, "PLAIN_BELOW", 0)
    assert measure(case("js_div_with_logits")).element_ratio == pytest.approx(1.0, abs=0.01)


@every_loss
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
def test_few_logits_of_a_cpu(name: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's operators; a class without mass, where these give NaN, and close rows are our function's."""
    loss, oracle, options = LOSSES[name]
    plain, calls = reference.plain, []
    monkeypatch.setattr(reference, "plain", lambda *given: calls.append(1) or plain(*given))
    input, target = torch.randn(4, 3, 11), torch.randn(4, 3, 11)
    for limit in (0, input.numel(), input.numel() + 1):
        monkeypatch.setattr(api, "PLAIN_BELOW", limit)
        check(loss, oracle, {"input": input, "target": target, "reduction": reduction, **options}, BOTH)
    check(loss, oracle, {"input": target + 1e-4 * input, "target": target, "reduction": reduction, **options}, BOTH)
    assert calls
    without = [t.index_fill(-1, torch.tensor([3]), -INF) for t in (input, target)]
    reduced = {"reduction": reduction, **options}
    torch.testing.assert_close(
        loss(*without, **reduced), loss(*(t[..., [0, 1, 2, *range(4, 11)]] for t in without), **reduced)
    )


@pytest.mark.parametrize("name", ["forward", "reverse", "js"])
@pytest.mark.parametrize("narrow", [0, 1])
def test_known_failure_half_precision_beside_double(path: str, narrow: int, name: str) -> None:
    tensors = [torch.randn(3, 300), torch.randn(3, 300)]
    exact = [t.bfloat16().double().requires_grad_() for t in tensors]
    leaves = [t.detach().to(torch.bfloat16 if k == narrow else torch.float64).requires_grad_() for k, t in enumerate(exact)]
    loss, _, options = LOSSES[name]
    found = torch.autograd.grad(loss(*leaves, **options), leaves)
    wanted = torch.autograd.grad(loss(*exact, **options), exact)
    for one, other in zip(found, wanted, strict=True):
        # Triton's interpreter truncates what it stores in bfloat16.
        tolerance = 2.0**-7 if one.dtype == torch.bfloat16 else 1e-9
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=1e-9)


def test_only_gradients_asked_for_are_stored() -> None:
    tensors = torch.randn(3, 4), torch.randn(3, 4)
    for needed in range(4):
        sizes = [t.numel() for t in op._stored(*tensors, needed, False)]
        assert sizes == [12 * (needed & 1), 12 * (needed >> 1)]
    assert [t.numel() for t in op._stored(*tensors, 3, True)] == [0, 0]
    assert [t.numel() for t in op._stored(tensors[0], None, 3, False)] == [12, 0]


def test_mass_that_only_the_second_has(path: str) -> None:
    """Beside much else: a divergence as small as this is summed by terms, of which this one is the second's probability."""
    p, q = torch.zeros(1, 300), torch.zeros(1, 300)
    p[0, 7], q[0, 7] = -200.0, -3.0
    found = gk.kl_div_with_logits(q, p, reduction="none")
    torch.testing.assert_close(found, kl_div_with_logits_oracle(q.double(), p.double(), reduction="none").float())


def test_probabilities_whose_reciprocals_overflow() -> None:
    options = reference.Options(reference.Kind.FORWARD_KL, 1.0, 0.5, None)
    found = reference.rows(torch.zeros(1, 2), torch.tensor([[0.0, -720.0]]), options)
    torch.testing.assert_close(found, torch.tensor([math.log(2.0)]))


@pytest.mark.parametrize("classes", [launch.WHOLE_ROW, launch.WHOLE_ROW + 1])
@every_loss
def test_at_the_most_classes_that_a_tile_holds(path: str, name: str, classes: int) -> None:
    """Their numbers are found anew in the backward, and those of longer rows read."""
    loss, oracle, options = LOSSES[name]
    check(loss, oracle, {"input": aligned(3, classes), "target": aligned(3, classes), **options}, BOTH[:1])
