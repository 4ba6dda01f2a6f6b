"""The divergences' operators: allocate, launch, register; and the autograd.Function that calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import autograd, tuned
from ...core.launch import PAIR_ROW_TILES, SCATTERED_PAIR_ROW_TILE, WHOLE_ROW, Tile, held_row_tile, launch
from ...core.library import register
from ...core.reduction import kernel_dtype, launch_reduction
from ...core.row_plan import Plan, gradient_like, incoming, plan
from . import eager, reference
from .reference import Kind, Options, arithmetic

# Numbers of each row that the backward needs, by kind.
_SAVED = {Kind.FORWARD_KL: 5, Kind.REVERSE_KL: 5, Kind.JS: 6, Kind.ENTROPY: 3}


def _saved_shape(input: Tensor, kind: int) -> tuple[int, int]:
    """None where a tile holds the row, and its numbers are found anew."""
    n_rows = 1
    for size in input.shape[:-1]:
        n_rows = n_rows * size
    return (0 if input.size(-1) <= WHOLE_ROW else _SAVED[Kind(kind)]), n_rows


def _operands(input: Tensor, target: Tensor | None, kind: int) -> list[Tensor]:
    """The distributions in the kernels' order, classes in dimension 1."""
    tensors = [input] if target is None else [input, target] if kind == Kind.REVERSE_KL else [target, input]
    return [t.movedim(-1, 1) for t in tensors]


def _formula(options: Options) -> dict[str, Any]:
    from . import kernels

    formulas = {Kind.JS: kernels.JS, Kind.ENTROPY: kernels.ENTROPY}
    return {"KIND": formulas.get(Kind(options.kind), kernels.KL).value}


