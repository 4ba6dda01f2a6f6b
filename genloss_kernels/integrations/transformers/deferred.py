"""What a patched output layer returns while a loss is awaited: its logits, not computed yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import functional as F
from . import heads
from .loss import as_divisor, causal_lm_loss, check_vocab_size, loss_in_float32, next_tokens


class LossCall:
    """Second argument of a patched output layer, which then returns the loss of its input.

    No dataclass or tuple, which hooks look into: FSDP's mixed precision would round the divisor to the parameters' dtype.
    """

    def __init__(self, target: Tensor, hidden: Tensor, n_classes: int | None, options: dict[str, Any]) -> None:
        self.target, self.hidden, self.n_classes, self.options = target, hidden, n_classes, options

    def loss(self, head: Any, hidden: Tensor) -> Tensor:
        # The layer is called for a second time, and its hooks with it. Those that gather parameters pass the input on, in a
        # new tensor at most; one that changes it would do so twice.
        if not torch.compiler.is_compiling() and hidden.data_ptr() != self.hidden.data_ptr():
            raise RuntimeError("a hook changes the input of the output layer, which only mode='logits' allows")
        input, weight, bias = heads.linear_map(head, hidden)
        if self.n_classes is not None:
            weight, bias = weight[: self.n_classes], None if bias is None else bias[: self.n_classes]
        with loss_in_float32(input):
            loss: Any = F.linear_cross_entropy(input, weight, self.target, linear_bias=bias, **self.options)
        self._made = loss, loss._version
        return loss

    def check(self, loss: Tensor) -> Tensor:
        """``loss`` as it came out of the layer's hooks, which would act on logits."""
        made, version = self._made
        if not torch.compiler.is_compiling() and (loss.data_ptr() != made.data_ptr() or loss._version != version):
            raise RuntimeError("a hook changes the output of the output layer, which only mode='logits' allows")
        return loss


class DeferredLogits:
    """The input of an output layer, and what the model has done to the logits since.

    Casts, factors, one ``tanh`` and the removal of the last classes become options of the loss. Anything else computes the
    logits, does to them what was done so far, and goes on with a tensor: right, only without the saving.

    Args:
        head: output layer; called with its input and a :class:`LossCall` it returns the loss.
        compute: returns the layer's own logits of ``hidden``.
        hidden: its input, shape (..., D).
        demanded: is called with the name of an operation that needs the logits.
    """

    def __init__(
        self, head: Any, compute: Callable[[Tensor], Tensor], hidden: Tensor, demanded: Callable[[str], None]
    ) -> None:
        self._head, self._compute, self._hidden, self._demanded = head, compute, hidden, demanded
        self._done: tuple[Callable[[Any], Any], ...] = ()
        # The logits are outer * tanh(inner * x), or inner * x.
        self._inner, self._outer, self._tanh = 1.0, 1.0, False
        self._n_classes: int | None = None
        self._logits: Any = None

    def computed(self) -> Tensor | None:
        """The logits where something needed them."""
        return self._logits

    def loss(
        self,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: int | float | Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As :func:`causal_lm_loss`."""
        if self._logits is not None:  # and may have been written to
            return causal_lm_loss(self._logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels)
        hidden = self._hidden
        check_vocab_size(self.size(-1), vocab_size)
        target = next_tokens(hidden.shape[:-1], labels, shift_labels, ignore_index).to(hidden.device)
        options = {
            "ignore_index": ignore_index,
            "divisor": as_divisor(num_items_in_batch, hidden.device),
            "softcap": self._outer if self._tanh else None,
            "logit_scale": self._inner * self._outer,
        }
        call = LossCall(target, hidden, self._n_classes, options)
        return call.check(self._head(hidden, call))

    @property
    def shape(self) -> torch.Size:
        classes = self._head.out_features if self._n_classes is None else self._n_classes
        return torch.Size((*self._hidden.shape[:-1], classes))

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self._hidden.dtype

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self._hidden.dim()

    def contiguous(self) -> DeferredLogits:
        return self._after(lambda logits: logits.contiguous())

    def float(self) -> DeferredLogits:
        return self._after(lambda logits: logits.float())

    def to(self, *args: Any, **kwargs: Any) -> Any:
        # Arithmetic is in fp32 whatever the logits are cast to.
        if all(a in (torch.float32, torch.float16, torch.bfloat16, self.device) for a in (*args, *kwargs.values())):
            return self._after(lambda logits: logits.to(*args, **kwargs))
        return self._real("to").to(*args, **kwargs)

    def tanh(self) -> Any:
        if self._tanh:
            return self._real("tanh").tanh()
        return self._after(torch.tanh, tanh=True)

    def __mul__(self, other: Any) -> Any:
        if not _is_factor(other):
            return self._real("*") * other
        return self._after(lambda logits: logits * other, factor=float(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if not _is_factor(other):
            return self._real("/") / other
        return self._after(lambda logits: logits / other, factor=1.0 / float(other))

    def __getitem__(self, index: Any) -> Any:
        first = isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis and isinstance(index[1], slice)
        if not first or index[1].start or index[1].step not in (None, 1) or index[1].stop is None or index[1].stop < 1:
            return self._real("indexing")[index]
        return self._after(lambda logits: logits[index], n_classes=min(index[1].stop, self.size(-1)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(name), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        method = {torch.tanh: cls.tanh, torch.mul: cls.__mul__, torch.div: cls.__truediv__}.get(function)
        if method is not None and args and isinstance(args[0], cls) and not kwargs:
            return method(*args)
        name = getattr(function, "__name__", str(function))
        return function(*_with_logits(args, name), **{key: _with_logits(value, name) for key, value in kwargs.items()})

    def _after(
        self, operation: Callable[[Any], Any], *, factor: float = 1.0, tanh: bool = False, n_classes: int | None = None
    ) -> Any:
        if self._logits is not None:
            return operation(self._logits)
        after = DeferredLogits(self._head, self._compute, self._hidden, self._demanded)
        after._done = (*self._done, operation)
        after._tanh = self._tanh or tanh
        after._inner, after._outer = self._inner, self._outer
        if self._tanh:
            after._outer *= factor
        else:
            after._inner *= factor
        after._n_classes = self._n_classes if n_classes is None else n_classes
        return after

    def _real(self, wanted_by: str) -> Tensor:
        if self._logits is None:
            self._demanded(wanted_by)
            logits = self._compute(self._hidden)
            for operation in self._done:
                logits = operation(logits)
            self._logits = logits
        return self._logits


def _is_factor(value: Any) -> bool:
    """A softcap must be positive, so that no other factor may come after the ``tanh``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value < float("inf")


def _with_logits(value: Any, wanted_by: str) -> Any:
    if isinstance(value, DeferredLogits):
        return value._real(wanted_by)
    if isinstance(value, (tuple, list)):
        return type(value)(_with_logits(v, wanted_by) for v in value)
    return value


def _through_logits(name: str) -> Callable[..., Any]:
    def operator(self: DeferredLogits, *args: Any) -> Any:
        return getattr(self._real(name), name)(*_with_logits(args, name))

    return operator


# Python looks for these on the class alone.
for _name in (
    "__add__", "__radd__", "__sub__", "__rsub__", "__rtruediv__", "__pow__", "__rpow__", "__matmul__", "__neg__", "__abs__",
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__len__", "__iter__", "__bool__", "__setitem__",
):  # fmt: skip
    setattr(DeferredLogits, _name, _through_logits(_name))
DeferredLogits.__hash__ = object.__hash__  # pyright: ignore[reportAttributeAccessIssue]
