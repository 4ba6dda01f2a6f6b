"""Calls that together reach every kernel specialisation: launch-table rows, layouts, options, on meta tensors.

Shapes follow from the launch tables, so that a new tile is measured without a word here. A family whose options the
tables below do not know is still reached through its cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional
from ..cases import BENCH, CASES
from ..core import launch, tuned
from .layouts import MANY, Layout, empty, layouts, shifted
from .operators import meta_call

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Configuration(NamedTuple):
    """One call, and which of its results take an upstream gradient (the loss alone where None)."""

    label: str
    loss: str
    arguments: dict[str, Any]
    differentiable: tuple[str, ...]
    results: tuple[str, ...] | None = None

    def function(self) -> Any:
        return getattr(functional, self.loss)(**self.arguments)


def _rows(logits: Tensor) -> tuple[int, ...]:
    return (logits.size(0), *logits.shape[2:])


def _target_like(logits: Tensor) -> Tensor:
    """Probabilities laid out as the logits are."""
    base = empty(logits.untyped_storage().nbytes() // logits.element_size(), dtype=logits.dtype)
    return base.as_strided(logits.size(), logits.stride(), logits.storage_offset())


_STATISTICS = ("loss", "lse", "log_prob", "entropy")


def _cross_entropy(layout: Layout, thorough: bool) -> Iterator[Configuration]:
    logits = layout.logits
    dtype = logits.dtype
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    rows = {"row_weight": empty(*_rows(logits), dtype=dtype)}
    weight = {"weight": empty(int(logits.size(1)), dtype=dtype)}
    smoothing, softcap = {"label_smoothing": 0.1}, {"softcap": 30.0}
    statistics = {"return_stats": True}
    divisor = {"divisor": empty(dtype=accumulator)}
    indices = torch.empty(_rows(logits), dtype=torch.int64, device="meta")
    probabilities = _target_like(logits)

    def configuration(
        name: str, options: dict[str, Any], target: Tensor = indices, *differentiable: str, results: Any = None
    ) -> Configuration:
        arguments = {"input": logits, "target": target, **options}
        label = f"{layout.name}, {name}"
        return Configuration(label, "cross_entropy", arguments, differentiable or ("input",), results)

    both = ("input", "target")
    full = smoothing | softcap | statistics | weight | rows
    yield configuration("plain", {})
    if layout.depth >= 1 or thorough:
        yield configuration("every option", full, results=_STATISTICS)
        yield configuration("every option, probabilities", full, probabilities, *both, results=_STATISTICS)
        yield configuration("probabilities", {}, probabilities)
    if layout.depth >= 2 or thorough:
        for options in (smoothing, softcap, weight, rows, divisor, weight | smoothing):
            yield configuration(" and ".join(options), options)
        for reduction in ("none", "sum"):
            yield configuration(reduction, {"reduction": reduction})
        yield configuration("statistics", statistics, results=_STATISTICS)
        yield configuration("statistics, gradient of lse", statistics, results=("lse",))
        for options in (smoothing, softcap, weight):
            yield configuration(f"{next(iter(options))}, probabilities", options, probabilities)
        yield configuration("statistics, probabilities", statistics, probabilities, results=_STATISTICS)
        yield configuration("gradient of probabilities alone", {}, probabilities, "target")
    if dtype == torch.bfloat16 and layout.depth >= 1:
        yield configuration("fp32 probabilities", {}, probabilities.to(torch.float32))
    if thorough and layout.depth == 2:
        parts = (smoothing, softcap, statistics, weight, rows)
        for bits in range(2 ** len(parts)):
            options = {k: v for bit, part in enumerate(parts) if bits >> bit & 1 for k, v in part.items()}
            name = " and ".join(options) or "plain"
            results = _STATISTICS if "return_stats" in options else None
            for reduction in ("none", "mean"):
                chosen, kind = options | {"reduction": reduction}, f"{name}, {reduction}"
                yield configuration(kind, chosen, results=results)
                yield configuration(f"{kind}, probabilities", chosen, probabilities, *both, results=results)


def _linear_cross_entropy(layout: Layout, thorough: bool) -> Iterator[Configuration]:
    """Layers whose chunks of logits have as many columns: the kernel that makes loss and gradient at once.

    Logits are contiguous there, and rows too many to be shared; shared and short rows go through cross entropy's kernels.
    """
    logits = layout.logits
    if logits.dim() != 2 or not logits.is_contiguous() or logits.size(1) <= launch.SHORT_ROW or logits.storage_offset():
        return
    if logits.size(0) != MANY:
        return
    dtype, n_classes = logits.dtype, logits.size(1)
    weight, rows, smoothing = _head_options(n_classes, dtype)
    softcap = {"softcap": 30.0}
    probabilities = {"target": empty(_HEAD_ROWS, n_classes, dtype=dtype)}

    def configuration(name: str, options: dict[str, Any], *differentiable: str) -> Configuration:
        return _head(f"{layout.name}, {name}", n_classes, dtype, options, *differentiable)

    full = smoothing | softcap | weight | rows
    yield configuration("plain", {})
    if layout.depth >= 1 or thorough:
        yield configuration("every option", full)
        yield configuration("softcap", softcap)
        yield configuration("every option, probabilities", full | probabilities, "target")
        yield configuration("probabilities", probabilities)
    if layout.depth >= 2 or thorough:
        for options in (smoothing, weight, rows, {"divisor": 37.0}, weight | smoothing):
            yield configuration(" and ".join(options), options)


# So many that no row of a chunk is shared.
_HEAD_ROWS = 2 * MANY


def _head_options(n_classes: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    rows = {"row_weight": empty(_HEAD_ROWS, dtype=dtype)}
    return {"weight": empty(n_classes, dtype=dtype)}, rows, {"label_smoothing": 0.1}


def _head(label: str, n_classes: int, dtype: torch.dtype, options: dict[str, Any], *differentiable: str) -> Configuration:
    layer = {"input": empty(_HEAD_ROWS, 64, dtype=dtype), "linear_weight": empty(n_classes, 64, dtype=dtype)}
    labels = torch.empty(_HEAD_ROWS, dtype=torch.int64, device="meta")
    return Configuration(label, "linear_cross_entropy", {**layer, "target": labels, **options}, (*layer, *differentiable))


def _held_losses(dtype: torch.dtype) -> Iterator[Configuration]:
    """Logits of every length at which a program holds them between loss and gradient."""
    columns = 2 * launch.SHORT_ROW
    while launch.held_loss_tile(columns, dtype.itemsize) is not None:
        longest = launch.held_loss_tile(2 * columns, dtype.itemsize) is None
        for n_classes, name in ((columns, "aligned"), (columns - 1, "ragged")):
            weight, rows, smoothing = _head_options(n_classes, dtype)
            # With a softcap, or smoothed class weights, they are read twice.
            alone = (weight, rows, smoothing, weight | smoothing, {"softcap": 30.0}) if longest else ()
            for options in ({}, weight | rows | smoothing, *alone):
                yield _head(f"held logits of {columns}, {name}, {' and '.join(options)}", n_classes, dtype, options)
        columns *= 2


def _nll_loss(layout: Layout, thorough: bool) -> Iterator[Configuration]:
    if layout.depth < 2 and not thorough and not any(part in layout.name for part in ("dimensions", "one")):
        return
    weight = {"weight": empty(layout.logits.size(1), dtype=layout.logits.dtype)}
    indices = torch.empty(_rows(layout.logits), dtype=torch.int64, device="meta")
    every = ({}, weight, {"reduction": "none"}, {"reduction": "sum"})
    for options in every if layout.depth == 2 or thorough else every[:2]:
        arguments = {"input": layout.logits, "target": indices, **options}
        yield Configuration(f"{layout.name}, {' and '.join(options) or 'plain'}", "nll_loss", arguments, ("input",))


def _divergences(layout: Layout, thorough: bool) -> Iterator[Configuration]:
    logits = layout.logits.movedim(1, -1)
    teacher = _target_like(layout.logits).movedim(1, -1)
    both = ("input", "target")

    def configuration(loss: str, name: str, *differentiable: str, **options: Any) -> Configuration:
        tensors = {"logits": logits} if loss == "categorical_entropy" else {"input": logits, "target": teacher}
        return Configuration(f"{layout.name}, {name}", loss, tensors | options, differentiable)

    yield configuration("kl_div_with_logits", "student", "input")
    if layout.depth >= 1 or thorough:
        yield configuration("kl_div_with_logits", "reverse", "input", direction="reverse")
        yield configuration("kl_div_with_logits", "both, none", *both, reduction="none")
        yield configuration("js_div_with_logits", "student", "input")
        yield configuration("js_div_with_logits", "both", *both)
        yield configuration("categorical_entropy", "none", "logits")
    if layout.depth >= 2 or thorough:
        yield configuration("js_div_with_logits", "teacher, none", "target", reduction="none")
        yield configuration("categorical_entropy", "mean", "logits", reduction="mean")


def _held_rows(dtype: torch.dtype) -> Iterator[Configuration]:
    """Rows of every length at which a program holds them whole."""
    columns = 2 * launch.SHORT_ROW
    while launch.held_row_tile(columns, dtype.itemsize) is not None:
        for cut, name in ((0, "aligned"), (1, "ragged")):
            tensors = {key: empty(MANY, columns - cut, dtype=dtype) for key in ("input", "target")}
            yield Configuration(f"held rows of {columns}, {name}", "js_div_with_logits", tensors, ("input",))
        columns *= 2


def _broadcasts(dtype: torch.dtype) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Ways for an operand to lie beside dense ones of some shape."""
    large = 8 * launch.ELEMENTWISE_TILES[dtype.itemsize].block
    yield "dense", (1024, large), empty(1024, large, dtype=dtype)
    yield "single", (1024, large), empty(dtype=dtype)
    yield "every second", (large,), empty(2 * large, dtype=dtype)[::2]
    yield "a row", (1024, large), empty(large, dtype=dtype)
    yield "a short row", (2**15, 33), empty(33, dtype=dtype)
    yield "a column", (1024, large), empty(1024, 1, dtype=dtype)
    yield "transposed", (1024, large), empty(large, 1024, dtype=dtype).t()
    yield "a channel", (64, 33, 32, 32), empty(33, 1, 1, dtype=dtype)


