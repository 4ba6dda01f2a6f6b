"""The call for which each kernel is tuned: that of the benchmarks, at a GPU's sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..cases import BENCH, BYTES, CASES, Case
from .configurations import Configuration
from .layouts import empty
from .specialisations import Specialisation, require_compiler, run_on_meta, specialise

MAIN_DTYPES = (torch.bfloat16, torch.float32)

# Benchmarks of what a launch costs rather than of a kernel.
SMALL = ("small batch", "digits")


def _of_cases(use: str, dtype: torch.dtype) -> Iterator[Configuration]:
    for case in CASES:
        if use in case.uses and not case.autocast and not case.name.startswith(SMALL):
            yield _of_case(case, dtype)


def _of_case(case: Case, dtype: torch.dtype) -> Configuration:
    call = case.make(torch.Generator(), torch.device("meta"), dtype).fresh()
    return Configuration(case.name, case.loss, call.arguments, call.differentiable)


def _other_ways(dtype: torch.dtype) -> Iterator[Configuration]:
    """Ways through the kernels of rows and tiles that no benchmark takes."""
    images, classes = 2**18, 100
    labels = torch.empty(images, dtype=torch.int64, device="meta")
    short = {name: empty(images, classes, dtype=dtype) for name in ("input", "target")}
    held = {name: empty(2**14, 4096, dtype=dtype) for name in ("input", "target")}
    head = {"input": empty(2**13, 1024, dtype=dtype), "linear_weight": empty(32000, 1024, dtype=dtype)}
    held_labels = torch.empty(2**13, dtype=torch.int64, device="meta")
    long = {name: empty(2**13, 2**17, dtype=dtype) for name in ("input", "target")}
    yield Configuration("short rows", "cross_entropy", {**short, "target": labels}, ("input",))
    yield Configuration("rows held", "linear_cross_entropy", {**head, "target": held_labels}, tuple(head))
    yield Configuration("probabilities", "cross_entropy", long, ("input",))
    yield Configuration("short rows", "kl_div_with_logits", short, ("input",))
    yield Configuration("short rows", "js_div_with_logits", short, ("input",))
    yield Configuration("rows held", "js_div_with_logits", held, ("input",))


def main_specialisations(dtypes: tuple[torch.dtype, ...] = MAIN_DTYPES) -> list[Specialisation]:
    """Distinct specialisations of the main calls; of the byte meter's those of kernels that are in no benchmark."""
    require_compiler()
    chosen: dict[tuple[str, ...], Specialisation] = {}
    for dtype in dtypes:
        for configuration in (*_of_cases(BENCH, dtype), *_other_ways(dtype)):
            chosen |= {kernel.key(): kernel for kernel in _launched(configuration, dtype) if kernel.key() not in chosen}
    reached = {_place(kernel) for kernel in chosen.values()}
    for dtype in dtypes:
        for configuration in _of_cases(BYTES, dtype):
            for kernel in _launched(configuration, dtype):
                if _place(kernel) not in reached:
                    reached.add(_place(kernel))
                    chosen[kernel.key()] = kernel
    return list(chosen.values())


def _place(kernel: Specialisation) -> tuple[str, str, str]:
    return kernel.name, kernel.formula, kernel.dtype


def _launched(configuration: Configuration, dtype: torch.dtype) -> list[Specialisation]:
    found: list[Specialisation] = []

    def observe(kernel: Any, programs: int, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
        label = f"{configuration.loss}, {configuration.label}"
        found.append(specialise(kernel, args, keywords, str(dtype).removeprefix("torch."), label))
        return False

    run_on_meta(configuration, observe)
    return found
