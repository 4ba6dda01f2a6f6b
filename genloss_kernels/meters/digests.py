"""What machine code and its verdict follow from, by kernel: where that is unchanged, so are they."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .specialisations import Specialisation

# The modules that compile, read and judge.
_RULES = ("machine_code.py", "sass.py", "specialisations.py", "streams.py")


def digests(kernels: Iterable[Specialisation]) -> dict[str, str]:
    """A digest for each kernel of its specialisations, their source, the rules they are held to and Triton's version."""
    import triton

    rules = [triton.__version__, *((Path(__file__).parent / name).read_text(encoding="utf-8") for name in _RULES)]
    groups: dict[str, set[str]] = {}
    for kernel in kernels:
        groups.setdefault(kernel.name, set()).add(str((kernel.key(), _sources(kernel))))
    return {name: hashlib.sha256("\n".join([*rules, *sorted(group)]).encode()).hexdigest() for name, group in groups.items()}


def _sources(kernel: Specialisation) -> list[str]:
    """Triton's own digests of the kernel's source, and of a formula that it was given, with all that they call."""
    functions: list[Any] = [kernel.kernel, *(value for value in kernel.constexprs.values() if hasattr(value, "arg_names"))]
    return [function.cache_key for function in functions]
