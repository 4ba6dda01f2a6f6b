"""The torch operators that run beside the kernels, those inside the library's own operators too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..cases import Call, Case

# Allocations: no kernel runs for them, whatever they are called with.
_ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"})


class Operation(NamedTuple):
    """One torch operator that would launch a kernel on a GPU, and the bytes of its operands and results."""

    name: str
    bytes: int


class Operators(TorchDispatchMode):
    """Collects the operators that move data, in ``operations``.

    A mode that is merely in force does not see what runs inside a registered operator, such as a ``contiguous()`` in a
    launcher: this one steps into the library's operators. Doing so it runs their implementation on meta tensors too,
    where the dispatcher would choose the shape function, so that launchers can be run without data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "genloss":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        if func._can_decompose():
            # Composite operators, such as contiguous and sum_to_size, arrive whole from inside an operator.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if _moves_data(func, result):
            moved = sum(unique_bytes(t) for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
            if moved:
                self.operations.append(Operation(str(func), moved))
        return result


def _moves_data(func: Any, result: Any) -> bool:
    if func.is_view or func.overloadpacket.__name__ in _ALLOCATIONS:
        return False
    # Queries about metadata give no tensor.
    return any(isinstance(t, Tensor) for t in tree_leaves(result)) or func._schema.is_mutable


def unique_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, those of a broadcast dimension counted once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


class Stage(NamedTuple):
    """What one direction of a loss ran; ``result`` is the loss, or the gradients."""

    result: Any
    operations: list[Operation]


def run_stages(case: Case, call: Call, between: Callable[[], None] = lambda: None) -> tuple[Stage, Stage]:
    """Run a case forward and backward under the current backend, calling ``between`` in between.

    Gradients are asked for directly, since accumulating into a fresh leaf costs nothing where the leaf takes the
    gradient over, and the upstream gradient is made before counting starts: neither is the library's.
    """
    # Autocast of a GPU's dtype on the CPU, where the case runs.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.autocast), Operators() as operators:
        loss = case.function(**call.arguments)
    between()
    upstream = (
        torch.empty(loss.shape, dtype=loss.dtype, device=loss.device).normal_() if loss.dim() else torch.ones_like(loss)
    )
    wanted = [call.arguments[name] for name in call.differentiable]
    with Operators() as backward:
        gradients = torch.autograd.grad(loss, wanted, upstream)
    return Stage(loss, operators.operations), Stage(gradients, backward.operations)


def meta_call(call: Call) -> Call:
    """The same call on meta tensors: sizes, strides and offsets, and so alignment, without data."""
    arguments = dict(call.arguments)
    for name, tensor in call.tensors().items():
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        base = torch.empty(elements, dtype=tensor.dtype, device="meta")
        view = base.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        arguments[name] = view.requires_grad_(name in call.differentiable)
    return Call(arguments, call.differentiable)
