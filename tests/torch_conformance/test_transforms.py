"""What PyTorch may do with a loss: operator checks, compile, export, function transforms, checkpointing, threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import genloss_kernels as gk
from genloss_kernels.core import made
from genloss_kernels.core.reduction import Reduction, accumulator
from genloss_kernels.losses.binary_cross_entropy.reference import NAME as BINARY
from genloss_kernels.losses.divergence.reference import Kind
from genloss_kernels.losses.gaussian_kl.reference import CLAMPED, GENERAL
from genloss_kernels.losses.gaussian_kl.reference import NAME as GAUSSIAN

from .examples import EXAMPLES, Draw, Example, every_route, select

# Dynamo instantiates the class itself while it traces an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

MEAN, SUM, NONE, SAMPLE = (int(r) for r in (Reduction.MEAN, Reduction.SUM, Reduction.NONE, Reduction.SAMPLE))


def examples(*losses: str, but: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("example", [e for e in select(*losses) if e.name not in but], ids=str)


# Gradients of the row weights and of the divisor are the reference's on every path, so no kernel runs.
BY_REFERENCE = "weights and divisor differentiable"


@pytest.fixture
def compiler() -> Iterator[None]:
    """Start and end with nothing compiled; the caches on disk know operators by name, and would outlive a change of one."""
    torch._dynamo.reset()
    inductor, autograd = torch._inductor.config, torch._functorch.config
    with inductor.patch(fx_graph_cache=False), autograd.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


def gradients(loss: Tensor, tensors: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    """Gradients along a random upstream gradient."""
    generator = torch.Generator(loss.device).manual_seed(seed)
    upstream = torch.randn(loss.shape, generator=generator, device=loss.device, dtype=loss.dtype)
    return torch.autograd.grad(loss, tensors, upstream)


def assert_same(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# --- operators -------------------------------------------------------------------------------------------------------


def _check(operator: Any, *arguments: Any) -> Any:
    torch.library.opcheck(operator, arguments)
    return operator(*arguments)


def _cross_entropy_arguments(draw: Draw, which: str) -> tuple[list[Any], list[Any], int, bool]:
    """Tensors, options (divisor last), reduction and whether statistics are wanted."""
    plain = [-100, 0.0, None, 1.0, 0.0, None]
    match which:
        case "labels":
            return [draw.normal(4, 7), draw.labels(7, 4), None, None, None], plain, MEAN, False
        case "every option":
            tensors = [draw.normal(4, 7), draw.labels(7, 4), draw.positive(7), draw.positive(4), draw.positive()]
            return tensors, [-100, 0.1, 3.0, 0.7, 0.01, None], MEAN, True
        case "classes in dimension 1, per row":
            tensors = [draw.normal(2, 5, 3), draw.labels(5, 2, 3), None, draw.positive(2, 3), None]
            return tensors, [-100, 0.2, None, 1.0, 0.0, None], NONE, True
        case "fixed divisor":
            target = draw.labels(7, 4).clamp(min=2)
            return [draw.normal(4, 7), target, None, None, None], [2, 0.0, None, 1.0, 0.0, 9.0], MEAN, False
    tensors = [draw.normal(3, 7), draw.probabilities(3, 7), draw.positive(7), None, None]
    return tensors, [-100, 0.1, None, 2.0, 0.0, None], SUM, True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "which", ["labels", "every option", "classes in dimension 1, per row", "fixed divisor", "probabilities"]
)
def test_opcheck_cross_entropy(which: str, dtype: torch.dtype, path: str, device: torch.device) -> None:
    tensors, options, reduction, stats = _cross_entropy_arguments(Draw(device, torch.float32), which)
    tensors = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
    result = _check(
        torch.ops.genloss.cross_entropy_forward.default,
        *tensors, *options, reduction, stats, dtype, path == "triton",
    )  # fmt: skip
    loss, lse, log_prob, entropy, _, _, saved, normalizer = result
    own_divisor = reduction == MEAN and tensors[4] is None and options[5] is None
    tensors[4] = normalizer if own_divisor else tensors[4]
    upstream = [torch.ones_like(loss), *(torch.ones_like(s) if stats else None for s in (lse, log_prob, entropy))]
    soft = tensors[1].is_floating_point()
    _check(
        torch.ops.genloss.cross_entropy_backward.default,
        *tensors, saved, entropy, *upstream, *options, True, soft, path == "triton",
    )  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_opcheck_nll_loss(reduction: int, device: torch.device) -> None:
    draw = Draw(device, torch.float32)
    for input, target in ((draw.normal(4, 7), draw.labels(7, 4)), (draw.normal(2, 5, 3), draw.labels(5, 2, 3))):
        for weight in (None, draw.positive(input.size(1))):
            forward = torch.ops.genloss.nll_loss_forward.default
            loss, normalizer = _check(forward, input, target, weight, -100, reduction, torch.float32)
            backward = torch.ops.genloss.nll_loss_backward.default
            _check(backward, input, target, weight, normalizer, torch.ones_like(loss), -100)


def _elementwise_arguments(draw: Draw, which: str) -> tuple[str, list[Any], Any, list[float], int, int]:
    a, b = draw.normal(4, 6), draw.positive(4, 6)
    match which:
        case "binary mean":
            return BINARY, [a, b, None, None], None, [0.0, 0.0, 0.0], 0, MEAN
        case "binary masked mean":
            return BINARY, [a, b, draw.positive(4, 1), draw.positive(6)], b > 1.0, [0.1, 0.0, 0.0], 0, MEAN
        case "binary per element, transposed":
            return BINARY, [a.t(), b.t(), None, draw.positive(4)], None, [0.0, 0.0, 0.0], 0, NONE
        case "gaussian sum":
            return GAUSSIAN, [a, b, None, None], None, [0.0, 0.0, 0.0], 0, SUM
        case "gaussian per sample, learned prior":
            tensors = [a, b, draw.normal(6), draw.normal(6)]
            return GAUSSIAN, tensors, None, [0.0, -1.0, 1.0], GENERAL | CLAMPED, SAMPLE
    return GAUSSIAN, [draw.normal(4, 1), b, a, a], None, [0.0, 0.0, 0.0], GENERAL, NONE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "which",
    [
        "binary mean",
        "binary masked mean",
        "binary per element, transposed",
        "gaussian sum",
        "gaussian per sample, learned prior",
        "gaussian broadcast",
    ],
)
def test_opcheck_elementwise(which: str, dtype: torch.dtype, path: str, device: torch.device) -> None:
    loss, tensors, mask, scalars, flags, reduction = _elementwise_arguments(Draw(device, torch.float32), which)
    tensors = [None if t is None else t.to(dtype) for t in tensors]
    triton = path == "triton"
    formula = [*scalars, flags, reduction]
    forward = torch.ops.genloss.elementwise_forward.default
    result, kept = _check(forward, loss, *tensors, mask, *formula, dtype, triton)
    # Weights of binary cross entropy take no gradient.
    needed = [t is not None and (loss == GAUSSIAN or place < 2) for place, t in enumerate(tensors)]
    backward = torch.ops.genloss.elementwise_backward.default
    _check(backward, loss, *tensors, mask, torch.ones_like(result), kept, *formula, needed, triton)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_opcheck_linear_cross_entropy(soft: bool, dtype: torch.dtype, path: str, device: torch.device) -> None:
    draw = Draw(device, torch.float32)
    target = draw.probabilities(6, 7) if soft else draw.labels(7, 6)
    tensors = [draw.normal(6, 4), draw.normal(7, 4), draw.normal(7), target, draw.positive(7), draw.positive(6)]
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    formula, needed, triton = [-100, 0.1, 3.0, 0.7, 0.01], 0b1111 if soft else 0b0111, path == "triton"
    acc = accumulator(dtype)
    operators = torch.ops.genloss
    _check(
        operators.linear_cross_entropy_reduced.default, *tensors, None, *formula, None, MEAN, 4, acc, needed, dtype, triton
    )  # fmt: skip
    for stats in (False, True):
        rows = _check(operators.linear_cross_entropy_rows.default, *tensors, *formula, stats, 4, triton)
        upstream = [torch.ones_like(rows[0]), *(torch.ones_like(r) if stats else None for r in rows[1:4])]
        _check(
            operators.linear_cross_entropy_rows_backward.default,
            *tensors, rows[6], rows[3], *upstream, *formula, stats, 4, acc, needed, triton,
        )  # fmt: skip


def _pair_arguments(draw: Draw, which: str) -> tuple[list[Any], list[Any]]:
    """Both terms, and how they are added up."""
    a, b, c, d = draw.normal(4, 6), draw.positive(4, 6), draw.normal(4, 3), draw.normal(4, 3)
    match which:
        case "batchmean":
            return ["mse_loss", a, b, 0.0, 0, GAUSSIAN, c, d, 0.0, 0], [0.5, None, None, int(Reduction.BATCHMEAN)]
        case "capacity, beta on the device":
            return [BINARY, a, b, 0.0, 0, GAUSSIAN, c, d[:1], 0.2, 4], [1.0, draw.positive(), 3.0, SUM]
        case "per sample":
            return [BINARY, a, b, 0.0, 0, GAUSSIAN, c, d, 0.2, 4], [2.0, None, 3.0, SAMPLE]
    return ["adversarial", a, None, 0.0, 0, "adversarial", c, None, 0.0, 8], [1.0, None, None, MEAN]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["batchmean", "capacity, beta on the device", "per sample", "one operand each"])
def test_opcheck_pair(which: str, dtype: torch.dtype, path: str, device: torch.device) -> None:
    terms, rule = _pair_arguments(Draw(device, torch.float32), which)
    terms = [t.to(dtype) if isinstance(t, Tensor) else t for t in terms]
    triton = path == "triton"
    loss, first, second, sums = _check(torch.ops.genloss.pair_forward.default, *terms, *rule, dtype, triton)
    needed = [isinstance(terms[place], Tensor) for place in (1, 2, 6, 7)]
    upstream = [torch.ones_like(t) for t in (loss, first, second)]
    _check(torch.ops.genloss.pair_backward.default, *terms, sums, *upstream, *rule, needed, triton)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("gamma", "reduction"), [(None, MEAN), (3.0, NONE)])
def test_opcheck_penalty(gamma: float | None, reduction: int, dtype: torch.dtype, path: str, device: torch.device) -> None:
    grad, triton = Draw(device, torch.float32).normal(4, 3, 2).to(dtype), path == "triton"
    loss, norms = _check(torch.ops.genloss.penalty_forward.default, grad, 1.0, gamma, reduction, dtype, triton)
    upstream = torch.ones_like(loss)
    _check(torch.ops.genloss.penalty_backward.default, grad, norms, upstream, 1.0, gamma, reduction, triton)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("first", "second", "labels", "reduction"),
    [((4, 5), (4, 5), (4,), MEAN), ((4, 5), (1, 5), (4,), NONE), ((5,), (5,), (), SUM)],
)
def test_opcheck_cosine(
    first: tuple[int, ...], second: tuple[int, ...], labels: tuple[int, ...], reduction: int, dtype: torch.dtype, path: str,
    device: torch.device,
) -> None:  # fmt: skip
    draw, triton = Draw(device, torch.float32), path == "triton"
    operands = draw.normal(*first).to(dtype), draw.normal(*second).to(dtype), torch.ones(labels, device=device)
    loss, stats = _check(torch.ops.genloss.cosine_forward.default, *operands, 0.1, reduction, dtype, triton)
    upstream = torch.ones_like(loss)
    for needed in ([True, True], [False, True]):
        _check(torch.ops.genloss.cosine_backward.default, *operands, stats, upstream, 0.1, reduction, needed, triton)


def test_opcheck_witness(device: torch.device) -> None:
    a, b = torch.ones(3, 2, device=device), torch.ones(2, device=device)
    _check(torch.ops.genloss.witness.default, torch.ones((), device=device), a, b, None, None)


@pytest.fixture
def alone() -> Iterator[str]:
    """A process group of this process, by name."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_opcheck_vocab_parallel(soft: bool, dtype: torch.dtype, path: str, device: torch.device, alone: str) -> None:
    draw = Draw(device, torch.float32)
    # Beyond 128 classes the gradient too is a kernel's.
    classes = 130
    target = draw.probabilities(6, classes) if soft else draw.labels(classes, 6)
    input, head, bias = draw.normal(6, 4), draw.normal(classes, 4), draw.normal(classes)
    tensors = [t.to(dtype) for t in (input, head, bias)]
    target, weight = target.to(dtype) if soft else target, draw.positive(classes).to(dtype)
    formula, triton, layout = [-100, 0.1, 3.0, 0.7, 0.01], path == "triton", [[0], [classes], 0, alone]
    operators = torch.ops.genloss
    logits = draw.normal(6, classes).to(dtype)
    _check(
        operators.vocab_parallel_linear_reduced.default,
        *tensors, target, weight, draw.positive(6), None, *formula, None, MEAN, 4, torch.float32, 0b111, dtype, triton,
        *layout,
    )  # fmt: skip
    _check(operators.vocab_parallel_sum.default, logits, alone)
    for stats in (False, True):
        rows = _check(operators.vocab_parallel_forward.default, logits, target, weight, *formula, stats, triton, *layout)
        upstream = [torch.ones_like(rows[0]), *(torch.ones_like(r) if stats else None for r in rows[1:4])]
        _check(
            operators.vocab_parallel_backward.default,
            logits, target, weight, rows[5], *upstream, *formula, stats, triton, *layout,
        )  # fmt: skip
        rows = _check(
            operators.vocab_parallel_linear_rows.default, *tensors, target, weight, *formula, stats, 4, triton, *layout
        )
        _check(
            operators.vocab_parallel_linear_rows_backward.default,
            *tensors, target, weight, rows[5], *upstream, *formula, stats, 4, torch.float32, triton, *layout, 0b111,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", list(Kind))
def test_opcheck_divergence(kind: Kind, dtype: torch.dtype, path: str, device: torch.device) -> None:
    draw = Draw(device, torch.float32)
    for shape, divisor in (((3, 5), None), ((2, 3, 4), 2)):
        input, target = draw.normal(*shape).to(dtype), draw.normal(*shape).to(dtype)
        tensors = [input, None if kind == Kind.ENTROPY else target]
        formula, needed = [int(kind), 1.5, 0.3, divisor], 1 if kind == Kind.ENTROPY else 3
        forward, backward = torch.ops.genloss.divergence_forward.default, torch.ops.genloss.divergence_backward.default
        loss, *rest = _check(forward, *tensors, *formula, needed, dtype, path == "triton")
        _check(backward, *tensors, *rest, torch.ones_like(loss), *formula, needed, path == "triton")


def test_every_operator_has_a_check() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("genloss::")}
    families = ("cosine", "cross_entropy", "divergence", "elementwise", "nll_loss", "pair", "penalty")
    both_ways = {f"genloss::{family}_{way}" for family in families for way in ("forward", "backward")}
    both_ways |= {f"genloss::linear_cross_entropy_{name}" for name in ("reduced", "rows", "rows_backward")}
    ways = ("forward", "backward", "linear_reduced", "linear_rows", "linear_rows_backward", "sum")
    assert names == both_ways | {"genloss::witness"} | {f"genloss::vocab_parallel_{name}" for name in ways}


