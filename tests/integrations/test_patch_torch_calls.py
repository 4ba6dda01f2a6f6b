"""Which code takes a call under ``gk.patch_torch()``, and that its numbers, dtypes, warnings and errors are torch's."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import genloss_kernels as gk
from genloss_kernels.core.torch_losses import TORCH_LOSSES

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")

N, C = 6, 5

# A function's arguments, drawn in a dtype; its name; its keywords.
Make = Callable[["Draw"], tuple[Any, ...]]


class Draw:
    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def shares(self, *shape: int) -> Tensor:
        """In (0, 1), clear of both."""
        return (torch.rand(shape, generator=self.generator, device=self.device) * 0.8 + 0.1).to(self.dtype)

    def labels(self, *shape: int) -> Tensor:
        return torch.randint(C, shape, generator=self.generator, device=self.device)

    def signs(self) -> Tensor:
        return torch.tensor([1, -1] * (N // 2), device=self.device)


def _head(draw: Draw) -> tuple[Any, ...]:
    return draw.normal(N, 4), draw.normal(C, 4), draw.labels(N)


CALLS: dict[str, tuple[str, Make, dict[str, Any]]] = {
    "labels": ("cross_entropy", lambda d: (d.normal(N, C), d.labels(N)), {}),
    "labels of pictures": ("cross_entropy", lambda d: (d.normal(2, C, 3, 2), d.labels(2, 3, 2)), {"ignore_index": 1}),
    "bytes": ("cross_entropy", lambda d: (d.normal(N, C), d.labels(N).to(torch.uint8)), {}),
    "one row": ("cross_entropy", lambda d: (d.normal(C), d.labels()), {"label_smoothing": 0.1}),
    "class weights": ("cross_entropy", lambda d: (d.normal(N, C), d.labels(N), d.shares(C)), {}),
    "probabilities": ("cross_entropy", lambda d: (d.normal(N, C), d.shares(N, C)), {"label_smoothing": 0.1}),
    "transposed": ("cross_entropy", lambda d: (d.normal(C, N).t(), d.labels(N)), {}),
    "no rows": ("cross_entropy", lambda d: (d.normal(0, C), d.labels(0)), {}),
    "nll": ("nll_loss", lambda d: (d.normal(N, C), d.labels(N), d.shares(C)), {"ignore_index": 2}),
    "nll of pictures": ("nll_loss", lambda d: (d.normal(2, C, 3), d.labels(2, 3)), {}),
    "head": ("linear_cross_entropy", _head, {}),
    "head of one row": ("linear_cross_entropy", lambda d: (d.normal(4), d.normal(C, 4), d.labels()), {}),
    "logits": ("binary_cross_entropy_with_logits", lambda d: (d.normal(N, C), d.shares(N, C)), {}),
    "weighted logits": (
        "binary_cross_entropy_with_logits",
        lambda d: (d.normal(N, C), d.shares(N, C), d.shares(N, 1), None, None, "mean", d.shares(C)),
        {},
    ),
    "chances": ("binary_cross_entropy", lambda d: (d.shares(N, C), d.shares(N, C), d.shares(C)), {}),
    "divergence": ("kl_div", lambda d: (d.normal(N, C), d.shares(N, C)), {}),
    "divergence of logarithms": ("kl_div", lambda d: (d.normal(N, C), d.normal(N, C)), {"log_target": True}),
    "squares": ("mse_loss", lambda d: (d.normal(N, C), d.normal(N, C)), {}),
    "weighted squares": ("mse_loss", lambda d: (d.normal(N, C), d.normal(N, C), None, None, "mean", d.shares(N, C)), {}),
    "distances": ("l1_loss", lambda d: (d.normal(N, C), d.normal(N, C)), {}),
    "weighted distances": ("l1_loss", lambda d: (d.normal(N, C), d.normal(N, C), None, None, "mean", d.shares(N, C)), {}),
    "smooth": ("smooth_l1_loss", lambda d: (d.normal(N, C), d.normal(N, C)), {"beta": 0.7}),
    "smooth of no width": ("smooth_l1_loss", lambda d: (d.normal(N, C), d.normal(N, C)), {"beta": 0}),
    "huber": ("huber_loss", lambda d: (d.normal(N, C), d.normal(N, C)), {"delta": 0.7}),
    "weighted huber": ("huber_loss", lambda d: (d.normal(N, C), d.normal(N, C), "mean", 1.0, d.shares(N, C)), {}),
    "gaussian": ("gaussian_nll_loss", lambda d: (d.normal(N, C), d.normal(N, C), d.shares(N, C)), {"full": True}),
    "gaussian of rows": ("gaussian_nll_loss", lambda d: (d.normal(N, C), d.normal(N, C), d.shares(N)), {}),
    "gaussian of one variance": ("gaussian_nll_loss", lambda d: (d.normal(N, C), d.normal(N, C), 0.5), {}),
    "cosines": ("cosine_embedding_loss", lambda d: (d.normal(N, C), d.normal(N, C), d.signs()), {"margin": 0.2}),
    "one cosine": ("cosine_embedding_loss", lambda d: (d.normal(C), d.normal(C), torch.tensor(-1)), {}),
}

# Where torch computes a loss in half precision, of which it may leave no digit; ours computes in fp32.
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def patch() -> Iterator[gk.integrations.torch_patch.TorchPatch]:
    with gk.patch_torch() as active:
        yield active


def _known(name: str) -> bool:
    return name in TORCH_LOSSES


def _result(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Any]:
    """Loss, and gradients of the first two floating operands and the variance, along a fixed upstream gradient."""
    learned = 3 if "gaussian" in function.__name__ else 2
    fresh = [
        a.detach().clone().requires_grad_(place < learned) if isinstance(a, Tensor) and a.is_floating_point() else a
        for place, a in enumerate(arguments)
    ]
    leaves = [a for a in fresh if isinstance(a, Tensor)]
    loss = function(*fresh, **keywords)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).view(loss.shape).to(loss.dtype)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [loss, *torch.autograd.grad(loss, wanted, upstream, allow_unused=True, materialize_grads=True)]


def _widened(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def _ours(patch: Any, name: str) -> int:
    return patch.report()["calls"].get(name, {"ours": 0})["ours"]


def _check(patch: Any, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    torchs = TORCH_LOSSES[name]
    before = _ours(patch, name)
    found = _result(getattr(F, name), arguments, keywords)
    assert _ours(patch, name) == before + 1, patch
    builtin = _result(torchs, arguments, keywords)
    exact = _result(torchs, _widened(arguments), keywords)
    like = builtin
    if found[0].dtype == torch.float64:
        narrow = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
        like = _result(torchs, narrow, keywords)
    for place, (ours, theirs, wide, judge) in enumerate(zip(found, builtin, exact, like, strict=True)):
        assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
        gk.testing.assert_close(ours, wide, judge, f"result {place} of {name}", products=name == "linear_cross_entropy")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CALLS)
def test_values_and_gradients_are_torchs(case: str, dtype: torch.dtype, reduction: str, patch: Any) -> None:
    name, make, keywords = CALLS[case]
    if not _known(name):
        pytest.skip(f"this torch has no {name}")
    arguments = make(Draw(dtype))
    place = list(inspect.signature(TORCH_LOSSES[name]).parameters).index("reduction")
    if len(arguments) > place:
        arguments = (*arguments[:place], reduction, *arguments[place + 1 :])
    else:
        keywords = {**keywords, "reduction": reduction}
    _check(patch, name, arguments, keywords)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CALLS)
def test_kernels_take_the_call(case: str, dtype: torch.dtype, patch: Any, device: torch.device) -> None:
    name, make, keywords = CALLS[case]
    if not _known(name):
        pytest.skip(f"this torch has no {name}")
    arguments = make(Draw(dtype, device))
    with gk.backend("triton"), gk.testing.count_launches() as launches:
        _check(patch, name, arguments, keywords)
    assert launches


MODULES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "CrossEntropyLoss": (lambda: nn.CrossEntropyLoss(torch.rand(C), label_smoothing=0.1), "cross_entropy", "labels"),
    "NLLLoss": (lambda: nn.NLLLoss(torch.rand(C)), "nll_loss", "nll of pictures"),
    "BCELoss": (lambda: nn.BCELoss(torch.rand(C)), "binary_cross_entropy", "chances"),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, "binary_cross_entropy_with_logits", "logits"),
    "KLDivLoss": (nn.KLDivLoss, "kl_div", "divergence"),
    "MSELoss": (nn.MSELoss, "mse_loss", "squares"),
    "L1Loss": (nn.L1Loss, "l1_loss", "distances"),
    "SmoothL1Loss": (nn.SmoothL1Loss, "smooth_l1_loss", "smooth"),
    "HuberLoss": (nn.HuberLoss, "huber_loss", "huber"),
    "GaussianNLLLoss": (nn.GaussianNLLLoss, "gaussian_nll_loss", "gaussian"),
    "CosineEmbeddingLoss": (nn.CosineEmbeddingLoss, "cosine_embedding_loss", "cosines"),
}


@pytest.mark.parametrize("earlier", [True, False], ids=["made before", "made under the patch"])
@pytest.mark.parametrize("kind", MODULES)
def test_modules_run_ours(kind: str, earlier: bool) -> None:
    make, name, case = MODULES[kind]
    torch.manual_seed(0)
    module = make()

    class Own(type(module)):
        """A user's."""

        def forward(self, *operands: Tensor) -> Tensor:
            return 2.0 * super().forward(*operands)

    subclassed = Own()
    arguments = CALLS[case][1](Draw(torch.float32))[: 3 if kind in ("GaussianNLLLoss", "CosineEmbeddingLoss") else 2]
    expected, expected_own = module(*arguments), subclassed(*arguments)
    with gk.patch_torch() as patch:
        if not earlier:
            torch.manual_seed(0)
            module, subclassed = make(), Own()
        found, found_own = module(*arguments), subclassed(*arguments)
    assert patch.report()["calls"] == {name: {"ours": 2, "torch": {}}}
    torch.testing.assert_close((found, found_own), (expected, expected_own))


