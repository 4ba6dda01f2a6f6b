"""What stands in ``torch.nn.functional`` under the patch: a function of torch's that runs ours or torch's code."""

from __future__ import annotations

import functools
import types
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ... import functional
from ...core import forks
from ...core.torch_losses import TORCH_LOSSES
from . import rules


class _State:
    """``active`` is read by compiled code too, which is compiled anew when it changes."""

    active = False
    torchs: dict[str, Callable[..., Any]] = TORCH_LOSSES


state = _State()
_counts: Counter[tuple[str, str | None]] = Counter()
_counting = forks.lock()


def counts() -> Counter[tuple[str, str | None]]:
    """Calls since the package was imported, by function and by the reason for which torch's code ran, None for ours."""
    with _counting:
        return Counter(_counts)


def _count(name: str, reason: str | None) -> None:
    with _counting:
        _counts[name, reason] += 1


def _wrapper(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    ours, rule = getattr(functional, name), getattr(rules, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not state.active:
            return original(*args, **kwargs)
        reason = rule(*args, **kwargs)
        compiling = torch.compiler.is_compiling()
        if not compiling:  # which would compile again for each count
            _count(name, reason)
        if reason is None:
            return ours(*args, **kwargs)
        return (original if compiling else state.torchs[name])(*args, **kwargs)

    # torch.jit.script asks for what it is to compile in place of a function.
    vars(call)["__prepare_scriptable__"] = lambda: original
    return call


WRAPPERS = {name: _wrapper(name, original) for name, original in TORCH_LOSSES.items()}


class _Warnings:
    """``warnings`` for torch's functions when a wrapper calls them: what they point at is a frame further out."""

    @staticmethod
    def warn(message: Any, category: Any = None, stacklevel: int = 1, source: Any = None) -> None:
        warnings.warn(message, category, stacklevel + 2, source)


def torchs_own() -> dict[str, Callable[..., Any]]:
    """torch's functions, in whose eyes nothing is patched.

    They call each other, and name themselves to ``__torch_function__``, by the names that stand in
    ``torch.nn.functional``; here these are the originals.
    """
    home = vars(torch.nn.functional)
    names = {**home, **TORCH_LOSSES, "warnings": _Warnings}

    def own(function: Callable[..., Any]) -> Callable[..., Any]:
        if not isinstance(function, types.FunctionType) or function.__globals__ is not home:
            return function
        copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
        copy.__kwdefaults__ = function.__kwdefaults__
        return copy

    return {name: own(function) for name, function in TORCH_LOSSES.items()}
