"""The loss of causal language models, and the patch, beside transformers' own."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import genloss_kernels as gk
from genloss_kernels.testing import assert_close

pytest.importorskip("transformers")

from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from transformers.modeling_outputs import CausalLMOutputWithPast

from .models import CONFIGS, VOCABULARY, assert_steps_agree, batch, build, exact_loss, exact_step, step

causal_lm_loss = gk.integrations.transformers.causal_lm_loss
patch = gk.integrations.transformers.patch

MODES = ("logits", "fused")


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_the_native_ones(name: str) -> None:
    """With a count of labels that is not the batch's, and reverting leaves no trace."""
    model, arguments = build(name), {"num_items_in_batch": torch.tensor(23)}
    expected, native = exact_step(model, **arguments), step(model, **arguments)
    before = [vars(m).copy() for m in (model, model.get_output_embeddings())]
    for mode in MODES:
        handle = patch(model, mode)
        assert handle.mode == mode
        handle.losses = 0
        assert_steps_agree(step(model, **arguments), expected, native)
        assert (handle.losses, handle.demands) == (1, [])
        handle.revert()
        assert [vars(m) for m in (model, model.get_output_embeddings())] == before
    again = step(model, **arguments)
    assert all(torch.equal(again[name], native[name]) for name in native)


# --- the loss function ------------------------------------------------------------------------------------------------


