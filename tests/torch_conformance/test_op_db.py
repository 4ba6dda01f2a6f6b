"""The samples by which torch tests its own losses: values, gradients and second gradients on every route."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.losses.cross_entropy import api as cross_entropy_api

from .counts import counted
from .examples import every_route, route

# Samples of each entry in torch 2.13.
COUNTS = {
    "nn.functional.cross_entropy": 21,
    "nn.functional.nll_loss": 61,
    "nn.functional.binary_cross_entropy": 11,
    "nn.functional.binary_cross_entropy_with_logits": 26,
    "nn.functional.mse_loss": 6,
    "nn.functional.l1_loss": 6,
    "nn.functional.smooth_l1_loss": 8,
    "nn.functional.huber_loss": 9,
    "nn.functional.gaussian_nll_loss": 324,
    "nn.functional.kl_div": 16,
    "nn.functional.cosine_embedding_loss": 6,
}

# Error inputs of each entry there; the others have none.
ERRORS = {"nn.functional.l1_loss": 2, "nn.functional.huber_loss": 3, "nn.functional.gaussian_nll_loss": 3}

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")

# The eager path of these is the built-in at every size.
ALWAYS_BUILT_IN = {f"nn.functional.{name}" for name in ("nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")}

every_entry = pytest.mark.parametrize("entry", COUNTS)

# What the graph calls the operators' own backwards; anything else is a built-in's.
OWN_NODES = {"CosineEmbeddingBackward", "CrossEntropyBackward", "ElementwiseBackward", "MadeInForwardBackward"}


@functools.cache
def _op(entry: str) -> Any:
    from torch.testing._internal.common_methods_invocations import op_db

    (found,) = [op for op in op_db if op.name == entry]
    return found


@functools.cache
def _samples(entry: str, device: torch.device, dtype: torch.dtype) -> list[Any]:
    return list(_op(entry).sample_inputs(device, dtype, requires_grad=True))


def _name(entry: str) -> str:
    return entry.rpartition(".")[2]


def _functions(entry: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Ours and torch's."""
    name = _name(entry)
    return getattr(gk, name), getattr(torch.nn.functional, name)


class Derivatives(NamedTuple):
    """What came out, by name; ``terms`` has for a sum the size of what was added up, since it may cancel."""

    results: dict[str, Tensor]
    terms: dict[str, Tensor]
    node: str


def _differentiate(
    function: Callable[..., Tensor], sample: Any, dtype: torch.dtype, generator: torch.Generator, *, second: bool
) -> Derivatives:
    """Loss, gradient along a random upstream gradient, and the gradient of a random projection of that gradient.

    Random numbers are drawn in the sample's dtype, so that a run in a wider dtype differentiates the same function.
    """
    narrow, device = sample.input.dtype, sample.input.device

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=device).to(narrow).to(dtype)

    def size(values: list[Tensor], slopes: list[Tensor]) -> Tensor:
        """What a relative error of 1 in all values could change: the terms of the sum, each made positive."""
        return torch.stack([(v * s).abs().sum() for v, s in zip(values, slopes, strict=True)]).sum().detach()

    arguments = [fresh(value) for value in (sample.input, *sample.args)]
    keywords = {name: fresh(value) for name, value in sample.kwargs.items()}
    leaves = [v for v in (*arguments, *keywords.values()) if isinstance(v, Tensor) and v.requires_grad]
    loss = function(*arguments, **keywords)
    upstream = draw(loss).requires_grad_(second)
    # Torch's samples ask for a gradient of labels too, which is none of either's.
    grads = torch.autograd.grad(loss, leaves, upstream, create_graph=second, allow_unused=True, materialize_grads=True)
    first = list(grads)
    results = {"loss": loss, **{f"gradient {place}": grad for place, grad in enumerate(first)}}
    terms = {} if loss.dim() else {"loss": size(leaves, first) / upstream.detach().abs()}
    for place, leaf in enumerate(leaves):
        if not leaf.dim() and leaves[0].dim() and first[place].any():
            # What all elements share has a sum for its gradient; each has its own term where each has a copy.
            copies = leaf.detach().expand(leaves[0].shape).clone().requires_grad_()
            again = function(
                *(copies if v is leaf else v for v in arguments),
                **{k: copies if v is leaf else v for k, v in keywords.items()},
            )
            terms[f"gradient {place}"] = torch.autograd.grad(again, copies, upstream.detach())[0].abs().sum()
    if second:
        directions = [draw(grad) for grad in first]
        projection = torch.stack([(g * d).sum() for g, d in zip(first, directions, strict=True)]).sum()
        found = torch.autograd.grad(projection, [*leaves, upstream], allow_unused=True, materialize_grads=True)
        results |= {f"second gradient {place}": grad for place, grad in enumerate(found)}
        if not loss.dim():
            added = size(first, directions) + size(leaves, list(found[:-1]))
            terms[f"second gradient {len(leaves)}"] = added / upstream.detach().abs()
    node = "" if loss.grad_fn is None else loss.grad_fn.name()
    return Derivatives({name: value.detach() for name, value in results.items()}, terms, node)


