"""Which code path runs; the only reader of environment variables and devices."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import (
    _functorch,  # pyright: ignore[reportAttributeAccessIssue, reportMissingModuleSource]
    _len_torch_dispatch_stack,  # pyright: ignore[reportAttributeAccessIssue]
)
from torch.autograd import forward_ad

BACKENDS = ("auto", "triton", "eager")

# H200's count; where no GPU is at hand it only decides how interpreted launches are split.
DEFAULT_MULTIPROCESSORS = 132

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _validated(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_default = _validated(os.environ.get("GENLOSS_BACKEND", "auto"))


class _Choice(threading.local):
    name: str = _default


_choice = _Choice()


def current() -> str:
    """Name of the backend that a loss called now on this thread would use."""
    return _choice.name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose which code runs on this thread: ``"auto"``, ``"triton"`` or ``"eager"``.

    ``auto`` runs the fused kernels on GPU tensors that they support and PyTorch operators elsewhere; ``triton`` always
    runs the kernels and raises where they cannot run; ``eager`` always runs PyTorch operators. The choice is read once
    in the forward and kept for the backward. The default comes from ``GENLOSS_BACKEND`` when the package is imported.

    Raises:
        ValueError: ``name`` is none of the three.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> with gk.backend("eager"):
        ...     loss = gk.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> round(loss.item(), 4)
        1.3863
    """
    previous, _choice.name = _choice.name, _validated(name)
    try:
        yield
    finally:
        _choice.name = previous


class _Gradients(threading.local):
    in_forward: bool = os.environ.get("GENLOSS_GRADIENT_IN_FORWARD") == "1"


_gradients = _Gradients()


def gradients_made_in_forward() -> bool:
    """Whether a loss called now on this thread may make its gradient in the forward where it need not."""
    return _gradients.in_forward


@contextmanager
def gradient_in_forward(enabled: bool = True) -> Iterator[None]:
    """Let ``cross_entropy`` make the gradient of its logits in the forward, on this thread, with less memory traffic.

    Of up to 32768 classes (8192 in fp64; no softcap, no class weights beside label smoothing) the logits are read once and
    their gradient is written once, where a backward would read them again. Longer rows are read twice by one kernel, which
    saves as much only where the device's cache still holds them. The backward then has nothing to do if the upstream
    gradient is 1, as after ``loss.backward()``. Any other scalar upstream gradient, such as 1 over the number of
    micro-batches, is multiplied in by one more pass, which is then slower than without: give ``divisor`` instead, or leave
    this off. The gradient takes its memory from the forward on. It holds for kernels in fp32, fp64 and bf16, class indices,
    ``mean`` and ``sum``, without statistics, outside ``torch.compile``, ``torch.func``, dispatch modes and activation
    checkpoints; elsewhere nothing changes. ``linear_cross_entropy`` does so anyway, and so do large losses on the CPU. The
    default comes from ``GENLOSS_GRADIENT_IN_FORWARD=1`` when the package is imported.

    Numerics:
        A bf16 gradient is rounded once more where the upstream gradient is not a power of 2.

    Example:
        >>> import torch, genloss_kernels as gk
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> with gk.gradient_in_forward():
        ...     gk.cross_entropy(logits, torch.tensor([0, 3])).backward()
        >>> logits.grad[0]
        tensor([-0.3750,  0.1250,  0.1250,  0.1250])
    """
    previous, _gradients.in_forward = _gradients.in_forward, enabled
    try:
        yield
    finally:
        _gradients.in_forward = previous


def debug() -> bool:
    """Whether ``GENLOSS_DEBUG=1`` asks for checks that read values on a GPU (read on every call)."""
    return os.environ.get("GENLOSS_DEBUG") == "1"


class _Semantics(threading.local):
    device: bool = False


_semantics = _Semantics()


@contextmanager
def device_semantics() -> Iterator[None]:
    """Make interpreted CPU tensors behave as a GPU's do with bad class indices: no value check, NaN instead of an error."""
    previous, _semantics.device = _semantics.device, True
    try:
        yield
    finally:
        _semantics.device = previous


def reads_values(tensor: torch.Tensor) -> bool:
    """Whether a check may look at the values of ``tensor``: on the CPU always, elsewhere only under ``GENLOSS_DEBUG``."""
    if torch.compiler.is_compiling() or transformed(tensor) or traced(tensor):
        return False
    if tensor.device.type == "cpu":
        return not _semantics.device
    return tensor.device.type != "meta" and debug()