# --- finite differences ----------------------------------------------------------------------------------------------


@every_route
@examples(but=(BY_REFERENCE,))
def test_gradcheck(example: Example, path: str, small: str, device: torch.device) -> None:
    function, tensors = example.problem(device, rows=3)
    # Random projections of the Jacobian, where the whole of it would take the interpreter minutes.
    assert gradcheck(function, tensors, fast_mode=path == "triton")


@every_route
@examples(but=(BY_REFERENCE,))
def test_gradgradcheck(example: Example, path: str, small: str, device: torch.device) -> None:
    function, tensors = example.problem(device, rows=2)
    assert gradgradcheck(function, tensors, fast_mode=path == "triton")


@every_route
@examples(but=(BY_REFERENCE,))
def test_operands_that_depend_on_one_another(example: Example, path: str, small: str, device: torch.device) -> None:
    """A path from one operand into another was counted twice where the gradient was to be differentiated again."""
    function, leaves = example.problem(device, rows=2)

    def dependent(first: Tensor, *others: Tensor) -> Tensor:
        factor = 1.0 - 0.1 * first.square().mean()
        return function(first, *(t * factor for t in others))

    loss = dependent(*leaves)
    upstream = torch.randn_like(loss)
    plain, again = (
        torch.autograd.grad(loss, leaves, upstream, retain_graph=True, create_graph=create) for create in (False, True)
    )
    torch.testing.assert_close(plain, tuple(g.detach() for g in again))
    assert gradgradcheck(dependent, leaves, fast_mode=path == "triton")


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_third_derivatives_of_a_linear_layer_through_its_upstream(reduction: str) -> None:
    """The second derivative is the same whether it is used or differentiated, with an upstream that depends on the input."""
    x, weight = torch.randn(300, 4, dtype=torch.float64).requires_grad_(), torch.randn(6, 4, dtype=torch.float64)
    target = torch.randint(6, (300,))
    with gk.backend("eager"):
        loss = gk.linear_cross_entropy(
            x, weight, target, reduction=reduction, options=gk.LinearCrossEntropyOptions(batch_chunk_size=64)
        )
        (first,) = torch.autograd.grad(loss.square().sum(), x, create_graph=True)
        used, kept = (
            torch.autograd.grad(first.cos().sum(), x, retain_graph=True, create_graph=create)[0] for create in (False, True)
        )
    torch.testing.assert_close(used, kept.detach())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@every_route
