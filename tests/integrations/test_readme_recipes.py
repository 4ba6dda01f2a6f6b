"""The README's recipes for training libraries run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.testing import assert_close

pytest.importorskip("transformers")

from .models import VOCABULARY, batch, build, exact_loss

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`gradient_checkpointing` is deprecated",  # TRL sets it
        ".isinstance\\(treespec, LeafSpec\\). is deprecated",  # lightning asks it
    )
]

README = (Path(__file__).parents[2] / "README.md").read_text()


def recipes() -> dict[str, str]:
    """The blocks of code under "Hugging Face", by the bold words that introduce them."""
    section = README.partition("## Hugging Face\n")[2].partition("\n## ")[0]
    found, title = {}, "patch"
    for part in re.split(r"^(\*\*[^*]+\*\*|```python\n.*?```)", section, flags=re.DOTALL | re.MULTILINE):
        if part.startswith("**"):
            title = part.strip("*")
        elif part.startswith("```"):
            found[title] = part.removeprefix("```python\n").removesuffix("```")
    return found


RECIPES = recipes()


def run(title: str, **names: Any) -> dict[str, Any]:
    namespace = {"gk": gk, "torch": torch, **names}
    exec(compile(RECIPES[title], f"README.md, {title}", "exec"), namespace)
    return namespace


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    whole = batch(count)
    return [{key: value[i] for key, value in whole.items()} for i in range(count)]


def fall(model: Any, before: float) -> float:
    """How far training brought the loss down."""
    return before - model.train()(**batch()).loss.item()


def test_every_recipe_is_run() -> None:
    tested = {
        "patch", "Trainer", "Any trainer that uses `model.loss_function`", "TRL", "TRL by `compute_loss_func`", "Lightning",
        "torchtitan style", "A plain loop with FSDP2",
    }  # fmt: skip
    assert set(RECIPES) == tested


def test_patch() -> None:
    model = build("llama")
    handle = run("patch", model=model)["handle"]
    assert (handle.mode, handle.active) == ("fused", False)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    pytest.importorskip("accelerate")
    return {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 10,
        "learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "logging_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False, "bf16": False,
    }  # fmt: skip


def test_trainer(options: dict[str, Any]) -> None:
    from transformers import TrainingArguments

    model = build("llama")
    before = model(**batch()).loss.item()
    run("Trainer", model=model, arguments=TrainingArguments(**options), dataset=rows())
    assert fall(model, before) > 0.3
    assert model.loss_function.handle.mode == "fused"


def test_loss_function() -> None:
    model = build("llama")
    expected = model(**batch()).loss
    run("Any trainer that uses `model.loss_function`", model=model)
    assert_close(model(**batch()).loss, expected.double(), expected)
    assert model.loss_function is gk.integrations.transformers.causal_lm_loss


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), pad_token="w0", eos_token="w2"
    )


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
@pytest.mark.parametrize("title", ["TRL", "TRL by `compute_loss_func`"])
def test_trl(title: str, options: dict[str, Any]) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in rows()])
    model = build("llama")
    before = model(**batch()).loss.item()
    run(title, model=model, arguments=trl.SFTConfig(**options), dataset=dataset, tokenizer=tokenizer())
    assert fall(model, before) > 0.3
    assert hasattr(model.loss_function, "handle") == (title == "TRL")


def test_lightning() -> None:
    lightning = pytest.importorskip("lightning")
    model = build("llama")
    before = model(**batch()).loss.item()
    module = run("Lightning")["LanguageModel"](model)
    trainer = lightning.Trainer(
        max_steps=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows(), batch_size=2))  # pyright: ignore[reportArgumentType]
    assert fall(model, before) > 0.1


def test_torchtitan() -> None:
    torch.manual_seed(0)
    pred, labels = torch.randn(2, 9, VOCABULARY), batch()["labels"]
    loss = run("torchtitan style")["Loss"]()(pred, labels, torch.tensor(40))
    assert_close(loss, exact_loss(pred.double(), None, None, 40, shift_labels=labels))
    assert run("torchtitan style")["Loss"]()(pred.bfloat16(), labels, 40.0).dtype == torch.float32


def test_plain_loop_with_fsdp2() -> None:
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    ids, labels = (batch(4)[key] for key in ("input_ids", "labels"))
    torch.manual_seed(0)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        found = run(
            "A plain loop with FSDP2", backbone=torch.nn.Embedding(VOCABULARY, 32), width=32, vocabulary=VOCABULARY,
            mesh=init_device_mesh("cpu", (1,)), batches=[(ids, labels)] * 30,
        )  # fmt: skip
        logits = found["model"](ids)
    finally:
        destroy_process_group()
    after = exact_loss(logits.double(), None, shift_labels=labels)
    assert after < found["loss"] < 4.3