@pytest.mark.skipif("linear_cross_entropy" not in TORCH_LOSSES, reason="this torch has no linear cross entropy")
@pytest.mark.parametrize("chunked", [False, True])
def test_the_linear_module_runs_ours(chunked: bool) -> None:
    options = getattr(nn, "LinearCrossEntropyOptions")() if chunked else None  # noqa: B009 - torch 2.11 has none
    module = getattr(nn, "LinearCrossEntropyLoss")(4, C, bias=True, options=options)  # noqa: B009
    hidden, _, labels = _head(Draw(torch.float32))
    expected = module(hidden, labels)
    with gk.patch_torch() as patch:
        found = module(hidden, labels)
    assert patch.report()["calls"] == {"linear_cross_entropy": {"ours": 1, "torch": {}}}
    torch.testing.assert_close(found, expected)


def test_every_module_of_torch_that_is_ours_is_tested() -> None:
    assert {*MODULES, "LinearCrossEntropyLoss"} >= {name for name in gk.nn.__all__ if hasattr(nn, name)}


# --- what goes to torch ----------------------------------------------------------------------------------------------


class Foreign(Tensor):
    """A subclass with torch's own ``__torch_function__``."""


X, T = torch.linspace(-1.0, 1.0, N * C).view(N, C), torch.linspace(0.1, 0.9, N * C).view(N, C)
Y = torch.arange(N) % C
LEARNED = torch.full((N, C), 0.5, requires_grad=True)
CLASS_LEARNED = torch.full((C,), 0.5, requires_grad=True)
ODD = "an option out of the ordinary"
SHAPES = "shapes that differ"
LEGACY = "the deprecated size_average or reduce"
MIXED = "operands of several dtypes"
DTYPE = "a dtype other than fp32, fp16, bf16 and fp64"
WEIGHT = "a weight that requires a gradient"
LABELS = "labels of another dtype than int64 and uint8"

