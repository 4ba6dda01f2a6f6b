"""Patched models as they are trained: adapters, accumulated gradients, Trainer, sharding, compilation."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.testing import assert_close

pytest.importorskip("transformers")

from .models import VOCABULARY, assert_steps_agree, batch, build, exact_loss, exact_step, step

patch = gk.integrations.transformers.patch

MODES = ("logits", "fused")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`is_gradient_checkpointing` is deprecated",  # peft reads it
        "`lora_bias=True` was passed but the targeted layer",  # it cannot be merged then, which nothing here does
        "Model has `tie_word_embeddings=True` and a tied layer",
        ".*torch.autograd.function.Function.* should not be instantiated",  # dynamo instantiates it
    )
]

# --- adapters ----------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "on the backbone": {"target_modules": ["q_proj"]},
    "on the output layer": {"target_modules": ["q_proj", "lm_head"]},
    "on the output layer alone": {"target_modules": ["lm_head"]},
    "with a bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "scaled by rank's root": {"target_modules": ["lm_head"], "use_rslora": True},
    "a copy of the output layer": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(adapter: dict[str, Any], name: str = "llama", **changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    # Fresh adapters are zero, and half of their gradients too.
    config = peft.LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, task_type="CAUSAL_LM", **adapter)
    return peft.get_peft_model(build(name, **changes), config).train()


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_adapters_learn_as_natively(name: str, mode: str) -> None:
    model = adapted(ADAPTERS[name])
    native, expected = step(model), exact_step_of_adapted(model)
    on_head = [key for key in native if "lm_head" in key]
    assert bool(on_head) == (name != "on the backbone")
    handle = patch(model, mode)
    assert handle.mode == ("logits" if mode == "logits" else "fused")
    assert_steps_agree(step(model), expected, native)
    assert handle.demands == []
    handle.revert()
    assert torch.equal(step(model)["loss"], native["loss"])


def exact_step_of_adapted(model: Any) -> dict[str, Tensor]:
    model = copy.deepcopy(model).double()
    model.get_base_model().loss_function = exact_loss
    return {name: value.double() for name, value in step(model).items()}


@pytest.mark.parametrize("mode", MODES)
def test_dropout_of_an_adapter_on_the_output_layer(mode: str) -> None:
    model = adapted({"target_modules": ["lm_head"], "lora_dropout": 0.5})

    def seeded(model: Any) -> dict[str, Tensor]:
        torch.manual_seed(3)
        return step(model)

    native = seeded(model)
    assert not torch.equal(native["loss"], step(model)["loss"])
    patch(model, mode)
    actual = seeded(model)
    assert actual.keys() == native.keys()
    for key, value in native.items():
        assert (actual[key] - value).norm() <= 1e-5 * value.norm()


def test_several_adapters_and_none() -> None:
    """Whichever are active at the time of the call: also merged into the weight, and switched off."""
    model = adapted({"target_modules": ["lm_head"]})
    model.add_adapter("other", copy.copy(model.peft_config["default"]))
    patched = copy.deepcopy(model)
    handle = patch(patched, "fused")

    def agree() -> float:
        loss = patched(**batch()).loss
        assert_close(loss, model(**batch()).loss.double(), model(**batch()).loss)
        return loss.item()

    losses = {agree()}
    for one in (model, patched):
        one.base_model.set_adapter(["default", "other"])
    losses.add(agree())
    for one in (model, patched):
        one.base_model.set_adapter("other")
    losses.add(agree())
    for one in (model, patched):
        one.merge_adapter()
    agree()
    for one in (model, patched):
        one.unmerge_adapter()
    with model.disable_adapter(), patched.disable_adapter():
        losses.add(agree())
    assert len(losses) == 4
    assert handle.losses > 0
    assert handle.demands == []


class Doubled(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


def test_adapter_of_another_kind_is_refused_not_frozen() -> None:
    model = adapted({"target_modules": ["lm_head"], "use_dora": True})
    with pytest.raises(RuntimeError, match="'default' on its output layer is a variant of LoRA, such as DoRA"):
        patch(model, "fused")
    native, handle = step(model), patch(model)
    assert handle.mode == "logits"
    actual = step(model)
    assert actual.keys() == native.keys()
    handle.revert()
    # Nor can the layer under an adapter be what is not known.
    model = adapted({"target_modules": ["lm_head"]})
    model.get_base_model().lm_head.base_layer.__class__ = Doubled
    with pytest.raises(RuntimeError, match="LoRA on its output layer is on Doubled, not on a plain linear layer"):
        patch(model, "fused")
    # One that comes later gives logits.
    model = adapted({"target_modules": ["lm_head"]})
    handle = patch(model, "fused")
    config = copy.copy(model.peft_config["default"])
    config.use_dora = True
    model.add_adapter("dora", config)
    model.set_adapter("dora")
    handle.losses = 0
    found = step(model)
    assert handle.losses == 0
    assert {key for key in found if "dora" in key}


def test_patch_while_adapters_are_off() -> None:
    """It is the layer then in use that is patched; the copy, when it is back, gives logits."""
    model = adapted({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(3.0)
    native = model(**batch()).loss
    with model.disable_adapter():
        expected = model(**batch()).loss
        patch(model, "fused")
        output = model(**batch())
        assert_close(output.loss, expected.double(), expected)
        assert output.logits is None
    assert_close(model(**batch()).loss, native.double(), native)


def test_adapter_on_a_tied_output_layer() -> None:
    model = adapted({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "llama tied")
    native, expected = step(model), exact_step_of_adapted(model)
    patch(model, "fused")
    assert_steps_agree(step(model), expected, native)


# --- accumulation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama tied", "gemma2"])
def test_micro_batches_add_up_to_the_batch(mode: str, name: str) -> None:
    """With unequal numbers of labels, and one micro-batch that has none."""
    model, whole = build(name), batch(8)
    whole["labels"][2:4] = -100
    whole["labels"][5, 2:] = -100
    count = (whole["labels"][:, 1:] != -100).sum()
    native, expected = step(model, **whole), exact_step(model, **whole)
    patch(model, mode)
    model.zero_grad()
    losses = []
    for start in range(0, 8, 2):
        part = {key: value[start : start + 2] for key, value in whole.items()}
        losses.append(model(**part, num_items_in_batch=count).loss)
        losses[-1].backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert_steps_agree({"loss": torch.stack(losses).sum(), **found}, expected, native)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.rows = batch(16)
        for row in range(16):
            self.rows["labels"][row, : row % 8] = -100

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index] for key, value in self.rows.items()}


def trained(model: Any, steps: int, mode: str | None) -> Tensor:
    """The parameters after two optimizer steps of eight rows each."""
    from transformers import Trainer, TrainingArguments

    if mode is not None:
        patch(model, mode)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps, max_steps=2, report_to=[],
            max_grad_norm=0.0, lr_scheduler_type="constant", save_strategy="no", use_cpu=True, disable_tqdm=True,
            logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        Trainer(model, arguments, train_dataset=Rows(), optimizers=(optimizer, None)).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_trainer_with_one_and_four_accumulation_steps() -> None:
    pytest.importorskip("accelerate")
    expected = trained(build("qwen2_moe", router_aux_loss_coef=0.0).double(), 1, None).double()
    native = {steps: trained(build("qwen2_moe", router_aux_loss_coef=0.0), steps, None) for steps in (1, 4)}
    for mode in MODES:
        for steps in (1, 4):
            actual = trained(build("qwen2_moe", router_aux_loss_coef=0.0), steps, mode)
            assert_close(actual, expected, native[steps], f"parameters after {steps} accumulation steps")


def test_accelerate_wraps_and_unwraps() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build("gemma2")
    handle = patch(model, "fused")
    expected = model(**batch()).loss
    accelerate.state.AcceleratorState._reset_state(True)  # one for a process, and Trainer makes one
    try:
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        prepared = accelerator.prepare(model)
        output = prepared(**batch())
        assert output.logits is None
        assert abs(output.loss / expected - 1.0) < 1e-3
        assert not torch.equal(output.loss, expected)
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    again = unwrapped(batch()["input_ids"], labels=batch()["labels"])
    assert torch.equal(again.loss, expected)
    assert again.logits is None
    handle.revert()
    assert unwrapped(**batch()).logits is not None


# --- sharding, compilation, checkpointing --------------------------------------------------------------------------------


def _sharded_model(rank: int, folder: str, own_group: bool, tied: bool, **options_of_head: Any) -> Any:
    """Patched first, then sharded over two ranks."""
    from torch.distributed import device_mesh, init_process_group
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = build("llama tied" if tied else "llama")
    patch(model, "fused")
    mesh = device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if own_group:
        fully_shard(model.lm_head, mesh=mesh, **options_of_head)
    return fully_shard(model, mesh=mesh)


def _share(rank: int) -> dict[str, Tensor]:
    return {key: value[2 * rank : 2 * rank + 2] for key, value in batch(4).items()}


def _sharded_step(rank: int, folder: str, own_group: bool, tied: bool) -> None:
    model = _sharded_model(rank, folder, own_group, tied)
    output = model(**_share(rank))
    assert output.logits is None
    output.loss.backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    torch.save({"loss": output.loss.detach(), **found}, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("own_group", "tied"), [(False, False), (True, False), (False, True)])
def test_two_ranks_of_fsdp2(own_group: bool, tied: bool, tmp_path: Path) -> None:
    """Whose gradient was off by 100% where a loss read the weight outside the layer's forward."""
    torch.multiprocessing.spawn(_sharded_step, (str(tmp_path), own_group, tied), nprocs=2)
    model = build("llama tied" if tied else "llama")
    native, expected = ([run(model, **_share(rank)) for rank in range(2)] for run in (step, exact_step))
    for rank in range(2):
        # Gradients are averaged over the ranks, the loss is each rank's own.
        of_ranks = [
            {key: (one[key] + other[key]) / 2 for key in one} | {"loss": (one, other)[rank]["loss"]}
            for one, other in (expected, native)
        ]
        assert_steps_agree(torch.load(tmp_path / str(rank)), *of_ranks)