@examples(but=(BY_REFERENCE,))
def test_batched_upstream_gradients(example: Example, path: str, small: str, device: torch.device) -> None:
    """By ``is_grads_batched``, as ``torch.autograd.functional.jacobian`` with ``vectorize=True`` asks for them."""
    function, leaves = example.problem(device)
    loss = function(*leaves)
    upstream = torch.randn(3, *loss.shape, dtype=loss.dtype, device=device)
    batched = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for k, one in enumerate(upstream):
        found = torch.autograd.grad(loss, leaves, one, retain_graph=True)
        torch.testing.assert_close(tuple(b[k] for b in batched), found)


@every_route
@examples(but=(BY_REFERENCE,))
def test_transforms_of_a_backward_alone(example: Example, path: str, small: str, device: torch.device) -> None:
    """Batches and tangents in the upstream gradient of a loss that was computed outside of them."""
    function, leaves = example.problem(device)
    loss = function(*leaves)
    upstream, direction = (torch.randn(2, *loss.shape, dtype=loss.dtype, device=device) for _ in range(2))

    def backward(at: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, leaves, at, retain_graph=True)

    primals, tangents = ([backward(one) for one in batch] for batch in (upstream, direction))
    batched = torch.func.vmap(backward)(upstream)
    torch.testing.assert_close([tuple(b[k] for b in batched) for k in range(2)], primals)
    if (path, small) == ("eager", "as is") and example.loss == "huber_loss":
        # Torch's own, which is what runs here.
        with pytest.raises(NotImplementedError, match="forward AD with huber_loss_backward"):
            torch.func.jvp(backward, (upstream[0],), (direction[0],))
        return
    pushed = torch.func.jvp(backward, (upstream[0],), (direction[0],))
    torch.testing.assert_close(pushed, (primals[0], tangents[0]))
    with forward_ad.dual_level():
        duals = [forward_ad.unpack_dual(g) for g in backward(forward_ad.make_dual(upstream[0], direction[0]))]
        assert not any(d.primal.requires_grad for d in duals)
    torch.testing.assert_close(tuple(d.primal for d in duals), primals[0])
    torch.testing.assert_close(tuple(d.tangent for d in duals), tangents[0])


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_gradcheck_of_weights_and_divisor(backend: str, device: torch.device) -> None:
    (example,) = [e for e in EXAMPLES if e.name == BY_REFERENCE]
    function, tensors = example.problem(device)
    with gk.backend(backend):
        assert gradcheck(function, tensors)
        assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("how", ["compiled step", "region"])