def _by_tiles(p: Plan, operands: list[Tensor]) -> tuple[Any, ...]:
    """Shape and strides of all dimensions of rows but the innermost, which a tile covers; its strides, and the classes'."""
    strides = p.strides[: len(operands)]
    return (
        p.shape[:-1] or (1,), *(s[:-1] or (0,) for s in strides), *(s[-1] for s in strides),
        *(t.stride(1) for t in operands), p.shape[-1], -(-p.shape[-1] // p.block_rows), p.n_rows, p.n_cols,
    )  # fmt: skip


def _launch_forward(input: Tensor, target: Tensor | None, options: Options, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from . import kernels

    acc = arithmetic(input, target)
    operands = _operands(input, target, options.kind)
    p = plan(operands, None, heavy=True, whole=True)
    a, b = operands[0], operands[-1]
    reduce = options.divisor is not None
    loss = torch.empty(() if reduce else input.shape[:-1], dtype=dtype, device=input.device)
    partials = torch.empty(p.programs, dtype=acc, device=input.device) if reduce else None
    saved = torch.empty(_saved_shape(input, options.kind), dtype=acc, device=input.device)
    pointers = (a, b, None if reduce else loss, partials, saved if saved.numel() else None)
    scalars = (1.0 / options.temperature, options.beta, 1.0 - options.beta, options.temperature**2)
    flags = {"REDUCE": reduce, "DTYPE": kernel_dtype(acc), **_formula(options)}
    if p.by_rows:
        held, tile = None, Tile(p.block, p.num_warps)
        if options.kind == Kind.JS:
            itemsize = max(t.element_size() for t in operands)
            held = held_row_tile(p.n_cols, itemsize)
            if held is None:
                tile = Tile(*tuned.entry(input.device, "pair of rows", itemsize, PAIR_ROW_TILES[itemsize]))
            else:
                tile = held
        if target is not None and held is None and p.vec == 1:
            tile = SCATTERED_PAIR_ROW_TILE
        launch(
            kernels._divergence_forward_rows_kernel, p.programs, input.device,
            *pointers, p.shape, p.strides[0], p.strides[1], a.stride(1), b.stride(1), p.n_rows, p.n_cols, *scalars,
            WHOLE=held is not None, VEC=p.vec, RAGGED=p.ragged, BLOCK=tile.block, num_warps=tile.num_warps, **flags,
        )  # fmt: skip
    else:
        launch(
            kernels._divergence_forward_tiles_kernel, p.programs, input.device,
            *pointers, *_by_tiles(p, [a, b]), *scalars,
            WHOLE=p.n_cols <= WHOLE_ROW, VEC=p.vec, CHUNKS=p.chunks,
            BLOCK_ROWS=p.block_rows, BLOCK_COLS=p.block, num_warps=p.num_warps, **flags,
        )  # fmt: skip
    if options.divisor is not None:
        launch_reduction(
            (partials, None, None, None), (loss, None, None, None), p.programs, acc, divisor=float(options.divisor)
        )
    return loss, saved


def _stored(input: Tensor, target: Tensor | None, needed: int, triton: bool) -> tuple[Tensor, Tensor]:
    """Where the eager forward leaves gradients, in the dtype of arithmetic; bit 0 of ``needed`` is the input's."""
    dtype = arithmetic(input, target)
    return tuple(
        torch.empty_like(t, dtype=dtype) if t is not None and needed >> bit & 1 and not triton else input.new_empty(0)
        for bit, t in enumerate((input, target))
    )  # pyright: ignore[reportReturnType]


def _forward(
    input: Tensor, target: Tensor | None, kind: int, temperature: float, beta: float, divisor: int | None,
    needed: int, dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = Options(kind, temperature, beta, divisor)
    stored = _stored(input, target, needed, triton)
    if triton and input.numel():
        return *_launch_forward(input, target, options, dtype), *stored
    if input.numel():
        wanted = [t if needed >> bit & 1 else None for bit, t in enumerate(stored)]
        loss = reference.reduce(eager.forward(input, target, options, *wanted), options)
    else:
        loss = reference.divergence(input, target, options)
    saved = input.new_empty(_saved_shape(input, kind) if triton else (0,), dtype=arithmetic(input, target))
    return loss.to(dtype), saved, *stored


def _forward_fake(
    input: Tensor, target: Tensor | None, kind: int, temperature: float, beta: float, divisor: int | None,
    needed: int, dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    loss = input.new_empty(input.shape[:-1] if divisor is None else (), dtype=dtype)
    saved = input.new_empty(_saved_shape(input, kind) if triton else (0,), dtype=arithmetic(input, target))
    return loss, saved, *_stored(input, target, needed, triton)


def _launch_backward(
    input: Tensor, target: Tensor | None, saved: Tensor, grad_loss: Tensor, options: Options,
    grad_input: Tensor | None, grad_target: Tensor | None,
) -> None:  # fmt: skip
    from . import kernels

    operands = _operands(input, target, options.kind)
    a, b = operands[0], operands[-1]
    grads = [grad_input] if target is None else [grad_input, grad_target]
    if target is not None and options.kind != Kind.REVERSE_KL:
        grads.reverse()
    written = [None if g is None else g.movedim(-1, 1) for g in grads]
    p = plan([*operands, *(g for g in written if g is not None)], None, heavy=True, whole=True)
    strides = iter(p.strides)
    a_strides = b_strides = next(strides)
    if target is not None:
        b_strides = next(strides)
    grad_strides = [a_strides if g is None else next(strides) for g in written]
    grad_a, grad_b = (written[0], written[1] if len(written) == 2 else None)
    every = [a, b, a if grad_a is None else grad_a, a if grad_b is None else grad_b]
    p = p._replace(strides=[a_strides, b_strides, grad_strides[0], grad_strides[-1] if len(written) == 2 else a_strides])
    upstream, upstream_stride = incoming(grad_loss)
    pointers = (*every, saved if saved.numel() else None, upstream, upstream_stride)
    scalars = (1.0 / options.temperature, options.beta, 1.0 - options.beta, options.temperature / (options.divisor or 1))
    flags = {
        "GRAD_A": grad_a is not None,
        "GRAD_B": grad_b is not None,
        "DTYPE": kernel_dtype(arithmetic(input, target)),
        **_formula(options),
    }
    if p.by_rows:
        launch(
            kernels._divergence_backward_rows_kernel, p.programs * p.n_splits, input.device,
            *pointers, p.shape, *p.strides, *(t.stride(1) for t in every),
            p.n_rows, p.n_cols, p.n_splits, p.split_cols, *scalars,
            VEC=p.vec, RAGGED=p.ragged, BLOCK=p.block, num_warps=p.num_warps, **flags,
        )  # fmt: skip
    else:
        launch(
            kernels._divergence_backward_tiles_kernel, p.programs * p.n_splits, input.device,
            *pointers, *_by_tiles(p, every), p.n_splits, p.split_cols, *scalars,
            WHOLE=p.n_cols <= WHOLE_ROW, VEC=p.vec, CHUNKS=p.chunks,
            BLOCK_ROWS=p.block_rows, BLOCK_COLS=p.block, num_warps=p.num_warps, **flags,
        )  # fmt: skip


def _backward(
    input: Tensor, target: Tensor | None, saved: Tensor, of_input: Tensor, of_target: Tensor, grad_loss: Tensor,
    kind: int, temperature: float, beta: float, divisor: int | None, needed: int, triton: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = Options(kind, temperature, beta, divisor)
    grads = [None if t is None or not needed >> bit & 1 else gradient_like(t) for bit, t in enumerate((input, target))]
    if input.numel():
        if triton:
            _launch_backward(input, target, saved, grad_loss, options, *grads)
        else:
            for stored, grad in zip((of_input, of_target), grads, strict=True):
                if grad is not None:
                    eager.backward(stored, grad_loss, options, grad)
    return tuple(input.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    input: Tensor, target: Tensor | None, saved: Tensor, of_input: Tensor, of_target: Tensor, grad_loss: Tensor,
    kind: int, temperature: float, beta: float, divisor: int | None, needed: int, triton: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        gradient_like(t) if t is not None and needed >> bit & 1 else input.new_empty(0)
        for bit, t in enumerate((input, target))
    )


_OPTIONS = "int kind, float temperature, float beta, SymInt? divisor"

divergence_forward = register(
    f"divergence_forward(Tensor input, Tensor? target, {_OPTIONS}, int needed, ScalarType dtype, bool triton)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
divergence_backward = register(
    f"divergence_backward(Tensor input, Tensor? target, Tensor saved, Tensor of_input, Tensor of_target,"
    f" Tensor grad_loss, {_OPTIONS}, int needed, bool triton) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class Divergence(torch.autograd.Function):
    """A divergence or an entropy of logits (N, ..., V) with the hand-written backward; the loss, and what it saves."""

    @staticmethod
    def forward(
        input: Tensor, target: Tensor | None, kind: int, temperature: float, beta: float, divisor: int | None,
        needed: int, dtype: torch.dtype, triton: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return divergence_forward(input, target, kind, temperature, beta, divisor, needed, dtype, triton)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, *options, _, _, ctx.triton = inputs
        ctx.options = Options(*options)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, *output[1:])

    @staticmethod
    @autograd.through_transforms
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss, options = grads[0], ctx.options
        input, target, *rest = ctx.saved_tensors
        need_input, need_target = ctx.needs_input_grad[:2]
        nothing = (None,) * 7
        if grad_loss is None:
            return None, None, *nothing
        if torch.is_grad_enabled():
            input, target = autograd.apart((input, target))
            loss = reference.divergence(input, target, options)
            wanted = [t for t, need in ((input, need_input), (target, need_target)) if need]
            found = iter(torch.autograd.grad(loss, wanted, grad_loss.to(loss.dtype), create_graph=True))
            return next(found) if need_input else None, next(found) if need_target else None, *nothing
        needed = need_input | need_target << 1
        found = divergence_backward(input, target, *rest, grad_loss, *options, needed, ctx.triton)
        return found[0] if need_input else None, found[1] if need_target else None, *nothing