def _mixed_step(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = _sharded_model(rank, folder, True, False, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    losses = [model(**_share(rank), num_items_in_batch=torch.tensor(count)).loss for count in (1.0, 4099.0)]
    torch.save(torch.stack(losses).detach(), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_divisor_under_fsdps_mixed_precision(tmp_path: Path) -> None:
    """Which casts the arguments of the output layer, but must not the count: in bfloat16 4099 would be 4096."""
    torch.multiprocessing.spawn(_mixed_step, (str(tmp_path),), nprocs=2)
    undivided, divided = torch.load(tmp_path / "0")
    assert undivided.dtype == torch.float32
    assert_close(divided, undivided.double() / 4099.0)


def test_sharded_weight_outside_its_module_is_refused() -> None:
    """Instead of a gradient of one rank's part. An empty weight, as ZeRO leaves it, too."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor

    model = build("llama")
    patch(model, "fused")
    whole = model.lm_head.weight
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        model.lm_head.weight = torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [Replicate()]))
        with pytest.raises(RuntimeError, match="weight is sharded where the loss needs it whole"):
            model(**batch())
        model.loss_function.handle.revert()
        with pytest.raises(RuntimeError, match="are sharded: patch it before"):
            patch(model)
        patch(model, "fused", verify=False)
    finally:
        destroy_process_group()
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(RuntimeError, match="is empty: if its parameters are sharded, gather them"):
        model(**batch())


def test_weight_gathered_by_the_layers_hooks() -> None:
    """As ZeRO-3 does: outside the layer's call the parameter is empty."""
    model = build("llama")
    native, expected = step(model), exact_step(model)
    patch(model, "fused")
    head, whole = model.lm_head, model.lm_head.weight.data
    empty = whole.new_empty(0)

    def gather(module: Any, args: Any) -> None:
        module.weight.data = whole

    def release(module: Any, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda _: gather(module, None))
        module.weight.data = empty

    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    head.weight.data = empty
    assert_steps_agree(step(model), expected, native)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_without_a_break(name: str) -> None:
    model = build(name)
    expected, native = exact_step(model), step(model)
    patch(model, "fused")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert compiled(**batch()).logits is None
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = {key.removeprefix("_orig_mod."): value for key, value in step(compiled).items()}
        assert_steps_agree(actual, expected, native)
        step(compiled)


@pytest.mark.parametrize("mode", MODES)
def test_checkpointed_activations(mode: str) -> None:
    model = build("llama tied")
    native, expected = step(model), exact_step(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # the name of before
    patch(model, mode)
    assert_steps_agree(step(model), expected, native)


def test_training_goes_the_same_way() -> None:
    """Twenty steps of AdamW; the patch is undone halfway."""
    curves = []
    for mode in (None, "fused"):
        model = build("gemma2", final_logit_softcapping=30.0)
        handle = None if mode is None else patch(model, mode)
        optimizer, curve = torch.optim.AdamW(model.parameters(), lr=1e-2), []
        for i in range(20):
            if handle is not None and i == 10:
                handle.revert()
            loss = model(**batch()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    assert curves[0][-1] < 0.5 * curves[0][0]
    assert (curves[1] - curves[0]).abs().max() < 1e-3
    assert model.lm_head.out_features == VOCABULARY