def loss_and_gradient(function: Callable[..., Tensor], logits: Tensor, *args: Any, **arguments: Any) -> list[Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, *args, **arguments).reshape(())
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 9, VOCABULARY),
    "one sequence": lambda: torch.randn(9, VOCABULARY),
    "three leading dimensions": lambda: torch.randn(2, 3, 9, VOCABULARY),
    "slice of a longer sequence": lambda: torch.randn(2, 12, VOCABULARY)[:, 2:11],
    "slice of a padded vocabulary": lambda: torch.randn(2, 9, 128)[..., :VOCABULARY],
    "classes before tokens": lambda: torch.randn(2, VOCABULARY, 9).transpose(1, 2),
    "empty batch": lambda: torch.randn(0, 9, VOCABULARY),
}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "mean": {},
    "number of items": {"num_items_in_batch": 23},
    "items as a tensor": {"num_items_in_batch": torch.tensor(23)},
    "items of DataParallel": {"num_items_in_batch": torch.tensor([23])},
    "items counted by halves": {"num_items_in_batch": 11.5},
    "another ignored label": {"ignore_index": 7},
    "keywords of others": {"num_items_in_batch": 23, "output_router_logits": True, "cu_seq_lens_q": None},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_loss_function_is_the_definition(layout: str, arguments: str) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    logits, chosen = LAYOUTS[layout](), ARGUMENTS[arguments]
    labels = torch.randint(VOCABULARY, logits.shape[:-1])
    labels[..., ::4] = chosen.get("ignore_index", -100)
    kept = logits.clone()
    actual = loss_and_gradient(causal_lm_loss, logits, labels, VOCABULARY, **chosen)
    expected = loss_and_gradient(exact_loss, logits.double(), labels, **chosen)
    native = loss_and_gradient(ForCausalLMLoss, logits.contiguous(), labels, VOCABULARY, **chosen)
    for name, *values in zip(("loss", "gradient"), actual, expected, native, strict=True):
        assert_close(*values, name=name)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_not_copied(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, read = LAYOUTS[layout](), []
    monkeypatch.setattr(gk.functional, "cross_entropy", lambda input, *args, **kwargs: read.append(input))
    causal_lm_loss(logits, torch.zeros(logits.shape[:-1], dtype=torch.int64))
    assert read[0].untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()


def test_arguments_come_in_the_order_of_transformers() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    def names(function: Any) -> list[str]:
        return [*inspect.signature(function).parameters]

    assert names(causal_lm_loss) == names(ForCausalLMLoss)


def test_labels_that_are_shifted_already() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, VOCABULARY), torch.randint(VOCABULARY, (2, 5))
    expected = causal_lm_loss(logits, labels)
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    assert torch.equal(causal_lm_loss(logits, None, shift_labels=shifted), expected)
    assert torch.equal(causal_lm_loss(logits, labels.flip(0), VOCABULARY, None, -100, shifted), expected)
    assert torch.equal(causal_lm_loss(logits, None, shift_labels=shifted.flatten()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_precision_is_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 9, VOCABULARY, dtype=dtype), torch.randint(VOCABULARY, (2, 9))
    loss, gradient = loss_and_gradient(causal_lm_loss, logits, labels)
    expected, expected_gradient = loss_and_gradient(exact_loss, logits.double(), labels)
    assert loss.dtype == torch.float32
    assert_close(loss, expected)
    assert gradient.dtype == dtype
    assert_close(gradient, expected_gradient)


def test_nothing_but_ignored_labels() -> None:
    """As torch: no mean of nothing, and nothing to add to the sum over the other micro-batches."""
    logits, labels = torch.randn(2, 5, VOCABULARY), torch.full((2, 5), -100)
    assert causal_lm_loss(logits, labels).isnan()
    loss, gradient = loss_and_gradient(causal_lm_loss, logits, labels, num_items_in_batch=3)
    assert loss == 0.0
    assert not gradient.any()
    assert causal_lm_loss(logits, labels, num_items_in_batch=0).isnan()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": [1, 2]}, TypeError, "labels must be a Tensor, not list"),
        ({"logits": 5}, TypeError, "logits must be a Tensor, not int"),
        ({"num_items_in_batch": torch.ones(2)}, ValueError, "num_items_in_batch must hold one number"),
        ({"labels": None}, TypeError, "labels or shift_labels"),
        ({"labels": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"shape \[2, 5\]"),
        ({"labels": None, "shift_labels": torch.zeros(9, dtype=torch.int64)}, ValueError, r"shape \[2, 5\]"),
        ({"labels": torch.zeros(2, 5, dtype=torch.int64), "vocab_size": 10}, ValueError, "11 classes"),
        ({"labels": torch.full((2, 5), 11)}, IndexError, "11"),
    ],
)
def test_bad_input_to_the_loss_function(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        causal_lm_loss(**{"logits": torch.zeros(2, 5, 11), "labels": torch.zeros(2, 5, dtype=torch.int64)} | arguments)


# --- what the model does to its logits --------------------------------------------------------------------------------


class Transformed(LlamaForCausalLM):
    """Does something to its logits that no configuration tells."""

    transform: Any = None

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.transform(self.lm_head(self.model(input_ids=input_ids).last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def transformed(transform: Callable[[Any], Any], **changes: Any) -> Any:
    model = build("llama", **changes)
    model.__class__, model.transform = Transformed, transform
    return model


def cap_in_place(logits: Any) -> Any:
    logits /= 0.2
    return torch.tanh(logits) * 0.2


RECORDED: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda x: x,
    "factor": lambda x: x * 3.0,
    "factor from the left": lambda x: 3 * x,
    "divisor": lambda x: x / 0.25,
    "factors": lambda x: 2.0 * (x / 0.5) * 3,
    "torch.mul": lambda x: torch.mul(x, 3.0),
    "torch.div": lambda x: torch.div(x, 0.25),
    "softcap": lambda x: 0.2 * torch.tanh(x / 0.2),
    "softcap in place": cap_in_place,
    "softcap by method, after a factor": lambda x: (x * 4.0 / 0.5).tanh() * 0.5,
    "softcap by functional, scaled afterwards": lambda x: torch.nn.functional.tanh(x / 0.2) * 0.2 * 3.0,
    "softcap without its inner factor": lambda x: x.tanh() * 5.0,
    "casts": lambda x: x.float().to(torch.float32).to(x.device).contiguous(),
    "fewer classes": lambda x: x[..., :90],
    "fewer classes twice, then a factor": lambda x: x[..., :95][..., :90] * 2.0,
    "more classes than there are": lambda x: x[..., :1000],
}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_done_to_the_logits_is_part_of_the_fused_loss(name: str, bias: bool) -> None:
    model = transformed(RECORDED[name])
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1.0, 1.0, VOCABULARY))
    inputs = {"labels": batch()["labels"].clamp(max=89)}
    native, expected = step(model, **inputs), exact_step(model, **inputs)
    # In float32: the inner factors and the cap are rounded once each, natively and by us.
    handle = patch(model, "fused")
    assert_steps_agree(step(model, **inputs), expected, native)
    assert handle.demands == []


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "sum": lambda x: x + 0.01 * torch.arange(x.shape[-1]),
    "sum from the left": lambda x: 1.0 - x,
    "other tensor": lambda x: torch.ones(x.size(-1)) * x,
    "factor that learns": lambda x: x * torch.ones((), requires_grad=True),
    "negative factor": lambda x: x * -1.0,
    "factor of zero": lambda x: x * 0.0,
    "negative divisor": lambda x: x / -1.0,
    "tanh of tanh": lambda x: torch.tanh(torch.tanh(x)),
    "method": lambda x: x.clamp(-0.1, 0.1),
    "function": torch.relu,
    "function of a list": lambda x: torch.cat([x[..., :50], x[..., 50:]], -1),
    "power": lambda x: x**3,
    "in place": lambda x: x.add_(1.0),
    "item": lambda x: x.__setitem__((..., 3), 0.5) or x,
    "not the first classes": lambda x: x[..., 1:],
    "classes from the middle": lambda x: x[..., 1:90],
    "every other class": lambda x: x[..., :100:2],
    "all but the last class": lambda x: x[..., :-1],
    "indexing": lambda x: x[:, :, :90],
    "float64": lambda x: x.to(torch.float64),
    "look at the values": lambda x: x * (2.0 if (x > 0).any() else 3.0),
    "softcap and then more": lambda x: torch.tanh(x / 0.2) * 0.2 + 1.0,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_anything_else_computes_the_logits(name: str) -> None:
    """Which ``fused`` refuses and ``auto`` finds out; without verification the numbers are right all the same."""
    model = transformed(COMPUTED[name])
    model.loss_function = causal_lm_loss
    inputs = {"labels": batch()["labels"].clamp(max=40)}
    native, expected, before = step(model, **inputs), exact_step(model, **inputs), vars(model).copy()
    with pytest.raises(RuntimeError, match="does more to its logits"):
        patch(model, "fused")
    assert vars(model) == before
    handle = patch(model, "auto")
    assert handle.mode == "logits"
    handle.revert()
    handle = patch(model, "fused", verify=False)
    assert_steps_agree(step(model, **inputs), expected, native)
    demands = handle.demands.copy()
    assert demands
    model(**batch() | inputs)
    assert handle.demands == demands
    assert model(**batch() | inputs).logits.shape == model(**batch() | inputs, return_logits=True).logits.shape