def _described(sample: Any) -> str:
    def brief(value: Any) -> str:
        return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)

    keywords = [f"{name}={brief(value)}" for name, value in sample.kwargs.items()]
    return ", ".join([*map(brief, (sample.input, *sample.args)), *keywords])


def _compared(
    entry: str, device: torch.device, dtype: torch.dtype, where: str, *, second: bool
) -> Iterator[tuple[str, Any, Derivatives]]:
    """Differentiate every sample by our function and compare with torch's in the same dtype and in float64.

    What the caller asserts of a sample counts with it.
    """
    ours, torchs = _functions(entry)
    for number, sample in enumerate(_samples(entry, device, dtype)):
        label = f"{entry} sample {number}: {_described(sample)}"

        def differentiate(function: Callable[..., Tensor], wide: torch.dtype) -> Derivatives:
            generator = torch.Generator(device).manual_seed(number)  # noqa: B023 - called before the next turn
            return _differentiate(function, sample, wide, generator, second=second)  # noqa: B023

        with counted(_name(entry), f"op_db samples, {'both derivatives' if second else 'derivatives'}", where):
            found = differentiate(ours, dtype)
            builtin, exact = differentiate(torchs, dtype), differentiate(torchs, torch.float64)
            # Nothing at hand measures torch's errors in float64; float32's stand in.
            like = differentiate(torchs, torch.float32) if dtype == torch.float64 else builtin
            for name, result in found.results.items():
                assert result.dtype == builtin.results[name].dtype, f"{name} of {label}"
                triple = result, exact.results[name], like.results[name]
                if name in exact.terms:
                    triple = tuple(torch.stack([value, exact.terms[name].to(value.dtype)]) for value in triple)
                gk.testing.assert_close(*triple, name=f"{name} of {label}")
            yield label, sample, found


@every_entry
@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="other versions have other samples")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_sample_is_lost(entry: str, dtype: torch.dtype, device: torch.device) -> None:
    assert len(_samples(entry, device, dtype)) == COUNTS[entry]


@every_route
@every_entry
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_samples(entry: str, dtype: torch.dtype, path: str, small: str, device: torch.device) -> None:
    """Values and first gradients, by kernels in both directions on the kernels' path."""
    seen = 0
    with gk.testing.count_launches() as launches:
        for label, sample, found in _compared(entry, device, dtype, route(path, small), second=False):
            kernels = set(launches)
            launches.clear()
            if path == "triton" and sample.input.numel():
                assert any("forward" in name for name in kernels), f"no forward kernel ran for {label}: {kernels}"
                assert any("backward" in name for name in kernels), f"no backward kernel ran for {label}: {kernels}"
            if small == "blocks" and entry not in ALWAYS_BUILT_IN:
                assert found.node in OWN_NODES, f"{label} went to {found.node}"
            seen += 1
    assert seen > 0


@every_route
@every_entry
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_second_gradients(entry: str, dtype: torch.dtype, path: str, small: str, device: torch.device) -> None:
    for label, _, found in _compared(entry, device, dtype, route(path, small), second=True):
        assert any(name.startswith("second") for name in found.results), label
        if small == "blocks" and entry not in ALWAYS_BUILT_IN:
            assert found.node in OWN_NODES, f"{label} went to {found.node}"


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@every_entry
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_error_inputs(entry: str, backend: str, device: torch.device) -> None:
    """Whatever torch lists as an error is one here, of the same type."""
    ours, _ = _functions(entry)
    op = _op(entry)
    listed = [] if op.error_inputs_func is None else list(op.error_inputs(device))
    for error in listed:
        sample = error.sample_input
        with counted(_name(entry), "op_db error inputs", backend), gk.backend(backend), pytest.raises(error.error_type):
            ours(sample.input, *sample.args, **sample.kwargs)
    if torch.__version__.startswith("2.13."):
        assert len(listed) == ERRORS.get(entry, 0)


@pytest.mark.parametrize("soft", [False, True], ids=["label", "probabilities"])
@pytest.mark.parametrize("limit", [0, 1, 2**10])
def test_one_row_beyond_the_limits_of_the_built_in(soft: bool, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of shape (C) on every side of the eager path's limits."""
    monkeypatch.setattr(cross_entropy_api, "BUILTIN_BELOW", limit)
    logits = torch.randn(300, dtype=torch.float64).requires_grad_()
    target = torch.softmax(torch.randn(300, dtype=torch.float64), 0) if soft else torch.tensor(7)
    with gk.backend("eager"):
        found = gk.cross_entropy(logits, target)
    expected = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))
