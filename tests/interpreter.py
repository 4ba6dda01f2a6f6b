"""Triton's interpreter looks through all of ``triton.language`` at each call of a function; here it remembers what it found.

That listing is half of the time of a small kernel under the interpreter.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

LISTED: tuple[ModuleType | type, ...] = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)


def builtins_of(listed: ModuleType | type) -> tuple[str, ...]:
    return tuple(name for name, member in inspect.getmembers(listed) if tl.core.is_builtin(member))


def remember_builtins() -> None:
    if list(inspect.signature(interpreter._patch_builtin).parameters) != ["pkg", "builder", "scope"]:
        return  # another release's interpreter: slow, but as it is
    names = {listed: builtins_of(listed) for listed in LISTED}
    listing = interpreter._patch_builtin

    def patch(pkg: Any, builder: Any, scope: Any) -> None:
        if pkg not in names:
            listing(pkg, builder, scope)
            return
        for name in names[pkg]:
            member = getattr(pkg, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(pkg, name, member, builder, scope)

    interpreter._patch_builtin = patch