def test_stand_in_answers_what_needs_no_values() -> None:
    seen: list[Any] = []

    def look(logits: Any) -> Any:
        seen.append(
            (
                logits.shape,
                logits.size(),
                logits.size(-1),
                logits.dim(),
                logits.dtype,
                logits.device,
                logits[..., :999].shape,
            )
        )
        return logits

    model = transformed(look)
    model(**batch())
    handle = patch(model, "fused")
    model(**batch())
    assert seen[-1] == seen[0]
    assert handle.demands == []


# --- refusals ---------------------------------------------------------------------------------------------------------


def native_loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, **kwargs)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "softcap too large to show in fresh logits": lambda logits, **k: native_loss(1e3 * torch.tanh(logits / 1e3), **k),
    "factor": lambda logits, **k: native_loss(logits * 1.01, **k),
    "z-loss": lambda logits, **k: native_loss(logits, **k) + 1e-4 * logits.logsumexp(-1).square().mean(),
    "no shift": lambda logits, **k: native_loss(logits, **{"shift_labels": k["labels"]} | k),
    "gradient alone": lambda logits, **k: native_loss(logits, **k) + 0.1 * (logits.sum() - logits.sum().detach()),
    "count ignored": lambda *a, **k: native_loss(*a, **k | {"num_items_in_batch": None}),
    "shift_labels ignored": lambda *a, **k: native_loss(*a, **k | {"shift_labels": None}),
    "error": lambda logits, **k: native_loss(logits, **k) + torch.ones(3)[5],
}


