"""Proof that a patched model computes what it did: one tiny batch, natively and patched."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .loss import causal_lm_loss

if TYPE_CHECKING:
    from .patching import PatchHandle


class Refusal(RuntimeError):
    """A model of which a patch cannot be proven right."""


class _Precision(NamedTuple):
    """Relative errors that are allowed, of gradients by their norms, and the deviation to which logits are enlarged."""

    loss: float
    gradient: float
    enlarged: float


# Fresh weights make logits so small that a softcap would not show, hence the enlargement. In half precision transformers
# rounds the logits after every factor and after the softcap, and logits of 32 would leave the softmax to that rounding: with
# 4, tiny models with softcaps and factors show a tenth of what is allowed.
_SINGLE = _Precision(1e-4, 1e-4, 32.0)
_HALF = _Precision(2e-2, 1e-1, 4.0)

# No count of labels in the batch, as in a step that was cut into micro-batches.
_NUM_ITEMS = 29

_BATCH, _TOKENS = 2, 8


class _Case(NamedTuple):
    enlarged: bool
    arguments: dict[str, Any]


class _Observed(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor | None]


def signature_of(model: Any) -> inspect.Signature:
    """That of the model's own forward: what has been wrapped around the instance's may hide it."""
    return inspect.signature(type(model).forward.__get__(model))


class Verification:
    """Runs the model natively when it is made, and patched in :meth:`check`."""

    def __init__(self, model: Any, head: Any) -> None:
        self._model, self._head, self._native_loss = model, head, model.loss_function
        parameters = signature_of(model).parameters
        if "labels" not in parameters:
            raise Refusal(f"{type(model).__qualname__} takes no labels")
        self._inputs = _inputs(model)
        if "use_cache" in parameters:
            self._inputs["use_cache"] = False
        self._cases = [_Case(False, {}), _Case(True, {})]
        if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            self._cases.append(_Case(True, {"num_items_in_batch": _NUM_ITEMS}))
        half = any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters())
        self._precision, self._factor = _HALF if half else _SINGLE, 1.0
        self._native = [self._observe(case, measure=not case.enlarged) for case in self._cases]

    def check(self, handle: PatchHandle) -> None:
        """Raises :class:`Refusal` unless the patched model's loss and gradients are the native ones."""
        self._compare_loss_functions()
        for case, native in zip(self._cases, self._native, strict=True):
            handle.losses = 0
            patched = self._observe(case)
            if handle.demands:
                raise Refusal(
                    f"it does more to its logits than scale and cap them: {handle.demands[0]!r} needs them computed"
                )
            if not handle.losses:
                raise Refusal("it does not compute its loss by model.loss_function from the logits of its output layer")
            _compare(patched, native, self._precision, "with logits enlarged" if case.enlarged else "")

    def _compare_loss_functions(self) -> None:
        """On logits that no initialisation keeps small, and in float32 whatever the model is in."""
        ids = self._inputs["input_ids"]
        n_classes = getattr(self._head, "out_features", None) or self._model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(*ids.shape, n_classes, generator=generator).mul_(_SINGLE.enlarged).to(ids.device)
        for arguments in ({}, {"num_items_in_batch": _NUM_ITEMS}, {"shift_labels": self._inputs["labels"].roll(1, -1)}):
            ours, native = (
                _guarded(lambda f=f, a=arguments: self._loss_of(f, logits, n_classes, a))
                for f in (causal_lm_loss, self._native_loss)
            )
            _compare(ours, native, _SINGLE, f"between loss functions given {', '.join(arguments) or 'labels'}")

    def _loss_of(self, function: Any, logits: Tensor, n_classes: int, arguments: dict[str, Any]) -> _Observed:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = function(logits=leaf, labels=self._inputs["labels"], vocab_size=n_classes, **arguments)
            return _Observed(loss.detach(), {"the logits": torch.autograd.grad(loss, leaf)[0]})

    def _observe(self, case: _Case, *, measure: bool = False) -> _Observed:
        return _guarded(lambda: self._run(case, measure))

    def _run(self, case: _Case, measure: bool) -> _Observed:
        seen: list[Tensor] = []

        def enlarge(_: Any, args: tuple[Any, ...]) -> Any:
            if len(args) != 1:
                return None  # the second call of a fused layer, with the same input
            hidden = args[0] * (self._factor if case.enlarged else 1.0)
            seen.append(hidden if hidden.requires_grad else hidden.requires_grad_())
            return (hidden,)

        def remember_size(_: Any, args: Any, logits: Tensor) -> None:
            deviation = logits.detach().float().std().item()
            self._factor = self._precision.enlarged / deviation if 0.0 < deviation < float("inf") else 1.0

        with contextlib.ExitStack() as stack:
            stack.enter_context(_undisturbed(self._model))
            if self._head is not None:
                stack.callback(self._head.register_forward_pre_hook(enlarge).remove)
                if measure:
                    stack.callback(self._head.register_forward_hook(remember_size).remove)
            output = self._model(**self._inputs, **case.arguments)
            loss = output[0] if isinstance(output, tuple) else output.loss
            if loss is None:
                raise Refusal("its forward returns no loss for input_ids and labels")
            module = self._model.get_input_embeddings() if self._head is None else self._head
            of = {f"the output layer's input {i}": hidden for i, hidden in enumerate(seen)}
            of |= {name: p for name, p in module.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(loss, list(of.values()), allow_unused=True) if of and loss.requires_grad else ()
            return _Observed(loss.detach(), dict(zip(of, gradients, strict=False)))


def _compare(patched: _Observed, native: _Observed, precision: _Precision, where: str) -> None:
    allowed = {"loss": (patched.loss, native.loss, precision.loss)}
    if patched.gradients.keys() != native.gradients.keys():
        raise Refusal("its output layer is called otherwise than natively")
    for name, expected in native.gradients.items():
        actual = patched.gradients[name]
        if actual is not None and expected is not None:
            allowed[f"gradient of {name}"] = (actual, expected, precision.gradient)
        elif actual is not expected:
            raise Refusal(f"{name} has {'no' if actual is None else 'a'} gradient, unlike natively")
    for name, (actual, expected, relative) in allowed.items():
        difference = torch.linalg.vector_norm(actual.double() - expected.double()).item()
        size = torch.linalg.vector_norm(expected.double()).item()
        if not difference <= relative * size:
            raise Refusal(
                f"the {name} differs by {difference:.2g} of {size:.2g} {where}, where {relative:.0e} of it is allowed"
            )


def _guarded(run: Callable[[], _Observed]) -> _Observed:
    try:
        return run()
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(f"a batch of input_ids and labels fails with {type(error).__name__}: {error}") from error


def _inputs(model: Any) -> dict[str, Any]:
    """Token ids that mean nothing particular to the model, and labels some of which are ignored."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    if device.type == "meta":
        raise Refusal(f"the parameters of {type(model).__qualname__} are on the meta device: patch it when they are loaded")
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise Refusal(
            f"the parameters of {type(model).__qualname__} are sharded: patch it before, or with verify=False after another "
            "instance was proven right"
        )
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    special = {
        v for c in configs for k, v in vars(c).items() if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)
    }
    # The last of a padded vocabulary may be no labels.
    plain = [i for i in range(min(embeddings.num_embeddings // 2, 1000)) if i not in special]
    at = torch.randint(len(plain), (_BATCH, _TOKENS), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(plain)[at]
    labels = ids.clone()
    labels[0, :2] = labels[1, 4] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


@contextlib.contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Training mode with gradients; afterwards modes, buffers and random number generators are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    device = model.get_input_embeddings().weight.device
    devices = {p.device.index for p in model.parameters() if p.device.type == device.type and p.device.index is not None}
    on_cpu = device.type == "cpu"
    fork = torch.random.fork_rng([] if on_cpu else sorted(devices), device_type="cuda" if on_cpu else device.type)
    try:
        with fork, torch.enable_grad():
            model.train()
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            buffer.copy_(value)
