"""What the kernels' main loops read and write in full, and so should move 16 bytes at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..losses.adversarial.reference import GAMES, LINEAR
from .specialisations import Specialisation

_BYTES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2, "i64": 8, "i32": 4, "i8": 1, "u8": 1, "u1": 1, "i1": 1}

# Kinds of the elementwise kernels' operands, two bits of KINDS each.
_DENSE, _SINGLE, _STRIDED = 1, 2, 3

# Of the divergence kernels' KIND.
KL, ENTROPY = 0, 2

_LANES = 32


class Streams(NamedTuple):
    """What one tile of a kernel's main loop reads and writes.

    ``loads`` and ``stores``: bytes an element of each operand that should move 16 bytes at a time. ``others``: the same
    of what is read beside them, such as class weights. ``singles``: bytes of values that a tile reads once.
    ``elements``: how many of each operand a thread holds. ``wide``: whether 16 bytes at a time are due.
    """

    loads: tuple[int, ...]
    stores: tuple[int, ...]
    others: tuple[int, ...]
    singles: tuple[int, ...]
    elements: int
    wide: bool = True


def streams(kernel: Specialisation) -> Streams | None:
    """Streams of a kernel; None where it gathers or adds up, or where its layout does not allow 16 bytes at a time."""
    return STREAMS[kernel.name](kernel) if kernel.name in STREAMS else None


def _row_streams(kernel: Specialisation) -> Streams | None:
    return None if kernel["VEC"] == 1 else _class_streams(kernel, kernel["BLOCK"])


def _tile_streams(kernel: Specialisation) -> Streams | None:
    """Tiles move whole vectors along the dimension that is contiguous, where its size and all strides allow it."""
    names = ["logits", *(["target"] if kernel["PROBABILITIES"] else [])]
    if "backward" in kernel.name:
        names += ["grad"] * kernel["GRAD_LOGITS"] + ["grad_target"] * kernel["GRAD_TARGET"]
    along, across = ("col", "inner") if kernel["logits_stride_col"] == 1 else ("inner", "col")
    sizes = {"inner": ("n_inner",), "col": ("n_cols", "split_cols")}[along]
    aligned = (
        all(kernel[f"{name}_stride_{along}"] == 1 for name in names)
        and all(kernel.divisible(f"{name}_stride_{across}") for name in names)
        and all(kernel.divisible(f"{name}_strides") for name in names)
        and all(kernel.divisible(f"{name}_ptr") for name in ("logits", "target")[: len(names)])
        and all(kernel.divisible(size) for size in sizes)
    )
    return _class_streams(kernel, kernel["BLOCK_ROWS"] * kernel["BLOCK_COLS"]) if aligned else None


def _class_streams(kernel: Specialisation, block: int) -> Streams:
    forward, both = "forward" in kernel.name, "loss_and_gradient" in kernel.name
    probabilities = kernel.has("PROBABILITIES")
    coefficients = probabilities or kernel["SMOOTHING"]
    # Without a gradient of the logits the backward needs the weights, but no targets.
    loads = [
        "logits_ptr",
        *(["target_ptr"] if probabilities and (forward or both or kernel["GRAD_LOGITS"]) else []),
    ]
    gradients = (("GRAD_LOGITS", "grad_logits_ptr"), ("GRAD_TARGET", "grad_target_ptr"))
    stores = [] if forward else [pointer for flag, pointer in gradients if kernel.has(flag)]
    if both:
        stores.append("grad_logits_ptr")
    others = ["weight_ptr"] if coefficients and kernel.signature["weight_ptr"] != "constexpr" else []
    elements = _elements(kernel, block)
    return Streams(_sizes(kernel, loads), _sizes(kernel, stores), _sizes(kernel, others), (), elements)


def _divergence_streams(kernel: Specialisation) -> Streams | None:
    return None if kernel["VEC"] == 1 else _pair_of_logits(kernel, kernel["BLOCK"])


def _divergence_tile_streams(kernel: Specialisation) -> Streams:
    """Whole rows are read by vectors of 16 bytes where their lengths allow it; other masks are computed lane by lane."""
    moved = _pair_of_logits(kernel, kernel["BLOCK_ROWS"] * kernel["BLOCK_COLS"])
    return moved._replace(wide=all(size * kernel["VEC"] == 16 for size in moved.loads + moved.stores))


def _pair_of_logits(kernel: Specialisation, block: int) -> Streams:
    forward, pair = "forward" in kernel.name, kernel["KIND"] != ENTROPY
    stores = [] if forward else [f"grad_{name}_ptr" for name in "ab" if kernel[f"GRAD_{name.upper()}"]]
    loads = ["a_ptr", *(["b_ptr"] if pair else [])]
    return Streams(_sizes(kernel, loads), _sizes(kernel, stores), (), (), _elements(kernel, block))


def _scale_streams(kernel: Specialisation) -> Streams:
    """Of each of its tensors, whose code stands side by side."""
    size = (_itemsize(kernel.signature["tensors"][0]),)
    return Streams(size, size, (), (), _elements(kernel, kernel["BLOCK"]), wide=False)


def _sizes(kernel: Specialisation, pointers: list[str]) -> tuple[int, ...]:
    return tuple(_itemsize(kernel.signature[name]) for name in pointers)


def _unread(kernel: Specialisation, flags: int) -> set[int]:
    """Operands that a formula does not need, whose loads the compiler drops."""
    # The divergence's slope in its input is a function of the target alone, and a linear game's is a constant.
    if kernel.formula == "kl_div_gradient" and kernel.signature["grads"][1] == "constexpr":
        return {0}
    linear = kernel.formula == "adversarial_gradient" and flags & GAMES == LINEAR
    return {0, 1} if linear else set()


def _elementwise_streams(kernel: Specialisation) -> Streams | None:
    results = kernel.signature["loss_ptr"] if "forward" in kernel.name else kernel.signature["grads"]
    return _operand_streams(kernel, kernel["KINDS"], kernel["FLAGS"], kernel.signature["operands"], results, ())


def _penalty_streams(kernel: Specialisation) -> Streams | None:
    results = kernel.signature["grads"] if "backward" in kernel.name else ()
    return _operand_streams(kernel, kernel["KINDS"], 0, kernel.signature["operands"], results, ())


def _pair_streams(kernel: Specialisation) -> Streams | None:
    """Those of the term that moves the more, whose loop is the one that is read."""
    terms = []
    for place, name in enumerate(("FIRST", "SECOND")):
        kinds, flags = kernel[f"{name}_KINDS"], kernel[f"{name}_FLAGS"]
        results = () if "forward" in kernel.name else kernel.signature["grads"][place]
        terms.append(_operand_streams(kernel, kinds, flags, kernel.signature["operands"][place], results, (place,)))
    return None if None in terms else max(terms, key=lambda term: sum((*term.loads, *term.stores, *term.others)))


def _operand_streams(
    kernel: Specialisation, kinds: int, flags: int, operands: tuple[str, ...], results: Any, path: tuple[int, ...]
) -> Streams | None:
    read = [place for place in range(len(operands)) if place not in _unread(kernel, flags)]
    places = {kind: [place for place in read if (kinds >> (2 * place)) & 3 == kind] for kind in (_DENSE, _SINGLE, _STRIDED)}
    argument = kernel.kernel.arg_names.index("operands")
    if not places[_DENSE] or not all(kernel.attributes.get((argument, *path, place)) for place in places[_DENSE]):
        return None
    written = [pointer for pointer in _flat(results) if pointer != "constexpr"]
    dense, single, strided = (tuple(_itemsize(operands[place]) for place in places[kind]) for kind in places)
    return Streams(dense, tuple(map(_itemsize, written)), strided, single, _elements(kernel, kernel["BLOCK"]))


def _elements(kernel: Specialisation, block: int) -> int:
    return max(1, block // (_LANES * kernel.num_warps))


def _flat(types: Any) -> tuple[str, ...]:
    return types if isinstance(types, tuple) else (types,)


def _itemsize(pointer: str) -> int:
    return _BYTES[pointer.lstrip("*")]


def _cosine_streams(kernel: Specialisation) -> Streams | None:
    names, forward = ("first", "second"), "forward" in kernel.name
    aligned = kernel.divisible("n_cols") and all(
        kernel.divisible(f"{name}_{what}") for name in names for what in ("ptr", "stride")
    )
    if not aligned:
        return None
    loads = _sizes(kernel, [f"{name}_ptr" for name in names])
    given = [] if forward else [f"{name}_grad_ptr" for name in names]
    stores = _sizes(kernel, [name for name in given if kernel.signature[name] != "constexpr"])
    return Streams(loads, stores, (), (), _elements(kernel, kernel["ROWS"] * kernel["COLS"]))


# The kernels that walk over streams; others gather, or hold few values.
STREAMS: dict[str, Callable[[Specialisation], Streams | None]] = {
    "_cross_entropy_forward_rows_kernel": _row_streams,
    "_cross_entropy_backward_rows_kernel": _row_streams,
    "_cross_entropy_loss_and_gradient_kernel": _row_streams,
    "_cross_entropy_loss_and_gradient_held_kernel": _row_streams,
    "_cross_entropy_forward_tiles_kernel": _tile_streams,
    "_cross_entropy_backward_tiles_kernel": _tile_streams,
    "_divergence_forward_rows_kernel": _divergence_streams,
    "_divergence_backward_rows_kernel": _divergence_streams,
    "_divergence_forward_tiles_kernel": _divergence_tile_streams,
    "_divergence_backward_tiles_kernel": _divergence_tile_streams,
    "_elementwise_forward_kernel": _elementwise_streams,
    "_elementwise_backward_kernel": _elementwise_streams,
    "_pair_forward_kernel": _pair_streams,
    "_pair_backward_kernel": _pair_streams,
    "_penalty_squares_kernel": _penalty_streams,
    "_penalty_backward_kernel": _penalty_streams,
    "_cosine_forward_kernel": _cosine_streams,
    "_cosine_backward_kernel": _cosine_streams,
    "_scale_kernel": _scale_streams,
}