@pytest.mark.parametrize("name", ["mse_loss", "vae_loss", "linear_cross_entropy", "js_div_with_logits"])
def test_compiled_backward_of_a_retained_graph(name: str, how: str) -> None:
    """Compiled autograd scaled what the forward had made, again at each backward."""
    x, other = torch.randn(300, 8).requires_grad_(), torch.randn(300, 8)
    loss = {
        "mse_loss": lambda: made.apply(
            (made.Part("mse_loss", (0.0, 0.0, 0.0), 0, Reduction.MEAN),), x.dtype, (x, other, None, None)
        )[0],
        "vae_loss": lambda: gk.vae_loss(x, other, other[:, :2], other[:, 2:4]).loss,
        "linear_cross_entropy": lambda: gk.linear_cross_entropy(x, torch.randn(999, 8), torch.randint(999, (300,))),
        "js_div_with_logits": lambda: gk.js_div_with_logits(x, other),
    }[name]() * 8.0
    (wanted,) = torch.autograd.grad(loss, x, retain_graph=True)
    with torch._dynamo.config.patch(compiled_autograd=how == "compiled step"):
        compiled = torch.compile(lambda: loss.backward(retain_graph=True), backend="eager")
        region = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))
        with contextlib.nullcontext() if how == "compiled step" else region:
            for _ in range(3):
                x.grad = None
                compiled() if how == "compiled step" else loss.backward(retain_graph=True)
                torch.testing.assert_close(x.grad, wanted)
    x.grad = None
    loss.backward()
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("loss", ["cross_entropy", "gaussian_kl"])
def test_third_order(loss: str, path: str, device: torch.device) -> None:
    function, tensors = next(e for e in select(loss)).problem(device, rows=2)

    def gradient(*at: Tensor) -> Tensor:
        grads = torch.autograd.grad(function(*at), at, create_graph=True)
        return sum((g.square().sum() for g in grads), torch.zeros((), dtype=torch.float64, device=device))

    assert gradgradcheck(gradient, tensors, fast_mode=True)