def refused(model: Any, mode: str, message: str) -> None:
    modules = [*model.modules()]
    before, hooks = [vars(m).copy() for m in modules], [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules]
    with pytest.raises(RuntimeError, match=message) as found:
        patch(model, mode)
    assert f"{type(model).__name__} is left as it was" in str(found.value)
    assert f"mode={mode!r}" in str(found.value) or mode == "auto"
    assert [vars(m) for m in modules] == before
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules] == hooks


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_model_with_another_loss_is_refused(name: str, mode: str) -> None:
    model = build("llama")
    model.loss_function = LOSSES[name]
    refused(model, mode, "fails with IndexError" if name == "error" else "loss differs|gradient of the logits differs")


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_model_that_classifies_sequences_is_refused(mode: str) -> None:
    refused(
        LlamaForSequenceClassification(build("llama").config), mode, f"mode={mode!r}: a batch of input_ids and labels fails"
    )


class CapsInside(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 30.0 * torch.tanh(super().forward(input) / 30.0)


def capped_head(model: Any) -> None:
    model.lm_head.__class__ = CapsInside


def replaced_forward(model: Any) -> None:
    model.lm_head.forward = lambda x: torch.nn.functional.linear(x, model.lm_head.weight) * 1.5


def output_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)


def capping_hook(model: Any) -> None:
    """Of tensors alone, so that the stand-in does not see it; fresh logits are too small for it to show."""

    def cap(module: Any, args: Any, output: Any) -> Any:
        return 30.0 * torch.tanh(output / 30.0) if isinstance(output, Tensor) and output.dim() else output

    model.lm_head.register_forward_hook(cap)


def input_hook(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))


def own_loss(model: Any) -> None:
    model.__class__ = ComputesItself


class ComputesItself(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize(
    ("change", "fused", "logits"),
    [
        (capped_head, "CapsInside, not a linear layer", None),
        (replaced_forward, "forward of its output layer has been replaced", None),
        (output_hook, "a hook changes the output", None),
        (capping_hook, "differs by .* with logits enlarged", None),
        (input_hook, "a hook changes the input", None),
        (own_loss, "does more to its logits", "does not compute its loss by model.loss_function"),
    ],
)
def test_model_that_cannot_be_proven_equal_is_refused(change: Callable[..., None], fused: str, logits: str | None) -> None:
    model = build("llama")
    change(model)
    refused(model, "fused", fused)
    if logits is None:
        assert patch(model, "auto").mode == "logits"
    else:
        refused(model, "logits", logits)
        refused(model, "auto", f"(?s){fused}.*{logits}")


def doubling_hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output.mul_(2.0) if output.dim() == 0 else None)


@pytest.mark.parametrize("hook", [output_hook, doubling_hook, input_hook])
def test_known_failure_hook_on_the_output_layer_of_a_patched_model(hook: Callable[..., None]) -> None:
    """It would act on the loss, where it used to act on the logits."""
    model = build("llama").train()
    patch(model, "fused")
    hook(model)
    tokens = torch.randint(model.config.vocab_size, (1, 8))
    with pytest.raises(RuntimeError, match=r"a hook changes the (in|out)put of the output layer, which only mode='logits'"):
        model(input_ids=tokens, labels=tokens)


def test_models_of_transformers_that_do_more_to_their_logits() -> None:
    bart = build("bart")
    refused(bart, "fused", "needs them computed")
    refused(bart, "auto", "does not compute its loss by model.loss_function")


def test_bad_arguments_of_patch() -> None:
    with pytest.raises(ValueError, match="mode must be one of 'logits', 'fused', 'auto', got 'fast'"):
        patch(build("llama"), "fast")
    with pytest.raises(TypeError, match="transformers model with a loss_function, got Linear"):
        patch(torch.nn.Linear(2, 2))
    model = build("llama")
    patch(model)
    with pytest.raises(RuntimeError, match=r"patched already: call model\.loss_function\.handle\.revert"):
        patch(model)
    with pytest.raises(RuntimeError, match="meta device"):
        patch(build("llama").to("meta"))


# --- logits on demand, and everything else that a forward takes and gives -----------------------------------------------


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made, views aside."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        made = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *(t.untyped_storage().nbytes() // t.element_size() for t in made)])
        return result


def test_logits_of_the_batch_never_exist() -> None:
    model, inputs = build("gemma2", vocab_size=1000), batch(40, 32)
    with Largest() as native:
        model(**inputs).loss.backward()
    assert native.largest == 40 * 32 * 1000
    patch(model, "fused")
    with Largest() as fused:
        model(**inputs).loss.backward()
    assert fused.largest <= 256 * 1000


