"""Names of modules in which a wrapper stands while a patch holds them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

from ...core.torch_losses import TORCH_LOSSES
from .routing import WRAPPERS

# Whose names are torch's affair, or ours.
_EXEMPT = {"torch", "functorch", __name__.partition(".")[0]}

_LOSS_OF = {id(function): name for table in (TORCH_LOSSES, WRAPPERS) for name, function in table.items()}


class Slot:
    """One name of a module, held by any number of patches, and what stood there before the first."""

    def __init__(self, module: ModuleType, attribute: str, loss: str) -> None:
        self.module, self.attribute, self.wrapper = module, attribute, WRAPPERS[loss]
        found = vars(module)[attribute]
        # A wrapper that is left from an earlier patch, as by a module imported under it, gives way to torch's function.
        self.found = TORCH_LOSSES[loss] if found is self.wrapper else found
        self.holders = 0

    @property
    def intact(self) -> bool:
        return vars(self.module).get(self.attribute) is self.wrapper


_held: dict[tuple[int, str], Slot] = {}


def hold(module: ModuleType, attribute: str, loss: str) -> Slot:
    """Put the wrapper in place, unless another patch has; what a third party put over that since stays."""
    key = id(module), attribute
    slot = _held.get(key) or Slot(module, attribute, loss)
    if not slot.holders:
        setattr(module, attribute, slot.wrapper)
    _held[key] = slot
    slot.holders += 1
    return slot


def release(slot: Slot) -> None:
    """Put back what stood there once no patch holds the name, unless a third party has replaced it."""
    slot.holders -= 1
    if slot.holders:
        return
    del _held[id(slot.module), slot.attribute]
    if slot.intact:
        setattr(slot.module, slot.attribute, slot.found)


def bound(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Names of a module that are bound to one of torch's losses, or to its wrapper, and which."""
    for attribute, value in list(vars(module).items()):
        if id(value) in _LOSS_OF:
            yield attribute, _LOSS_OF[id(value)]


def missed() -> list[str]:
    """``module.name`` of whatever outside torch is bound to one of torch's functions itself, and so is not patched."""
    originals = {id(function) for function in TORCH_LOSSES.values()}
    modules = {id(module): (name, module) for name, module in reversed(list(sys.modules.items()))}
    return sorted(
        f"{name}.{attribute}"
        for name, module in modules.values()
        if name.partition(".")[0] not in _EXEMPT and isinstance(module, ModuleType)
        for attribute, value in list(vars(module).items())
        if id(value) in originals
    )