# Name, arguments, keywords, reason.
TO_TORCH: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("mse_loss", (torch.complex(X, X), torch.complex(T, T)), {}, DTYPE),
    ("l1_loss", (torch.complex(X, X), torch.complex(T, T)), {}, DTYPE),
    ("mse_loss", (Y, Y), {}, DTYPE),
    ("cosine_embedding_loss", (Y.expand(3, N), Y.expand(3, N), torch.ones(3)), {}, DTYPE),
    ("kl_div", (X, Y[:, None].expand(N, C)), {}, DTYPE),
    ("mse_loss", (X.double(), T), {}, MIXED),
    ("binary_cross_entropy_with_logits", (X, T.double()), {}, MIXED),
    ("kl_div", (X.bfloat16(), T), {}, MIXED),
    ("huber_loss", (X, T.double()), {}, MIXED),
    ("binary_cross_entropy", (T, T.double()), {}, MIXED),
    ("cross_entropy", (X, Y, torch.ones(C).double()), {}, MIXED),
    ("gaussian_nll_loss", (X, T, T.double()), {}, MIXED),
    ("cross_entropy", (X.to_sparse(), Y), {}, "not a dense tensor"),
    ("mse_loss", (X.to_mkldnn(), T.to_mkldnn()), {}, "not a dense tensor"),
    ("l1_loss", (X.to("meta"), T.to("meta")), {}, "device meta"),
    ("l1_loss", (X, T.to("meta")), {}, "tensors on several devices"),
    ("mse_loss", (X.as_subclass(Foreign), T), {}, "a subclass of Tensor"),
    ("cross_entropy", ([[1.0]], Y), {}, "not a tensor"),
    ("cross_entropy", (X, None), {}, "not a tensor"),
    ("gaussian_nll_loss", (X, T, 1), {}, "not a tensor"),
    ("cross_entropy", (X, Y), {"size_average": True}, LEGACY),
    ("nll_loss", (X, Y), {"reduce": False}, LEGACY),
    ("binary_cross_entropy", (T, T), {"size_average": False}, LEGACY),
    ("binary_cross_entropy_with_logits", (X, T), {"reduce": False}, LEGACY),
    ("kl_div", (X, T), {"size_average": False}, LEGACY),
    ("mse_loss", (X, T), {"reduce": True}, LEGACY),
    ("l1_loss", (X, T), {"reduce": True}, LEGACY),
    ("smooth_l1_loss", (X, T), {"reduce": True}, LEGACY),
    ("cosine_embedding_loss", (X, T, torch.ones(N)), {"reduce": True}, LEGACY),
    ("cross_entropy", (X, Y), {"reduction": "average"}, ODD),
    ("mse_loss", (X, T), {"reduction": "elementwise_mean"}, ODD),
    ("mse_loss", (X, T), {"reduction": "batchmean"}, ODD),
    ("cross_entropy", (X, Y), {"reduction": ["mean"]}, ODD),
    ("cross_entropy", (X, Y), {"ignore_index": 1.0}, ODD),
    ("cross_entropy", (X, Y), {"ignore_index": True}, ODD),
    ("cross_entropy", (X, Y), {"label_smoothing": -0.1}, ODD),
    ("cross_entropy", (X, Y), {"label_smoothing": 1.1}, ODD),
    ("cross_entropy", (X, T), {"ignore_index": 1}, ODD),
    ("nll_loss", (X, Y), {"ignore_index": 1.0}, ODD),
    ("kl_div", (X, T), {"log_target": 1}, ODD),
    ("smooth_l1_loss", (X, T), {"beta": -1.0}, ODD),
    ("smooth_l1_loss", (X, T), {"beta": float("inf")}, ODD),
    ("smooth_l1_loss", (X, T), {"beta": torch.tensor(1.0)}, ODD),
    ("huber_loss", (X, T), {"delta": 0.0}, ODD),
    ("gaussian_nll_loss", (X, T, -1.0), {}, ODD),
    ("gaussian_nll_loss", (X, T, T), {"eps": 0.0}, ODD),
    ("gaussian_nll_loss", (X, T, T), {"full": 1}, ODD),
    ("cosine_embedding_loss", (X, T, torch.ones(N)), {"margin": torch.tensor(0.5)}, ODD),
    ("cross_entropy", (X, Y[:-1]), {}, SHAPES),
    ("cross_entropy", (X, T[:, :-1]), {}, SHAPES),
    ("cross_entropy", (X[0], Y[:1]), {}, SHAPES),
    ("cross_entropy", (X, Y, torch.ones(C + 1)), {}, SHAPES),
    ("nll_loss", (X[:, :, None], Y[:, None, None]), {}, SHAPES),
    ("mse_loss", (X, T[:1]), {}, SHAPES),
    ("mse_loss", (X, T), {"weight": T[:1]}, SHAPES),
    ("huber_loss", (X, T), {"weight": T[:1]}, SHAPES),
    ("smooth_l1_loss", (X, T[:1]), {}, SHAPES),
    ("kl_div", (X, T[:1]), {}, SHAPES),
    ("binary_cross_entropy", (T, T[:1]), {}, SHAPES),
    ("binary_cross_entropy", (T[:1], T[:1]), {"weight": T}, SHAPES),
    ("binary_cross_entropy_with_logits", (X, T[:1]), {}, SHAPES),
    ("binary_cross_entropy_with_logits", (X, T), {"pos_weight": torch.ones(C + 1)}, SHAPES),
    ("gaussian_nll_loss", (X, T[:1], T), {}, SHAPES),
    ("gaussian_nll_loss", (X, T, T[:1]), {}, SHAPES),
    ("cosine_embedding_loss", (X, T[:1], torch.ones(N)), {}, SHAPES),
    ("cosine_embedding_loss", (X, T, torch.ones(1)), {}, SHAPES),
    ("cosine_embedding_loss", (X, T, torch.ones(N, dtype=torch.bool)), {}, "labels of another kind than numbers"),
    ("cross_entropy", (X, Y.int()), {}, LABELS),
    ("nll_loss", (X, T), {}, LABELS),
    ("cross_entropy", (X[:, :0], Y), {}, "no classes"),
    ("nll_loss", (torch.tensor(0.0), torch.tensor(0)), {}, "no classes"),
    ("cross_entropy", (X, T, CLASS_LEARNED), {}, WEIGHT),
    ("cross_entropy", (X, Y, CLASS_LEARNED), {}, WEIGHT),
    ("nll_loss", (X, Y, CLASS_LEARNED), {}, WEIGHT),
    ("binary_cross_entropy", (T, T, LEARNED), {}, WEIGHT),
    ("binary_cross_entropy_with_logits", (X, T, LEARNED), {}, WEIGHT),
    ("binary_cross_entropy_with_logits", (X, T), {"pos_weight": CLASS_LEARNED}, WEIGHT),
    ("mse_loss", (X, T), {"weight": LEARNED}, WEIGHT),
    ("l1_loss", (X, T), {"weight": LEARNED}, WEIGHT),
    ("huber_loss", (X, T), {"weight": LEARNED}, WEIGHT),
]

