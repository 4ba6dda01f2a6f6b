"""Names of modules in which a wrapper stands while a patch holds them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch

from ...core.torch_losses import TORCH_LOSSES
from .routing import WRAPPERS

# Whose names are torch's affair, or ours.
_EXEMPT = {"torch", "functorch", __name__.partition(".")[0]}

_LOSS_OF = {id(function): name for table in (TORCH_LOSSES, WRAPPERS) for name, function in table.items()}


class Slot:
    """One name of a module, held by any number of patches, for torch's function."""

    def __init__(self, module: ModuleType, attribute: str, loss: str) -> None:
        self.module, self.attribute = module, attribute
        self.original, self.wrapper = TORCH_LOSSES[loss], WRAPPERS[loss]
        self.holders = 0

    def has(self, function: Any) -> bool:
        return vars(self.module).get(self.attribute) is function


_held: dict[tuple[int, str], Slot] = {}


def hold(module: ModuleType, attribute: str, loss: str) -> Slot:
    """Put the wrapper in torch's place; what a third party has put there stays."""
    key = id(module), attribute
    slot = _held.get(key) or Slot(module, attribute, loss)
    if slot.has(slot.original):
        setattr(module, attribute, slot.wrapper)
    _held[key] = slot
    slot.holders += 1
    return slot


def release(slot: Slot) -> None:
    """Put torch's function back once no patch holds the name, unless a third party has replaced the wrapper."""
    slot.holders -= 1
    if slot.holders:
        return
    del _held[id(slot.module), slot.attribute]
    if slot.has(slot.wrapper):
        setattr(slot.module, slot.attribute, slot.original)


def bound(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Names of a module that are bound to one of torch's losses, or to its wrapper, and which."""
    for attribute, value in list(vars(module).items()):
        if id(value) in _LOSS_OF:
            yield attribute, _LOSS_OF[id(value)]


def missed() -> list[str]:
    """``module.name`` of whatever outside torch is bound to one of torch's functions itself, and so is not patched.

    Beside names of modules: what classes, functions and containers of those that import torch hold, as by
    ``module.function(criterion=)``.
    """
    modules = {id(module): (name, module) for name, module in reversed(list(sys.modules.items()))}
    return sorted(
        f"{name}.{place}"
        for name, module in modules.values()
        if name.partition(".")[0] not in _EXEMPT and isinstance(module, ModuleType)
        for place in _places(vars(module))
    )


_ORIGINALS = {id(function) for function in TORCH_LOSSES.values()}

# What a module has among its names that gets at torch's functions, in all likelihood: all others are passed over quickly.
_WAYS = _ORIGINALS | {id(module) for module in (torch, torch.nn, torch.nn.functional)}

# Not as an attribute, which a metaclass may compute.
_class_names = type.__dict__["__dict__"].__get__


def _places(names: dict[str, Any]) -> Iterator[str]:
    """Where a module with these names has an original, found by no code but Python's own."""
    if _WAYS.isdisjoint(map(id, list(names.values()))):
        return
    for name, value in list(names.items()):
        if id(value) in _ORIGINALS:
            yield name
        elif type(value) in _HOLDERS:
            yield from (name + rest for rest in _inside(value, names))
        elif issubclass(type(value), type) and _class_names(value).get("__module__") == names.get("__name__"):
            for inner, member in list(_class_names(value).items()):
                if id(member) in _ORIGINALS:
                    yield f"{name}.{inner}"
                elif type(member) in _HOLDERS:
                    yield from (f"{name}.{inner}{rest}" for rest in _inside(member, names))


def _inside(holder: Any, names: dict[str, Any]) -> list[str]:
    """Where in it an original is."""
    return [place for place, value in _HOLDERS[type(holder)](holder, names) if id(value) in _ORIGINALS]


def _of_function(function: FunctionType, names: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Defaults, of functions of this module."""
    positional, named = function.__defaults__, function.__kwdefaults__
    if (not positional and not named) or function.__globals__ is not names:
        return ()
    taken = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = dict(zip(reversed(taken), reversed(positional or ()), strict=False)) | (named or {})
    return [(f"({parameter}=)", default) for parameter, default in defaults.items()]


def _of_method(method: Any, names: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    function = method.__func__
    return [("", function), *(_of_function(function, names) if type(function) is FunctionType else ())]


# Tables of losses are short, and nobody is to wait for others.
_LONGEST_TABLE = 256


def _of_table(table: dict[Any, Any] | list[Any] | tuple[Any, ...], _: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    if len(table) > _LONGEST_TABLE:
        return ()
    pairs = list(table.items() if type(table) is dict else enumerate(table))
    return [(f"[{k!r}]" if type(k) in (str, int) else "[...]", value) for k, value in pairs if id(value) in _ORIGINALS]


_HOLDERS: dict[type, Callable[[Any, dict[str, Any]], Iterable[tuple[str, Any]]]] = {
    FunctionType: _of_function,
    staticmethod: _of_method,
    classmethod: _of_method,
    partial: lambda call, _: [(".func", call.func)],
    **dict.fromkeys((dict, list, tuple), _of_table),
}