def test_logits_are_there_on_demand() -> None:
    model, inputs = build("gemma2"), batch()
    ids = inputs["input_ids"]
    expected = model(**inputs).logits
    patch(model, "fused")
    assert model(**inputs).logits is None
    assert "logits" not in model(**inputs)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(model(**inputs, return_logits=True).logits, expected)
    loss, logits, *_ = model(**inputs, return_dict=False)
    assert loss.requires_grad
    assert logits is None
    assert model(ids, labels=ids).logits is None
    labels_at = [*inspect.signature(model.forward).parameters].index("labels")
    assert model(ids, *[None] * (labels_at - 1), ids).logits is None
    model.eval()
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model(**inputs, return_logits=None).logits, expected)
    spared = model(**inputs, return_logits=False)
    assert spared.logits is None
    assert_close(spared.loss, exact_loss(expected.double(), inputs["labels"]))
    assert torch.equal(model.lm_head(torch.ones(1, 32)), torch.nn.functional.linear(torch.ones(1, 32), model.lm_head.weight))


def test_other_arguments_pass_through() -> None:
    """Masks, hidden states, the experts' auxiliary loss, and what only a loss of another kind would read."""
    model = build("mixtral")
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    arguments = {"attention_mask": mask, "output_hidden_states": True, "output_router_logits": False, "use_cache": True}
    native, whole = model(**batch(), **arguments), model(**batch())
    patch(model, "fused")
    fused = model(**batch(), **arguments)
    assert fused.keys() == native.keys() - {"logits"}
    assert all(torch.equal(a, b) for a, b in zip(fused.hidden_states, native.hidden_states, strict=True))
    assert fused.aux_loss is None
    assert_close(fused.loss, native.loss.double(), native.loss)
    again = model(**batch())
    assert torch.equal(again.aux_loss, whole.aux_loss)
    assert again.loss > fused.loss + 0.1


def test_arguments_that_trainer_and_generate_look_for() -> None:
    model = build("llama")
    native = list(inspect.signature(model.forward).parameters)
    patch(model, "fused")
    assert list(inspect.signature(model.forward).parameters) == [*native[:-1], "return_logits", native[-1]]
    ids = batch()["input_ids"]
    generated = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > ids.shape[1]


@pytest.mark.parametrize("mode", MODES)
def test_shift_labels_of_the_caller(mode: str) -> None:
    """As context parallelism hands them in: ``labels`` ask for a loss, ``shift_labels`` are read."""
    model, inputs = build("cohere"), batch()
    arguments = {"labels": inputs["labels"].flip(1), "shift_labels": inputs["labels"], "num_items_in_batch": 5}
    native, expected = step(model, **arguments), exact_step(model, **arguments)
    patch(model, mode)
    assert_steps_agree(step(model, **arguments), expected, native)


@pytest.mark.parametrize("mode", MODES)
def test_ignored_label_of_the_caller(mode: str) -> None:
    model = build("llama")
    arguments = {"labels": batch()["labels"].masked_fill(batch()["labels"] < 50, 7), "ignore_index": 7}
    native, expected = step(model, **arguments), exact_step(model, **arguments)
    patch(model, mode)
    assert_steps_agree(step(model, **arguments), expected, native)


