"""Which specialisations of its kernels the library can launch: captured from its launchers, on meta tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..core import backend
from ..core.launch import observe_launches
from .configurations import DTYPES, Configuration, configurations
from .operators import Operators

# Triton's default, spelled out since 3.9 warns that it will change.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Specialisation:
    """What Triton compiles once: types, compile-time values and divisibilities of a kernel's arguments."""

    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    num_warps: int
    dtype: str
    label: str

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def formula(self) -> str:
        """Name of the device function that the kernel was given, if it takes one."""
        return next((value.__name__ for value in self.constexprs.values() if _is_function(value)), "")

    def divisible(self, argument: str) -> bool:
        """Whether an argument, or each of a tuple's, is known to be divisible by 16."""
        place, types = self.kernel.arg_names.index(argument), self.signature[argument]
        paths = [(place, within) for within in range(len(types))] if isinstance(types, tuple) else [(place,)]
        return all(self.attributes.get(path) for path in paths)

    def pointers(self) -> int:
        """How many tensors it works on."""
        return sum(isinstance(leaf, str) and leaf.startswith("*") for leaf in tree_leaves(self.signature))

    def __getitem__(self, argument: str) -> Any:
        """Compile-time value of an argument; a tuple's is a dictionary by position."""
        place = self.kernel.arg_names.index(argument)
        if (place,) in self.constexprs:
            return self.constexprs[place,]
        return {path[1]: value for path, value in self.constexprs.items() if path[0] == place and len(path) == 2}

    def has(self, flag: str) -> bool:
        """Whether the kernel has this flag, and it is set."""
        return flag in self.kernel.arg_names and bool(self[flag])

    def key(self) -> tuple[str, ...]:
        """Equal for launches that share a compiled kernel."""
        return (
            self.name,
            str(self.signature),
            str(sorted((path, _text(value)) for path, value in self.constexprs.items())),
            str(sorted((path, value) for path, value in self.attributes.items() if value)),
            str(self.num_warps),
        )

    def __str__(self) -> str:
        return f"{self.name} [{self.dtype}: {self.label}]"


def _is_function(value: Any) -> bool:
    return hasattr(value, "arg_names")


def _text(value: Any) -> str:
    return value.__name__ if _is_function(value) else repr(value)


@functools.cache
def _backend() -> Any:
    """Triton's compiler backend, only asked how it specialises on pointers: alike for all targets compiled for."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    return make_backend(GPUTarget("cuda", 90, 32))


@functools.cache
def _binder(kernel: Any) -> Any:
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, _backend())


def specialise(
    kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any], dtype: str = "", label: str = ""
) -> Specialisation:
    """The specialisation that a launch with these arguments would compile, found by Triton's own binder."""
    keywords = keywords | OPTIONS
    bound, specialization, options = _binder(kernel)(*args, **keywords)
    options, signature, constexprs, attributes = kernel._pack_args(_backend(), keywords, bound, specialization, options)
    return Specialisation(kernel, signature, constexprs, attributes, options.num_warps, dtype, label)


def run_on_meta(configuration: Configuration, observer: Callable[..., bool]) -> None:
    """Run a configuration forward and backward with every launch handed to ``observer`` and dropped."""
    for name in configuration.differentiable:
        configuration.arguments[name].requires_grad_()
    try:
        with backend.backend("triton"), observe_launches(observer), Operators():
            result = configuration.function()
            if isinstance(result, tuple):
                names = configuration.results or ("loss",)
                results = [getattr(result, name) for name in names]
            else:
                results = [result]
            wanted = [configuration.arguments[name] for name in configuration.differentiable]
            torch.autograd.grad(results, wanted, [torch.empty_like(r) for r in results])
    finally:
        for name in configuration.differentiable:
            configuration.arguments[name].requires_grad_(False)


def require_compiler() -> None:
    if backend.INTERPRETED:
        raise RuntimeError(
            "machine code needs Triton's compiler, but TRITON_INTERPRET=1 chose its interpreter: unset it, start anew"
        )
    if not backend.triton_installed():
        raise RuntimeError("machine code needs the package triton, which is not installed: pip install triton (Linux)")


def specialisations(dtypes: tuple[torch.dtype, ...] = DTYPES, *, thorough: bool = False) -> Iterator[Specialisation]:
    """Distinct specialisations that the configurations of ``dtypes`` launch."""
    require_compiler()
    seen: set[tuple[str, ...]] = set()
    for dtype in dtypes:
        for configuration in configurations(dtype, thorough=thorough):
            found: list[Specialisation] = []

            def observe(
                kernel: Any,
                programs: int,
                args: tuple[Any, ...],
                keywords: dict[str, Any],
                found: list[Specialisation] = found,
                label: str = f"{configuration.loss}, {configuration.label}",
                dtype: str = str(dtype).removeprefix("torch."),
            ) -> bool:
                found.append(specialise(kernel, args, keywords, dtype, label))
                return False

            run_on_meta(configuration, observe)
            for specialisation in found:
                key = specialisation.key()
                if key not in seen:
                    seen.add(key)
                    yield specialisation