# --- torch.compile ---------------------------------------------------------------------------------------------------

COMPILED_BY_INDUCTOR = (
    ("cross_entropy", "ignored rows"),
    ("cross_entropy", "statistics"),
    ("nll_loss", "weighted mean"),
    ("binary_cross_entropy_with_logits", "weighted smoothed masked"),
    ("gaussian_kl", "capacity"),
    ("vae_loss", "distances, capacity"),
    ("gradient_penalty", "squared distance"),
)


def _compiled_matches(example: Example, compiler: str, device: torch.device) -> None:
    function, tensors = example.problem(device)
    expected = function(*tensors)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    found = compiled(*tensors)
    assert_same(found, expected)
    assert_same(gradients(found, tensors), gradients(expected, tensors))


@pytest.mark.usefixtures("compiler")
@examples(but=(BY_REFERENCE,))
def test_aot_eager(example: Example, path: str, device: torch.device) -> None:
    _compiled_matches(example, "aot_eager", device)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("loss", "name"), COMPILED_BY_INDUCTOR)
def test_inductor(loss: str, name: str, path: str, device: torch.device) -> None:
    (example,) = [e for e in select(loss) if e.name == name]
    _compiled_matches(example, "inductor", device)


@pytest.mark.usefixtures("compiler")
def test_compiled_statistics(path: str, device: torch.device) -> None:
    """Counts and the gradient of one statistic alone."""
    draw = Draw(device, torch.float64)
    logits, target = draw.normal(6, 5).requires_grad_(), draw.labels(5, 6)

    def statistics(logits: Tensor) -> gk.CrossEntropyStats:
        return gk.cross_entropy(logits, target, reduction="none", return_stats=True)

    compiled = torch.compile(statistics, fullgraph=True, backend="aot_eager")
    found, expected = compiled(logits), statistics(logits)
    assert isinstance(found, gk.CrossEntropyStats)
    assert_same(tuple(found), tuple(expected))
    for name in ("loss", "lse", "log_prob", "entropy"):
        found, expected = getattr(compiled(logits), name), getattr(statistics(logits), name)
        assert_same(gradients(found, (logits,)), gradients(expected, (logits,)))


@pytest.mark.usefixtures("compiler")
def test_compiled_in_place_backward_leaves_the_logits(path: str, device: torch.device) -> None:
    draw = Draw(device, torch.float64)
    leaf, target = draw.normal(6, 5).requires_grad_(), draw.labels(5, 6)

    def loss(leaf: Tensor) -> tuple[Tensor, Tensor]:
        logits = leaf * 2.0
        return gk.cross_entropy(logits * 0.5, target, inplace_backward=True), logits

    found, logits = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf)
    (grad,) = torch.autograd.grad(found, leaf)
    assert torch.equal(logits, leaf * 2.0)
    (expected,) = torch.autograd.grad(gk.cross_entropy(leaf, target), leaf)
    assert_same(grad, expected)


def _step(*tensors: Tensor) -> Tensor:
    """One loss of each family from two matrices and labels: enough for one graph to depend on the batch size."""
    logits, other, target = tensors
    loss = gk.cross_entropy(logits, target, z_loss=0.1) + gk.nll_loss(logits, target)
    loss = loss + gk.binary_cross_entropy_with_logits(logits, other.sigmoid())
    loss = loss + gk.kl_div_with_logits(logits, other) + gk.js_div_with_logits(logits, other, reduction="mean")
    return loss + gk.gaussian_kl(logits, other)


