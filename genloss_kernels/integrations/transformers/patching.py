"""A revertible patch of one model: its loss function, and for the fused loss the forwards of it and of its output layer."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from . import heads
from .deferred import DeferredLogits, LossCall
from .loss import causal_lm_loss
from .verification import Refusal, Verification, signature_of

_MODES = ("logits", "fused", "auto")


def patch(model: Any, mode: str = "auto", verify: bool = True) -> PatchHandle:
    """Let one model compute its loss with this library, after proof that loss and gradients stay what they are.

    ``"logits"`` replaces ``model.loss_function`` by :func:`causal_lm_loss`. ``"fused"`` also computes the loss inside the
    output layer, by :func:`genloss_kernels.linear_cross_entropy`, so that the logits of the whole batch never exist. The
    model's own forward runs unchanged: its output layer returns a stand-in for the logits, which records the factors, casts
    and softcap that the model applies, and calls the layer again, through its hooks, when the loss is asked for. Whatever
    else the model does to it turns it into the logits.

    With a fused loss, ``output.logits`` is None in training mode when there are labels. Without labels, and in evaluation
    mode, logits are what they were. ``model(..., return_logits=True)`` returns them in training too, and
    ``return_logits=False`` spares them in evaluation.

    Deep copies and unpickled models stay patched; their handle is ``model.loss_function.handle``. Shard or compile the model
    after it is patched, and patch it anew where its output layer is replaced, as by ``resize_token_embeddings``.
    ``torch.nn.DataParallel``, whose replicas share one forward, needs ``mode="logits"``.

    Args:
        model: a transformers model with ``loss_function``, or a PEFT model around one. Only this instance changes.
        mode: ``"logits"``, ``"fused"``, or ``"auto"``: fused if that is proven, else logits if that is.
        verify: run the model on one batch of 16 tokens, natively and patched, in training mode with equal random numbers,
            with logits as they come and enlarged, with and without ``num_items_in_batch``; compare the loss and the
            gradients of the output layer's input and parameters, since behind that input nothing changes; and compare the
            loss functions on random logits. Training modes, gradients, buffers and random number generators are as before.

    Returns:
        A handle whose ``mode`` is the one in force, and whose ``revert()`` undoes it.

    Raises:
        TypeError: no transformers model with a loss function.
        ValueError: an unknown mode.
        RuntimeError: patched already; an output layer that cannot be fused (with the reason); or loss or gradients that
            differ or cannot be computed, by name and amount. The model is unchanged.

    Numerics:
        As the two functions: in half precision, factors and softcap are not rounded one by one as the model does it.

    Example:
        >>> import genloss_kernels as gk
        >>> handle = gk.integrations.transformers.patch(model, mode="fused")  # doctest: +SKIP
        >>> handle.revert()  # doctest: +SKIP
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES))}, got {mode!r}")
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not callable(getattr(model, "loss_function", None)) or not hasattr(model, "get_output_embeddings"):
        raise TypeError(
            f"model must be a transformers model with a loss_function, got {type(model).__qualname__}: pass the model "
            "itself, before it is wrapped for distribution or compiled"
        )
    if isinstance(model.loss_function, _LossFunction):
        raise RuntimeError(f"{type(model).__qualname__} is patched already: call model.loss_function.handle.revert() first")
    try:
        verification = Verification(model, heads.leaf(model.get_output_embeddings())) if verify else None
    except Refusal as error:
        raise RuntimeError(f"{type(model).__qualname__} is left as it was. mode={mode!r}: {error}") from error
    refused = []
    for attempt in ("fused", "logits") if mode == "auto" else (mode,):
        handle = PatchHandle(model, attempt)
        try:
            handle._apply()
            if verification is not None:
                verification.check(handle)
            return handle
        except BaseException as error:
            handle.revert()
            if not isinstance(error, Refusal):
                raise
            refused.append(f"mode={attempt!r}: {error}")
    raise RuntimeError(f"{type(model).__qualname__} is left as it was. " + "; ".join(refused))


class PatchHandle:
    """What :func:`patch` returns.

    Attributes:
        mode: ``"logits"`` or ``"fused"``.
        active: whether the patch is in force.
        demands: operations for which a fused forward had to compute the logits, since the last one began.
        losses: how many losses were computed in the patch's mode, outside ``torch.compile``.
    """

    def __init__(self, model: Any, mode: str) -> None:
        self.mode, self.active = mode, False
        self.demands: list[str] = []
        self.losses = 0
        self.deferring = False
        self._model = model
        self._forwards: list[_Forward] = []
        self._loss_function: _LossFunction | None = None

    def revert(self) -> None:
        """Undo the patch; does nothing the second time.

        What has been wrapped around a replacement since, as ``accelerate`` does with the forward, stays, and what it wraps
        passes calls through.
        """
        self.active = False
        for forward in self._forwards:
            forward.remove()
        if self._loss_function is not None:
            self._loss_function.remove()
        self._forwards, self._loss_function = [], None

    def _apply(self) -> None:
        if self.mode == "fused":
            head = heads.leaf(self._model.get_output_embeddings())
            reason = "it names no output layer" if head is None else heads.obstacle(head)
            if reason is None and "forward" in vars(head):
                reason = "the forward of its output layer has been replaced"
            if reason is not None:
                raise Refusal(reason)
            self._forwards = [_HeadForward(head, self), _ModelForward(self._model, self)]
        self._loss_function = _LossFunction(self._model, self)
        for replacement in (*self._forwards, self._loss_function):
            replacement.install()
        self.active = True