def _elementwise_shapes(dtype: torch.dtype, brief: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    tile = launch.ELEMENTWISE_TILES[dtype.itemsize].block
    yield "ragged", (1021, tile - 1)
    if not brief:
        yield "aligned", (1024, tile)
        yield "one element", (1, 1)


def _binary_cross_entropy(dtype: torch.dtype, thorough: bool, brief: bool) -> Iterator[Configuration]:
    def configuration(name: str, shape: tuple[int, ...], *differentiable: str, **options: Any) -> Configuration:
        arguments = {"input": empty(*shape, dtype=dtype), "target": empty(*shape, dtype=dtype)} | options
        return Configuration(name, "binary_cross_entropy_with_logits", arguments, differentiable or ("input",))

    def mask(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bool, device="meta")

    for name, shape in _elementwise_shapes(dtype, brief):
        yield configuration(name, shape)
        yield configuration(f"{name}, none", shape, reduction="none")
        full = {"weight": empty(*shape, dtype=dtype), "pos_weight": empty(shape[-1], dtype=dtype)}
        full |= {"mask": mask(*shape)}
        yield configuration(f"{name}, every option", shape, "input", "target", **full)
        yield configuration(f"{name}, every option, none", shape, "input", "target", reduction="none", **full)
    if brief:
        return
    shape = (1024, launch.ELEMENTWISE_TILES[dtype.itemsize].block)
    yield configuration("unaligned", shape, input=shifted(*shape, dtype=dtype))
    yield configuration("gradient of the target", shape, "input", "target")
    yield configuration("mask", shape, mask=mask(*shape))
    yield configuration("mask, sum", shape, mask=mask(*shape), reduction="sum")
    yield configuration("mask of rows", shape, mask=mask(shape[0], 1))
    for name, shape, operand in _broadcasts(dtype):
        yield configuration(f"pos_weight {name}", shape, pos_weight=operand)
        if thorough:
            yield configuration(f"weight {name}", shape, weight=operand)
            yield configuration(f"both {name}, none", shape, weight=operand, pos_weight=operand, reduction="none")


def _gaussian_kl(dtype: torch.dtype, thorough: bool, brief: bool) -> Iterator[Configuration]:
    names = ("mu_q", "logvar_q", "mu_p", "logvar_p")

    def configuration(
        name: str, shape: tuple[int, ...], count: int = 2, prior: Tensor | None = None, **options: Any
    ) -> Configuration:
        arguments: dict[str, Any] = {n: empty(*shape, dtype=dtype) for n in names[:count]}
        if prior is not None:
            arguments |= {"mu_p": prior, "logvar_p": prior}
        return Configuration(name, "gaussian_kl", arguments | options, tuple(arguments))

    every = {"free_bits": 0.5, "logvar_clamp": (-1.0, 1.0)}
    for name, shape in _elementwise_shapes(dtype, brief):
        for kind, count in (("standard", 2), ("general", 4)):
            yield configuration(f"{kind}, {name}", shape, count)
            yield configuration(f"{kind}, {name}, every option", shape, count, **every)
            yield configuration(f"{kind}, {name}, every option, capacity", shape, count, capacity=10.0, **every)
            if (name == "aligned" and not brief) or thorough:
                yield configuration(f"{kind}, {name}, none", shape, count, reduction="none")
                for option, value in every.items():
                    yield configuration(f"{kind}, {name}, {option}", shape, count, **{option: value})
                yield configuration(f"{kind}, {name}, capacity", shape, count, capacity=10.0)
    for name, shape, operand in () if brief else _broadcasts(dtype):
        yield configuration(f"prior {name}", shape, prior=operand)
        if thorough:
            yield configuration(f"prior {name}, every option, none", shape, prior=operand, reduction="none", **every)


def _cases(dtype: torch.dtype) -> Iterator[Configuration]:
    """The calls of the cases of every loss that has no options above."""
    for case in CASES:
        if case.loss not in _TABLED and dtype in case.dtypes and not case.autocast and BENCH not in case.uses:
            call = meta_call(case.call("cpu", dtype))
            yield Configuration(f"case: {case.name}", case.loss, call.arguments, call.differentiable)


def configurations(dtype: torch.dtype, *, thorough: bool = False) -> Iterator[Configuration]:
    """Calls in one dtype, by the defaults of the launch tables and then by each device's entries in ``core/tuned.json``.

    Those are in force until the next call is drawn.

    By default each option is taken alone and all together in the layouts with the most code, and none in the others;
    fp16 and fp64, whose kernels are those of bf16 and fp32 but for the types, are run through more quickly.
    ``thorough`` takes all combinations of options in every layout.
    """
    yield from _configurations(dtype, thorough)
    for device, entries in tuned.shipped().items():
        with tuned.in_force(entries):
            for configuration in _configurations(dtype, thorough):
                yield configuration._replace(label=f"{configuration.label}, tuned for {device}")


def _configurations(dtype: torch.dtype, thorough: bool) -> Iterator[Configuration]:
    brief = not thorough and dtype in (torch.float16, torch.float64)
    for layout in layouts(dtype):
        if not brief or layout.depth >= 1:
            chosen = layout._replace(depth=1) if brief else layout
            yield from _cross_entropy(chosen, thorough)
            yield from _linear_cross_entropy(chosen, thorough)
            yield from _nll_loss(chosen, thorough)
            yield from _divergences(chosen, thorough)
    yield from _held_rows(dtype)
    yield from _held_losses(dtype)
    yield from _binary_cross_entropy(dtype, thorough, brief)
    yield from _gaussian_kl(dtype, thorough, brief)
    yield from _cases(dtype)


_TABLED = frozenset(
    {
        "binary_cross_entropy_with_logits",
        "categorical_entropy",
        "cross_entropy",
        "gaussian_kl",
        "js_div_with_logits",
        "kl_div_with_logits",
        "linear_cross_entropy",
        "nll_loss",
    }
)