def _batch(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    draw = Draw(device, torch.float64, seed=rows)
    return draw.normal(rows, 5).requires_grad_(), draw.normal(rows, 5), draw.labels(5, rows)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("dynamic", "compiles"), [(True, [True, False, False]), (None, [True, True, False]), (False, [True, True, True])]
)
def test_batch_sizes(dynamic: bool | None, compiles: list[bool], path: str, device: torch.device) -> None:
    """Three batch sizes take one graph if dynamic, two if torch finds that out for itself, and three if static."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_step, fullgraph=True, dynamic=dynamic, backend=counter)
    for rows, fresh in zip((4, 9, 17), compiles, strict=True):
        counter.clear()
        batch = _batch(rows, device)
        found, expected = compiled(*batch), _step(*batch)
        assert_same(found, expected)
        assert_same(gradients(found, batch[:1]), gradients(expected, batch[:1]))
        assert (counter.frame_count > 0) == fresh, f"{rows} rows: {counter.frame_count} graphs compiled"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("example", select("cross_entropy", "mse_loss", "gaussian_kl", "kl_div_with_logits")[::3], ids=str)
def test_compiled_vmap_keeps_the_gradient(example: Example, device: torch.device) -> None:
    """Operators that vmap falls back on would come out without one."""
    function, values = example.problem(device, rows=3)
    stacked = tuple(torch.stack([v, v.flip(0)]).detach().requires_grad_() for v in values)

    def step(*batch: Tensor) -> Tensor:
        return torch.func.vmap(function)(*batch).square().sum()

    with gk.backend("eager"):
        found = torch.compile(step, backend="aot_eager")(*stacked)
        expected = sum(function(*(s[row] for s in stacked)).square().sum() for row in range(2))
        assert_same(found, expected)
        assert_same(torch.autograd.grad(found, stacked), torch.autograd.grad(expected, stacked))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("compiler_name", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "loss",
    [
        "cross_entropy",
        "linear_cross_entropy",
        "binary_cross_entropy_with_logits",
        "gaussian_kl",
        "mse_loss",
        "vae_loss",
        "gan_discriminator_loss",
        "gradient_penalty",
        "contrastive_divergence_loss",
    ],
)
def test_compiled_second_derivative_raises(loss: str, compiler_name: str, path: str, device: torch.device) -> None:
    function, tensors = select(loss)[0].problem(device)
    found = torch.compile(function, fullgraph=True, backend=compiler_name)(*tensors)
    grads = torch.autograd.grad(found.sum(), tensors, create_graph=True)
    # The loss itself has a gradient, so that constants in its place would go unnoticed.
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(found.sum() + sum(g.square().sum() for g in grads), tensors)


@pytest.mark.interpreter
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "gaussian_kl"])
def test_compiled_function_follows_the_backend(loss: str, device: torch.device) -> None:
    function, tensors = select(loss)[0].problem(device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for name in ("eager", "triton", "eager", "triton"):
        with gk.testing.count_launches() as launches:
            with gk.backend(name):
                found = compiled(*tensors)
            forward = launches.total()
            found.sum().backward()
        assert (forward > 0) == (name == "triton"), f"{name}: {launches}"
        assert (launches.total() > forward) == (name == "triton"), f"{name}: {launches}"


# --- torch.export ----------------------------------------------------------------------------------------------------


def _modules(device: torch.device) -> list[Any]:
    draw = Draw(device, torch.float32)
    logits, target = draw.normal(4, 5), draw.labels(5, 4)
    return [
        pytest.param(gk.CrossEntropyLoss(softcap=5.0, label_smoothing=0.1), (logits, target), id="cross_entropy"),
        pytest.param(gk.CrossEntropyLoss(reduction="none"), (logits, draw.probabilities(4, 5)), id="soft_targets"),
        pytest.param(gk.CrossEntropyLoss(return_stats=True), (logits, target), id="statistics"),
        pytest.param(gk.NLLLoss(), (torch.log_softmax(logits, 1), target), id="nll_loss"),
        pytest.param(gk.BCEWithLogitsLoss(label_smoothing=0.1), (logits, draw.positive(4, 5)), id="bce_with_logits"),
        pytest.param(gk.GaussianKLLoss(free_bits=0.1), (logits, draw.normal(4, 5)), id="gaussian_kl"),
        pytest.param(gk.GaussianKLLoss(capacity=2.0), tuple(draw.normal(4, 5) for _ in range(4)), id="general_kl"),
        pytest.param(gk.MSELoss(), (logits.bfloat16(), draw.normal(4, 5).bfloat16()), id="half_precision"),
        pytest.param(gk.FusedLMHead(5, 300, bias=True), (logits, draw.labels(300, 4)), id="head"),
        pytest.param(gk.FusedLMHead(5, 300, reduction="none"), (logits, draw.labels(300, 4)), id="head per row"),
    ]


@pytest.mark.parametrize(("module", "inputs"), _modules(torch.device("cpu")))
def test_export(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Values, and gradients of the inputs and parameters, none of which need have one while it is exported."""
    batch = {0: torch.export.Dim("batch")}
    for shapes in (None, tuple(batch for _ in inputs)):
        program = torch.export.export(module, inputs, dynamic_shapes=shapes)
        assert_same(_with_gradients(program.module(), inputs), _with_gradients(module, inputs), 1e-6)
    doubled = tuple(torch.cat([t, t.flip(0)]) for t in inputs)
    assert_same(_with_gradients(program.module(), doubled), _with_gradients(module, doubled), 1e-6)