class _Forward:
    """Stands in an instance's ``forward``. An object, since a copy or pickle of a closure would go on with the original."""

    def __init__(self, module: Any, handle: PatchHandle) -> None:
        self.module, self.handle = module, handle
        self.previous = vars(module).get("forward")

    def install(self) -> None:
        self.module.forward = self

    def remove(self) -> None:
        if vars(self.module).get("forward") is not self:
            return
        if self.previous is None:
            del self.module.forward
        else:
            self.module.forward = self.previous

    def native(self, *args: Any, **kwargs: Any) -> Any:
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        # The class is looked up at each call: FSDP gives the instance another.
        return type(self.module).forward(self.module, *args, **kwargs)


class _HeadForward(_Forward):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 2 and isinstance(args[1], LossCall):
            return args[1].loss(self.module, args[0])
        # The adapters may have changed since the layer was patched.
        if self.handle.deferring and len(args) == 1 and not kwargs and heads.obstacle(self.module) is None:
            return DeferredLogits(self.module, self.logits, args[0], self.handle.demands.append)
        return self.native(*args, **kwargs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Through the layer's hooks, which gather its parameters."""
        deferring, self.handle.deferring = self.handle.deferring, False
        try:
            return self.module(hidden)
        finally:
            self.handle.deferring = deferring


class _ModelForward(_Forward):
    def __init__(self, module: Any, handle: PatchHandle) -> None:
        super().__init__(module, handle)
        signature = signature_of(module)
        self._labels = list(signature.parameters).index("labels") if "labels" in signature.parameters else None
        # Trainer and generate read which arguments the model takes.
        asked = inspect.Parameter("return_logits", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="bool | None")
        parameters = list(signature.parameters.values())
        at = next((i for i, p in enumerate(parameters) if p.kind == p.VAR_KEYWORD), len(parameters))
        self.__signature__ = signature.replace(parameters=[*parameters[:at], asked, *parameters[at:]])

    def __call__(self, *args: Any, return_logits: bool | None = None, **kwargs: Any) -> Any:
        handle = self.handle
        if args and args[0] is self.module:
            args = args[1:]  # accelerate binds what is left when it unwraps a model, as if it were a function
        labels = kwargs.get("labels")
        if labels is None and self._labels is not None and len(args) > self._labels:
            labels = args[self._labels]
        spare = self.module.training if return_logits is None else not return_logits
        if not (handle.active and spare and labels is not None):
            return self.native(*args, **kwargs)
        handle.demands.clear()
        handle.deferring = True
        try:
            output = self.native(*args, **kwargs)
        finally:
            handle.deferring = False
        return _without_deferred(output)


class _LossFunction:
    """Stands in ``model.loss_function``."""

    def __init__(self, model: Any, handle: PatchHandle) -> None:
        self.handle, self.native = handle, model.loss_function
        self._model = model
        # transformers keeps what is assigned to this property under another name.
        self._name = (
            "_loss_function" if isinstance(getattr(type(model), "loss_function", None), property) else "loss_function"
        )
        self._own = self._name in vars(model)

    def install(self) -> None:
        self._model.loss_function = self

    def remove(self) -> None:
        if vars(self._model).get(self._name) is not self:
            return
        if self._own:
            self._model.loss_function = self.native
        else:
            delattr(self._model, self._name)

    @functools.wraps(causal_lm_loss)
    def __call__(self, logits: Any, *args: Any, **kwargs: Any) -> Tensor:
        deferred = isinstance(logits, DeferredLogits)
        if not torch.compiler.is_compiling():  # which would compile again for each count
            self.handle.losses += deferred or self.handle.mode == "logits"
        if deferred:
            return logits.loss(*args, **kwargs)
        return (causal_lm_loss if self.handle.active else self.native)(logits, *args, **kwargs)


def _without_deferred(output: Any) -> Any:
    """``output`` with None for logits that do not exist, and those that had to be computed."""
    if isinstance(output, DeferredLogits):
        return output.computed()
    if type(output) is tuple:
        return tuple(_without_deferred(value) for value in output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        changed = {name: value.computed() for name, value in values.items() if isinstance(value, DeferredLogits)}
        return dataclasses.replace(output, **changed) if changed else output
    return output