HEAD = (torch.linspace(-1.0, 1.0, N * 4).view(N, 4), torch.linspace(-1.0, 1.0, C * 4).view(C, 4))
if "linear_cross_entropy" in TORCH_LOSSES:
    Chunks: Any = nn.LinearCrossEntropyOptions
    LAYER = "a K-dimensional or empty layer, or an input of other dimensions"
    CHUNKS = "options of torch's own chunks"
    TO_TORCH += [
        ("linear_cross_entropy", (HEAD[0][None], HEAD[1], Y[None]), {}, LAYER),
        ("linear_cross_entropy", (HEAD[0], HEAD[1][:, None], Y[:, None]), {}, LAYER),
        ("linear_cross_entropy", (HEAD[0], HEAD[1][:0], Y), {}, LAYER),
        ("linear_cross_entropy", (HEAD[0], HEAD[1][:, :3], Y), {}, SHAPES),
        ("linear_cross_entropy", (*HEAD, Y), {"linear_bias": torch.ones(C + 1)}, SHAPES),
        ("linear_cross_entropy", (*HEAD, Y[:-1]), {}, SHAPES),
        ("linear_cross_entropy", (*HEAD, T), {"ignore_index": -100}, ODD),
        ("linear_cross_entropy", (HEAD[0], HEAD[1].double(), Y), {}, MIXED),
        ("linear_cross_entropy", (*HEAD, Y, ), {"weight": CLASS_LEARNED}, WEIGHT),
        ("linear_cross_entropy", (*HEAD, Y), {"options": gk.LinearCrossEntropyOptions()}, CHUNKS),
        ("linear_cross_entropy", (*HEAD, Y), {"options": Chunks(), "label_smoothing": 0.1}, CHUNKS),
        ("linear_cross_entropy", (*HEAD, T), {"options": Chunks()}, CHUNKS),
        ("linear_cross_entropy", (*HEAD, Y), {"options": Chunks(acc_dtype=torch.float32)}, CHUNKS),
    ]  # fmt: skip


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """The result, or the type and words of the error; with the text and place of each warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function(*arguments, **keywords)
        except Exception as error:
            result = (type(error), str(error))
    return result, [(str(w.message), w.category, w.filename, w.lineno) for w in caught]


@pytest.mark.parametrize("row", TO_TORCH, ids=lambda row: f"{row[0]}-{row[3]}".replace(" ", "_"))
def test_goes_to_torch(row: tuple[str, tuple[Any, ...], dict[str, Any], str], patch: Any) -> None:
    name, arguments, keywords, reason = row
    found, warned = _outcome(getattr(F, name), arguments, keywords)
    assert patch.report()["calls"] == {name: {"ours": 0, "torch": {reason: 1}}}
    expected, expected_warned = _outcome(TORCH_LOSSES[name], arguments, keywords)
    assert warned == expected_warned
    if isinstance(expected, tuple):
        assert found == expected
    else:
        assert type(found) is type(expected)
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_a_class_that_64_bits_do_not_hold_is_an_error_of_torchs_type(name: str, patch: Any) -> None:
    (error, _), _ = _outcome(TORCH_LOSSES[name], (X, Y), {"ignore_index": 10**400})
    with pytest.raises(error):
        getattr(F, name)(X, Y, ignore_index=10**400)


def _reasons(patch: Any) -> set[str]:
    return {reason for row in patch.report()["calls"].values() for reason in row["torch"]}


def test_nested_tensors_go_to_torch(patch: Any) -> None:
    for layout, reason in ((torch.strided, "not a dense tensor"), (torch.jagged, "a subclass of Tensor")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nested = torch.nested.nested_tensor([X[0], X[1]], layout=layout)
        found, _ = _outcome(F.mse_loss, (nested, nested), {})
        expected, _ = _outcome(TORCH_LOSSES["mse_loss"], (nested, nested), {})
        assert found == expected or torch.equal(found, expected)
        assert reason in _reasons(patch)


@pytest.mark.parametrize(
    ("reason", "transform"),
    [
        ("a transform of torch.func", lambda loss: torch.func.vmap(loss)(X, T)),
        ("a transform of torch.func", lambda loss: torch.func.grad(loss)(X, T)),
        ("a transform of torch.func", lambda loss: torch.func.jvp(loss, (X, T), (T, X))[1]),
    ],
    ids=["vmap", "grad", "jvp"],
)
def test_transforms_go_to_torch(reason: str, transform: Callable[..., Tensor], patch: Any) -> None:
    found = transform(F.mse_loss)
    assert patch.report()["calls"] == {"mse_loss": {"ours": 0, "torch": {reason: 1}}}
    torch.testing.assert_close(found, transform(TORCH_LOSSES["mse_loss"]), rtol=0.0, atol=0.0)


def test_dual_numbers_go_to_torch(patch: Any) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, T)
        tangent = forward_ad.unpack_dual(F.smooth_l1_loss(dual, T)).tangent
        assert _reasons(patch) == {"forward-mode differentiation"}
        F.smooth_l1_loss(X, T)
    assert tangent is not None
    assert _ours(patch, "smooth_l1_loss") == 1


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_gets_torchs(patch: Any) -> None:
    def losses(x: Tensor, t: Tensor) -> Tensor:
        return F.mse_loss(x, t) + F.huber_loss(x, t)

    for made in (
        torch.jit.script(losses),
        torch.jit.script(nn.SmoothL1Loss()),
        torch.jit.trace(losses, (X, T), check_trace=False),
    ):
        assert "genloss" not in str(made.graph)
        assert made(X, T).isfinite()
    assert _reasons(patch) == {"torch.jit.trace"}
    assert not any(row["ours"] for row in patch.report()["calls"].values())


@pytest.mark.parametrize("strict", [False, True])
def test_export_gets_torchs(strict: bool, patch: Any) -> None:
    program = torch.export.export(nn.CrossEntropyLoss(), (X, Y), strict=strict)
    assert "genloss" not in str(program.graph)
    torch.testing.assert_close(program.module()(X, Y), TORCH_LOSSES["cross_entropy"](X, Y))


def test_recorded_and_fake_tensors_go_to_torch(patch: Any) -> None:
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    graph = make_fx(nn.MSELoss())(X, T).graph
    assert "genloss" not in str(graph)
    with FakeTensorMode() as mode:
        assert F.mse_loss(mode.from_tensor(X), mode.from_tensor(T)).shape == ()
    with FlopCounterMode(display=False):
        F.mse_loss(X, T)
    assert _reasons(patch) == {"a torch function mode", "a torch dispatch mode", "a subclass of Tensor"}
    symbolic = torch.fx.symbolic_trace(nn.MSELoss())
    assert [n.target for n in symbolic.graph.nodes if n.op == "call_function"] == [TORCH_LOSSES["mse_loss"]]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_tensors_go_to_torch(patch: Any) -> None:
    quantised = torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)
    found, _ = _outcome(F.mse_loss, (quantised, quantised), {})
    assert found == _outcome(TORCH_LOSSES["mse_loss"], (quantised, quantised), {})[0]
    assert _reasons(patch) == {"not a dense tensor"}


@pytest.fixture
def one_rank() -> Iterator[torch.distributed.device_mesh.DeviceMesh]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_dtensor_goes_to_torch(one_rank: Any, patch: Any) -> None:
    from torch.distributed.tensor import DTensor, distribute_tensor

    found = F.mse_loss(distribute_tensor(X, one_rank), distribute_tensor(T, one_rank))
    assert isinstance(found, DTensor)
    torch.testing.assert_close(found.full_tensor(), TORCH_LOSSES["mse_loss"](X, T))
    assert _reasons(patch) == {"a subclass of Tensor"}


class Handler(Tensor):
    """Overrides what it knows by the function that it was registered with, before any patch."""

    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []  # noqa: RUF012 - of the class on purpose

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append((func, args, kwargs))
        return "handled"


@pytest.mark.parametrize("case", CALLS)
def test_overriding_subclasses_see_torchs_function(case: str, patch: Any) -> None:
    name, make, keywords = CALLS[case]
    if not _known(name):
        pytest.skip(f"this torch has no {name}")
    first, *rest = make(Draw(torch.float32))
    Handler.seen.clear()
    assert getattr(F, name)(first.as_subclass(Handler), *rest, **keywords) == "handled"
    TORCH_LOSSES[name](first.as_subclass(Handler), *rest, **keywords)
    (found, found_args, found_kwargs), (_, args, kwargs) = Handler.seen
    assert found is TORCH_LOSSES[name]
    assert [type(a) for a in found_args] == [type(a) for a in args]
    assert found_kwargs.keys() == kwargs.keys()


class Recorder(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_see_torchs_function(patch: Any) -> None:
    with Recorder() as mode:
        F.mse_loss(X, T)
    assert mode.seen == [TORCH_LOSSES["mse_loss"]]
    assert _reasons(patch) == {"a torch function mode"}


def test_a_default_device_is_no_reason(patch: Any) -> None:
    """It is a mode that has its say on new tensors alone. Nothing is counted twice."""
    with torch.device("cpu"):
        for name, make, keywords in CALLS.values():
            if _known(name):
                getattr(F, name)(*make(Draw(torch.float32)), **keywords)
    calls = patch.report()["calls"]
    assert sum(row["ours"] for row in calls.values()) == sum(_known(name) for name, *_ in CALLS.values())
    assert _reasons(patch) == set()


def test_composites_of_torch_stay_torchs(patch: Any) -> None:
    """torch's linear cross entropy calls torch's cross entropy, not what stands in its place."""
    if not _known("linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    F.linear_cross_entropy(HEAD[0], HEAD[1][:, None], Y[:, None])
    assert set(patch.report()["calls"]) == {"linear_cross_entropy"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operands", [torch.float32, "autocast"], ids=str)
@pytest.mark.parametrize("case", CALLS)
def test_autocast_gives_torchs_dtype(case: str, operands: Any, dtype: torch.dtype, patch: Any) -> None:
    name, make, keywords = CALLS[case]
    if not _known(name):
        pytest.skip(f"this torch has no {name}")
    arguments = make(Draw(dtype if operands == "autocast" else operands))
    with torch.autocast("cpu", dtype=dtype):
        found, expected = _result(getattr(F, name), arguments, keywords), _result(TORCH_LOSSES[name], arguments, keywords)
    by_torch = operands == "autocast" and (name == "gaussian_nll_loss" or case in ("weighted squares", "weighted distances"))
    assert _reasons(patch) == ({"autocast of half precision"} if by_torch else set())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.02, equal_nan=True)


@pytest.mark.parametrize("wide", ["target", "input"])
@pytest.mark.parametrize(
    "case", ["squares", "logits", "chances", "probabilities", "divergence", "smooth", "huber", "distances"]
)
def test_autocast_mixes_dtypes(case: str, wide: str, patch: Any) -> None:
    """Half-precision predictions beside targets in fp32 are what a training step under autocast has."""
    name, make, keywords = CALLS[case]
    first, second, *_ = make(Draw(torch.bfloat16))
    first, second = (first.float(), second) if wide == "input" else (first, second.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _result(getattr(F, name), (first, second), keywords)
        expected = _result(TORCH_LOSSES[name], (first, second), keywords)
    assert _ours(patch, name) == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", ["squares", "logits", "chances", "probabilities", "huber"])
def test_autocast_leaves_double_precision_to_torch(case: str, patch: Any) -> None:
    name, make, keywords = CALLS[case]
    first, second, *_ = make(Draw(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _outcome(getattr(F, name), (first, second.double()), keywords)
        expected = _outcome(TORCH_LOSSES[name], (first, second.double()), keywords)
    assert found == expected
    assert _reasons(patch) == {MIXED}


def test_bad_values_raise_what_torch_raises(patch: Any) -> None:
    """These are seen when ours looks at them, which is after the choice."""
    for name, arguments in (
        ("cross_entropy", (X, Y + 1)),
        ("nll_loss", (X, Y - 1)),
        ("binary_cross_entropy", (T + 1.0, T)),
        ("gaussian_nll_loss", (X, T, -T)),
    ):
        (error, _), _ = _outcome(TORCH_LOSSES[name], arguments, {})
        with pytest.raises(error):
            getattr(F, name)(*arguments)


def test_missing_and_unknown_arguments_are_named_as_by_torch(patch: Any) -> None:
    for name, torchs in TORCH_LOSSES.items():
        for arguments, keywords in (((X,), {}), ((X, T), {"colour": 1})):
            with pytest.raises(TypeError) as found:
                getattr(F, name)(*arguments, **keywords)
            with pytest.raises(TypeError) as expected:
                torchs(*arguments, **keywords)
            assert str(found.value).partition(" ")[0] == str(expected.value).partition(" ")[0]


@pytest.mark.parametrize("call", [lambda: F.kl_div(X, T), lambda: nn.KLDivLoss()(X, T)], ids=["function", "module"])
def test_warnings_of_ours_are_torchs(call: Callable[[], Tensor]) -> None:
    """Word for word, and pointing at the same line: the caller's, or that of torch's module."""
    expected = _outcome(call, (), {})[1]
    with gk.patch_torch() as active:
        found = _outcome(call, (), {})[1]
    assert _ours(active, "kl_div") == 1
    assert found == expected != []


def test_inference_mode_and_no_grad_run_ours(patch: Any) -> None:
    with torch.inference_mode():
        inside = F.cross_entropy(X.clone(), Y)
    with torch.no_grad():
        F.mse_loss(nn.Parameter(X), T)
    assert inside.is_inference()
    assert _ours(patch, "cross_entropy") == _ours(patch, "mse_loss") == 1


@pytest.mark.parametrize("rule", TORCH_LOSSES)
def test_a_rule_has_its_functions_signature(rule: str) -> None:
    from genloss_kernels.integrations.torch_patch import rules

    def shape(function: Callable[..., Any]) -> list[tuple[Any, ...]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(getattr(rules, rule)) == shape(TORCH_LOSSES[rule])


def test_what_inference_mode_made_goes_to_torch_where_something_learns(patch: Any) -> None:
    """Ours saves operands that torch's L1 loss does not, and such a tensor cannot be saved."""
    with torch.inference_mode():
        teacher = torch.randn(2**18)
    x = torch.randn(2**18).requires_grad_()
    F.l1_loss(x, teacher).backward()
    assert x.grad is not None
    assert _reasons(patch) == {"a tensor of inference mode"}


def test_labels_of_bytes_in_several_dimensions_are_torchs_to_refuse(patch: Any) -> None:
    with pytest.raises(RuntimeError, match="Byte"):
        F.cross_entropy(torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.uint8))
    assert _reasons(patch) == {"labels of uint8 in several dimensions"}


@pytest.mark.skipif("linear_cross_entropy" not in TORCH_LOSSES, reason="this torch has no linear cross entropy")
def test_chunks_under_autocast_go_to_torch(patch: Any) -> None:
    """Whose chunks keep the operands' dtype."""
    x, weight, target = torch.randn(6, 4).bfloat16(), torch.randn(6, 4).bfloat16(), torch.randint(0, 6, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        found = F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())
    assert found.dtype == torch.bfloat16
    assert _reasons(patch) == {"options of torch's own chunks"}