def _with_gradients(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    results = module(*leaves)
    loss = results[0] if isinstance(results, tuple) else results
    learning = [*(t for t in leaves if t.is_floating_point()), *module.parameters()]
    return results, torch.autograd.grad(loss.sum(), learning)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_learns(strict: bool) -> None:
    """A loss that was a constant to the program left the gradients of whatever stood beside it."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 5)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            logits = self.layer(x)
            return gk.cross_entropy(logits, target) + 0.1 * logits.square().mean()

    model, inputs = Model(), (torch.randn(4, 6), torch.tensor([0, 4, 2, 1]))
    program = torch.export.export(model, inputs, strict=strict).module()
    assert_same(_with_gradients(program, inputs), _with_gradients(model, inputs), 1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("small", ["as is", "blocks"], indirect=True)
def test_a_traced_loss_has_a_gradient(small: str) -> None:
    inputs = tuple(torch.randn(4, 6).requires_grad_() for _ in range(2))

    def loss(mu: Tensor, logvar: Tensor) -> Tensor:
        return gk.gaussian_kl(mu, logvar)

    traced = torch.jit.trace(loss, inputs)
    found, expected = (torch.autograd.grad(function(*inputs), inputs) for function in (traced, loss))
    assert_same(found, expected, 1e-6)


@pytest.mark.interpreter
def test_kernels_are_not_exported() -> None:
    module, inputs = gk.MSELoss(), (torch.randn(3), torch.randn(3))
    with gk.backend("triton"), pytest.raises(RuntimeError, match="cannot be recorded by"):
        torch.export.export(module, inputs)


# --- function transforms ---------------------------------------------------------------------------------------------


@examples(but=(BY_REFERENCE,))
def test_func_grad(example: Example, path: str, device: torch.device) -> None:
    function, tensors = example.problem(device)
    places = tuple(range(len(tensors)))
    values = tuple(t.detach() for t in tensors)
    found = torch.func.grad(lambda *at: function(*at).sum(), places)(*values)
    assert_same(found, torch.autograd.grad(function(*tensors).sum(), tensors))


@pytest.mark.parametrize("small", ["as is", "blocks"], indirect=True)
@examples()
def test_func_on_the_eager_path(example: Example, small: str) -> None:
    """jacrev, jvp, jacfwd, hessian, vmap and dual numbers against plain reverse mode."""
    function, tensors = example.problem(torch.device("cpu"), rows=3)
    values = tuple(t.detach() for t in tensors)
    with gk.backend("eager"):
        jacobian = torch.autograd.functional.jacobian(function, values)
        places = tuple(range(len(values)))
        assert_same(torch.func.jacrev(function, places)(*values), jacobian)
        assert_same(torch.func.jacfwd(function, places)(*values), jacobian)

        draw = Draw(torch.device("cpu"), torch.float64, seed=3)
        directions = tuple(draw.normal(*v.shape) for v in values)
        loss = function(*values)
        terms = [(j * d).flatten(loss.dim()).sum(-1) for j, d in zip(jacobian, directions, strict=True)]
        slope = torch.stack(terms).sum(0)
        value, tangent = torch.func.jvp(function, values, directions)
        assert_same((value, tangent), (loss, slope))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(v, d) for v, d in zip(values, directions, strict=True)]
            assert_same(tuple(forward_ad.unpack_dual(function(*duals))), (loss, slope))

        def total(*at: Tensor) -> Tensor:
            return function(*at).sum()

        assert_same(torch.func.hessian(total, places)(*values), torch.autograd.functional.hessian(total, values))

        stacked = tuple(torch.stack([v, v + d, v - d]) for v, d in zip(values, directions, strict=True))
        each = torch.stack([function(*at) for at in zip(*stacked, strict=True)])
        assert_same(torch.func.vmap(function)(*stacked), each)


def _per_sample(loss: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A loss of one sample, and batches of its arguments."""
    draw = Draw(torch.device("cpu"), torch.float64)
    logits, other, target = draw.normal(4, 5), draw.normal(4, 5), draw.labels(5, 4)
    match loss:
        case "cross_entropy":
            return lambda x, t: gk.cross_entropy(x, t, reduction="sum"), (logits, target)
        case "cross_entropy of a batch of one":
            return lambda x, t: gk.cross_entropy(x[None], t[None], reduction="sum", z_loss=0.1), (logits, target)
        case "cross_entropy of soft targets":
            return lambda x, t: gk.cross_entropy(x[None], t[None], softcap=3.0), (logits, draw.probabilities(4, 5))
        case "nll_loss":
            return lambda x, t: gk.nll_loss(x, t, reduction="sum"), (logits, target)
        case "binary_cross_entropy_with_logits":
            weight = draw.positive(5)
            return lambda x, t: gk.binary_cross_entropy_with_logits(x, t, pos_weight=weight), (logits, other.sigmoid())
        case "masked binary_cross_entropy_with_logits":
            mask = other > -1.0
            return lambda x, t, m: gk.binary_cross_entropy_with_logits(x, t, mask=m), (logits, other.sigmoid(), mask)
    return lambda mu, logvar: gk.gaussian_kl(mu, logvar, reduction="sum", free_bits=0.05), (logits, other)


@pytest.mark.parametrize(
    "loss",
    [
        "cross_entropy",
        "cross_entropy of a batch of one",
        "cross_entropy of soft targets",
        "nll_loss",
        "binary_cross_entropy_with_logits",
        "masked binary_cross_entropy_with_logits",
        "gaussian_kl",
    ],
)
def test_per_sample_gradients(loss: str) -> None:
    """vmap over the batched targets, too."""
    function, batches = _per_sample(loss)
    with gk.backend("eager"):
        found = torch.func.vmap(torch.func.grad(function))(*batches)
        for row, expected in enumerate(found):
            at = batches[0][row].clone().requires_grad_()
            (grad,) = torch.autograd.grad(function(at, *(b[row] for b in batches[1:])), at)
            assert_same(expected, grad)


@pytest.mark.interpreter
@examples(but=(BY_REFERENCE,))
def test_kernels_refuse_vmap_and_forward_mode(example: Example, device: torch.device) -> None:
    function, tensors = example.problem(device)
    values = tuple(t.detach() for t in tensors)
    with gk.backend("triton"), gk.testing.count_launches() as launches:
        with pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(function)(*(torch.stack([v, v]) for v in values))
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(function, values, values)
    assert not launches


# --- checkpointing, autocast, threads --------------------------------------------------------------------------------


@examples(but=(BY_REFERENCE,))
def test_checkpointing(example: Example, path: str, device: torch.device) -> None:
    function, tensors = example.problem(device)
    expected = gradients(function(*tensors), tensors)
    with gk.testing.count_launches() as launches:
        loss = checkpoint(function, *tensors, use_reentrant=False)
        forward = launches.total()
        found = gradients(loss, tensors)
    assert_same(found, expected, 0.0)
    if path == "triton":
        assert launches.total() >= 2 * forward + 1, f"the forward was not repeated: {launches}"


def _autocast_losses(draw: Draw) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    target, weight, prior = draw.labels(5, 6), draw.positive(5), draw.normal(6, 5)
    return {
        "cross_entropy": (lambda x: gk.cross_entropy(x, target), draw.normal(6, 5)),
        "cross_entropy per row": (lambda x: gk.cross_entropy(x, target, reduction="none"), draw.normal(6, 5)),
        "cross_entropy with weights": (lambda x: gk.cross_entropy(x, target, weight.to(x)), draw.normal(6, 5)),
        "cross_entropy with options": (
            lambda x: gk.cross_entropy(x, target, softcap=3.0, return_stats=True).loss,
            draw.normal(6, 5),
        ),
        "nll_loss": (lambda x: gk.nll_loss(x, target, reduction="none"), draw.normal(6, 5)),
        "binary_cross_entropy_with_logits": (
            lambda x: gk.binary_cross_entropy_with_logits(x, (target > 2)[:, None].expand(x.shape).to(x)),
            draw.normal(6, 5),
        ),
        "gaussian_kl": (lambda x: gk.gaussian_kl(x, prior.to(x)), draw.normal(6, 5)),
        "kl_div_with_logits": (lambda x: gk.kl_div_with_logits(x, x.detach().flip(0)), draw.normal(6, 5)),
        "categorical_entropy": (gk.categorical_entropy, draw.normal(6, 5)),
    }


@pytest.mark.parametrize("loss", list(_autocast_losses(Draw(torch.device("cpu"), torch.float32))))
def test_autocast(loss: str, path: str, device: torch.device) -> None:
    """bf16 logits give an fp32 loss that is as accurate as fp32 arithmetic, and a bf16 gradient."""
    function, drawn = _autocast_losses(Draw(device, torch.float32))[loss]
    logits = drawn.bfloat16().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        found = function(logits)
    assert found.dtype == torch.float32
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert grad.dtype == torch.bfloat16
    wide = logits.detach().double().requires_grad_()
    if loss in ("gaussian_kl", "cross_entropy with weights"):
        # Their second operand is rounded to bf16 too.
        rounded = function(logits.detach())
        assert rounded.dtype == torch.bfloat16
        assert_same(found.bfloat16(), rounded, 1e-2)
        return
    expected = function(wide)
    assert_same(found.double(), expected.detach(), 2e-6)
    (exact,) = torch.autograd.grad(expected.sum(), wide)
    assert_same(grad.double(), exact, 2**-8)


def test_autocast_takes_a_wider_class_weight(path: str, device: torch.device) -> None:
    draw = Draw(device, torch.float32)
    logits, target, weight = draw.normal(6, 5).bfloat16(), draw.labels(5, 6), draw.positive(5)
    with torch.autocast(device.type, torch.bfloat16):
        found = gk.cross_entropy(logits, target, weight)
    expected = torch.nn.functional.cross_entropy(logits.double(), target, weight.double())
    assert_same(found.double(), expected, 1e-6)


def _in_thread(work: Callable[[], Any]) -> Any:
    """The result of ``work``, or what it raised, from a thread of its own."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "loss", ["cross_entropy", "binary_cross_entropy_with_logits", "gaussian_kl", "kl_div_with_logits", "js_div_with_logits"]
)
@pytest.mark.parametrize("small", ["blocks"], indirect=True)
@pytest.mark.parametrize(("forward", "backward"), [("eager", "triton"), ("triton", "eager")])
def test_backward_on_another_thread_follows_the_forward(
    loss: str, forward: str, backward: str, small: str, device: torch.device
) -> None:
    function, tensors = select(loss)[0].problem(device)

    def run() -> Tensor:
        with gk.backend(forward):
            return function(*tensors)

    def differentiate() -> tuple[Tensor, ...]:
        with gk.backend(backward):
            return gradients(found, tensors)

    with gk.testing.count_launches() as launches:
        found = _in_thread(run)
        assert (launches.total() > 0) == (forward == "triton")
        launches.clear()
        grads = _in_thread(differentiate)
        assert (launches.total() > 0) == (forward == "triton"), f"{launches}"
    with gk.backend("eager"):
        assert_same(grads, gradients(function(*tensors), tensors))


def test_backend_is_thread_local() -> None:
    """On a CPU without the interpreter, to ask for the kernels is an error, but only on the thread that asked."""
    function, tensors = select("cross_entropy")[0].problem(torch.device("cpu"))
    with gk.backend("triton"):
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            function(*tensors)
        assert _in_thread(lambda: function(*tensors)).isfinite()

    def choose() -> None:
        with gk.backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            function(*tensors)

    _in_thread(choose)
    assert function(*tensors).isfinite()
