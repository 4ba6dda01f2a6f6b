"""The examples in torch's own documentation, run once as they stand and once with our functions and modules."""

from __future__ import annotations

import doctest
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk

from .counts import counted, not_applicable
from .examples import every_route, route

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")


def _source(name: str) -> str:
    documented = getattr(torch.nn, name, None) or getattr(torch.nn.functional, name)
    # Some stand under "Example::" after comments alone, which are no doctests.
    return "\n".join(example.source for example in doctest.DocTestParser().get_examples(inspect.getdoc(documented) or ""))


def _names() -> list[str]:
    shared = [n for n in gk.nn.__all__ if hasattr(torch.nn, n)]
    return shared + [n for n in gk.functional.__all__ if hasattr(torch.nn.functional, n)]


def _over(ours: Any, torchs: Any) -> SimpleNamespace:
    """Torch's module with our names in place of its own."""
    return SimpleNamespace(**{**vars(torchs), **{name: getattr(ours, name) for name in ours.__all__}})


def _ran(source: str, functional: Any, modules: Any) -> dict[str, Tensor]:
    """Every tensor that the example leaves behind, and the gradients of those that have one."""
    torch.manual_seed(0)
    scope: dict[str, Any] = {"torch": torch, "F": functional, "nn": modules}
    exec(source, scope)
    tensors = {name: value for name, value in scope.items() if isinstance(value, Tensor)}
    gradients = {f"gradient of {name}": t.grad for name, t in tensors.items() if t.is_leaf and t.grad is not None}
    return {name: value.detach() for name, value in (tensors | gradients).items()}


DOCUMENTED = [name for name in _names() if _source(name)]


def test_which_have_examples() -> None:
    for name in {*_names()} - {*DOCUMENTED}:
        not_applicable(name, "documented examples", "eager", 1, "torch documents none")
    assert {*gk.nn.__all__} & {*dir(torch.nn)} <= {*DOCUMENTED}
    assert {"binary_cross_entropy", "binary_cross_entropy_with_logits", "cross_entropy", "nll_loss"} <= {*DOCUMENTED}


@every_route
@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_example(name: str, path: str, small: str) -> None:
    source, where = _source(name), route(path, small)
    with counted(name, "documented examples", where):
        wanted = _ran(source, torch.nn.functional, torch.nn)
        found = _ran(source, _over(gk.functional, torch.nn.functional), _over(gk.nn, torch.nn))
        assert found.keys() == wanted.keys()
        assert any(value.is_floating_point() for value in wanted.values())
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")