def triton_installed() -> bool:
    return _TRITON_INSTALLED


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def transformed(*tensors: torch.Tensor | None) -> bool:
    """Whether ``vmap`` or forward-mode AD is at work, which the operators cannot see through.

    Under ``torch.compile``, which does not say which, whether any transform of ``torch.func`` is.
    """
    if torch.compiler.is_compiling():
        return torch._C._are_functorch_transforms_active()
    kinds = _functorch.TransformType
    return any(level.key() not in (kinds.Grad, kinds.Functionalize) for level in _levels()) or _dual(tensors)


def pushes_forward(*tensors: torch.Tensor | None) -> bool:
    """Whether forward-mode AD is at work, and no other transform."""
    levels = _levels()
    return len(levels) == 1 and levels[0].key() == _functorch.TransformType.Jvp if levels else _dual(tensors)


def _levels() -> Sequence[Any]:
    if _functorch.peek_interpreter_stack() is None:
        return ()
    return _functorch.get_interpreter_stack() or ()


def _dual(tensors: Iterable[torch.Tensor | None]) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def composite(*tensors: torch.Tensor | None) -> bool:
    """Whether the eager path must be made of operators that every transform sees through: under all of ``torch.func``."""
    return bool(transforms()) or transformed(*tensors) or recorded()


def recorded() -> bool:
    """Whether calls are recorded without their backward, ``torch.export`` and ``torch.jit.trace``.

    A program that replays them is differentiated operator by operator, and ours have no gradient of their own.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch.jit.is_tracing()


def transforms() -> int:
    """How many transforms of ``torch.func`` are at work, one in another; each differentiates every gradient again."""
    if torch.compiler.is_compiling():
        return int(torch._C._are_functorch_transforms_active())
    return len(_levels())


def traced(*tensors: torch.Tensor | None) -> bool:
    """Whether these have no values to look at, or are being recorded: fake tensors, ``make_fx``."""
    if _len_torch_dispatch_stack():
        keys = torch._C._TorchDispatchModeKey
        if any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY)):
            return True
    return any(t is not None and type(t) is not torch.Tensor and type(t).__name__ == "FakeTensor" for t in tensors)


def plain(*tensors: torch.Tensor | None) -> bool:
    """Whether values of these CPU tensors may decide what runs: no compiler, no transform, no ``device_semantics``."""
    return not (
        _semantics.device
        or torch.compiler.is_compiling()
        or _functorch.peek_interpreter_stack() is not None
        or transformed(*tensors)
        or traced(*tensors)
    )


def use_triton(main: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the fused kernels run for these operands; raises where they were asked for and cannot."""
    name = _choice.name
    if name == "eager" or (name == "auto" and main.device.type != "cuda"):
        return False
    floating = [t for t in (main, *others) if t is not None and t.is_floating_point()]
    if name == "auto":
        known = triton_installed() and all(t.dtype in KERNEL_DTYPES for t in floating)
        return known and not transformed(main, *others) and not recorded()
    if not triton_installed():
        raise RuntimeError(
            "backend 'triton' needs the package triton, which is not installed: pip install triton (Linux only), "
            "or use backend 'auto' or 'eager'"
        )
    if main.device.type not in ("cuda", "meta") and not (main.device.type == "cpu" and INTERPRETED):
        raise RuntimeError(
            f"backend 'triton' cannot run on {main.device.type} tensors: move them to a GPU, or set "
            "TRITON_INTERPRET=1 in the environment before importing genloss_kernels to interpret the kernels on the CPU"
        )
    for tensor in floating:
        if tensor.dtype not in KERNEL_DTYPES:
            raise RuntimeError(
                f"backend 'triton' has no kernels for {tensor.dtype}: it accepts "
                f"{', '.join(str(d) for d in KERNEL_DTYPES)}; use backend 'auto' or 'eager'"
            )
    if transformed(main, *others):
        raise RuntimeError("backend 'triton' cannot run under vmap or forward-mode AD: use backend 'auto' or 'eager' there")
    if recorded():
        raise RuntimeError(
            "backend 'triton' cannot be recorded by torch.export or torch.jit.trace, whose programs would have no gradient: "
            "use backend 'auto' or 'eager' there"
        )
    return True
