"""Tensors and surroundings in which our losses take a call as torch's do; otherwise the reason why not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack  # pyright: ignore[reportAttributeAccessIssue]
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack, has_torch_function_unary
from torch.utils._device import DeviceContext

from ...core import backend
from ...core.reduction import autocasting

SHAPES = "shapes that differ"

DEVICES = ("cpu", "cuda")
LABELS = (torch.int64, torch.uint8)


def unfit(*tensors: Any, optional: tuple[Any, ...] = ()) -> str | None:
    """Why these are not plain dense tensors of one device in plain eager or compiled code; ``optional`` ones may be None."""
    for t in optional:
        if t is not None:
            tensors = (*tensors, t)
    for t in tensors:
        if type(t) is not Tensor and type(t) is not Parameter:
            return "a subclass of Tensor" if isinstance(t, Tensor) else "not a tensor"
    # Before a mode could see what is asked of the tensors.
    if has_torch_function_unary(tensors[0]) and not _sets_device_alone():
        return "a torch function mode"
    device = None
    for t in tensors:
        if t.layout is not torch.strided or t.is_nested or t.is_quantized:
            return "not a dense tensor"
        if device is None:
            device = t.device
            if device.type not in DEVICES:
                return f"device {device.type}"
        elif t.device != device:
            return "tensors on several devices"
    return _surroundings(tensors)


def _surroundings(tensors: tuple[Tensor, ...]) -> str | None:
    if torch.compiler.is_exporting():
        return "torch.export"
    if backend.transforms():
        return "a transform of torch.func"
    if torch.compiler.is_compiling():
        # Dynamo does not trace an autograd.Function that is given one tensor twice.
        twice = any(a is b for place, a in enumerate(tensors) for b in tensors[:place])
        return "one tensor in two places, compiled" if twice else None
    if torch.is_grad_enabled() and any(t.is_inference() for t in tensors):
        return "a tensor of inference mode"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if backend.transformed(*tensors):
        return "forward-mode differentiation"
    return "a torch dispatch mode" if _len_torch_dispatch_stack() else None


def _sets_device_alone() -> bool:
    """Whether the only mode is that of ``torch.set_default_device``, which concerns new tensors alone."""
    return not torch.compiler.is_compiling() and all(type(m) is DeviceContext for m in _get_current_function_mode_stack())


def mixed(*tensors: Tensor | None) -> str | None:
    """Why the dtypes of operands are not one that ours compute in; autocast makes one of fp32 and below."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if not dtypes.issubset(backend.KERNEL_DTYPES):
        return "a dtype other than fp32, fp16, bf16 and fp64"
    if len(dtypes) > 1 and (torch.float64 in dtypes or not autocasting(_device(tensors))):
        return "operands of several dtypes"
    return None


def narrow_autocast(*tensors: Tensor | None) -> str | None:
    """Autocast of half precision, where torch composes a loss of operators and ours computes it in fp32."""
    half = any(t is not None and t.dtype.itemsize < 4 for t in tensors)
    return "autocast of half precision" if half and autocasting(_device(tensors)) else None


def _device(tensors: tuple[Tensor | None, ...]) -> torch.device:
    return next(t.device for t in tensors if t is not None)


def learned(weight: Tensor | None) -> str | None:
    """A gradient for a weight, which our kernels lack."""
    return "a weight that requires a gradient" if weight is not None and weight.requires_grad else None


def shapes_differ(tensor: Tensor, *others: Tensor | None) -> str | None:
    """torch broadcasts some of these, with a warning, and refuses others."""
    return SHAPES if any(t is not None and t.shape != tensor.shape for t in others) else None