@pytest.mark.parametrize("mode", MODES)
def test_batch_without_a_label(mode: str) -> None:
    model = build("granite")
    patch(model, mode)
    labels = torch.full((2, 9), -100)
    assert model(**batch() | {"labels": labels}).loss.isnan()
    found = step(model, labels=labels, num_items_in_batch=torch.tensor(4))
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["gemma2", "cohere", "llama tied"])
def test_model_in_bfloat16(mode: str, name: str) -> None:
    model = build(name).bfloat16()
    native, expected = step(model), exact_step(model)
    patch(model, mode)
    actual = step(model)
    assert actual["loss"].dtype == torch.float32
    # Native logits that happen to round well must not judge it.
    actual["loss"] = actual["loss"].bfloat16()
    assert_steps_agree(actual, expected, native)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: str) -> None:
    model = build("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        native = model(**batch()).loss
    patch(model, mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch()).loss
    assert loss.dtype == torch.float32
    assert_close(loss, native.double(), native)


# --- one model, and no trace --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_only_this_instance_changes(mode: str) -> None:
    model, other = build("llama"), build("llama")
    classes = [(m, dict(vars(m))) for m in (type(model), type(model.lm_head), *type(model).__mro__)]
    patch(model, mode)
    assert all(dict(vars(m)) == before for m, before in classes)
    assert other(**batch()).logits is not None
    assert not hasattr(other.loss_function, "handle")


@pytest.mark.parametrize("mode", MODES)
def test_patching_disturbs_nothing(mode: str) -> None:
    model = build("gpt2", attn_pdrop=0.1, resid_pdrop=0.1)
    model.transformer.h[0].eval()
    model.register_buffer("counter", torch.zeros(()))
    model.transformer.register_forward_pre_hook(lambda module, args: model.counter.add_(1.0) and None)
    step(model)
    with torch.no_grad():
        ran = int(model.counter)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        copies = {name: g.clone() for name, g in gradients.items()}
        modes, state = {m: m.training for m in model.modules()}, {k: v.clone() for k, v in model.state_dict().items()}
        generator = torch.get_rng_state()
        handle = patch(model, mode)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), generator)
    assert {m: m.training for m in model.modules()} == modes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert all(torch.equal(p.grad, copies[name]) for name, p in model.named_parameters())
    handle.revert()
    assert int(model.counter) == ran


def test_own_loss_function_and_forward_come_back() -> None:
    model = build("llama")
    own, calls = causal_lm_loss, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return type(model).forward(model, *args, **kwargs)

    model.loss_function, model.forward = own, forward
    handle = patch(model, "fused")
    calls.clear()
    assert model(**batch()).logits is None
    assert calls
    assert "return_logits" not in calls[0]
    handle.revert()
    assert (model.loss_function, model.forward) == (own, forward)
    handle.revert()
    assert model(**batch()).logits is not None


def test_revert_under_what_was_wrapped_around() -> None:
    """accelerate wraps the forward that it finds, and the loss may be wrapped too: both stay, and ours passes calls on."""
    model, calls = build("gemma2"), []
    model.loss_function = lambda *args, **kwargs: calls.append(args) or native_loss(*args, **kwargs)
    native = model(**batch())
    handle = patch(model, "fused")
    wrapped = [functools.partial(f) for f in (model.forward, model.lm_head.forward, model.loss_function)]
    model.forward, model.lm_head.forward, model.loss_function = wrapped
    assert model(**batch()).logits is None
    handle.revert()
    assert [model.forward, model.lm_head.forward, model.loss_function] == wrapped
    calls.clear()
    after = model(**batch())
    assert len(calls) == 1
    assert torch.equal(after.loss, native.loss)
    assert torch.equal(after.logits, native.logits)


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch])
def test_copies_compute_with_their_own_weights(mode: str, duplicate: Callable[[Any], Any]) -> None:
    model = build("llama")
    patch(model, mode)
    before = model(**batch()).loss
    other = duplicate(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(30.0)
    native = copy.deepcopy(other)
    native.loss_function.handle.revert()
    assert_close(other(**batch()).loss, native(**batch()).loss.double())
    assert (other(**batch()).logits is None) == (mode == "fused")
    assert not torch.equal(other(**batch()).loss, before)
    assert torch.equal(model(**batch()).loss, before)
    assert native(**batch()).logits is not None


def test_checkpoints_are_those_of_the_model(tmp_path: Any) -> None:
    model = build("llama tied")
    keys, described = list(model.state_dict()), repr(model)
    patch(model, "fused")
    assert list(model.state_dict()) == keys
    assert repr(model) == described
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_close(loaded.train()(**batch()).loss, model(**batch()).loss.double())
    assert loaded(**batch()).logits is not None
    model.load_state_dict(build("llama tied", tie_word_embeddings=True).state_dict())


def test_resized_embeddings() -> None:
    """A new output layer is not patched, and gives logits, of which the loss is right."""
    model = build("llama")
    patch(model, "fused")
    model.resize_token_embeddings(128, mean_resizing=False)
    output = model(**batch())
    assert_close(output.loss, exact_loss(model(batch()["input_ids"]).logits.double(), batch()["labels"]))
