"""Tiny models of many transformers architectures, made offline."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from genloss_kernels.testing import assert_close

VOCABULARY = 101

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = _SPECIAL | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = _SIZES | {"num_key_value_heads": 2, "head_dim": 8}
_GPT = _SPECIAL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_EXPERTS = _GROUPED | {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "output_router_logits": True, "router_aux_loss_coef": 0.5,
}  # fmt: skip
_LATENT = _SIZES | {
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1,
}  # fmt: skip

_PLAIN = (
    "apertus", "arcee", "exaone4", "gemma", "glm", "glm4", "helium", "llama", "mistral", "nanochat", "nemotron", "olmo",
    "olmo2", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip

# By the name of a case: a model type, or a type and what is particular.
CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_PLAIN, _GROUPED),
    **dict.fromkeys(("gpt_oss", "mixtral", "olmoe", "phimoe", "qwen3_moe"), _EXPERTS),
    "bert": _SIZES | {"is_decoder": True},
    "bloom": _SPECIAL | {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    "cohere": _GROUPED | {"logit_scale": 0.3},
    "cohere2": _GROUPED | {"logit_scale": 4.0},
    "deepseek_v3": _LATENT,
    "falcon": _SIZES,
    "gemma2": _GROUPED | {"final_logit_softcapping": 0.2},
    "gemma3_text": _GROUPED | {"final_logit_softcapping": 30.0},
    "gpt2": _GPT,
    "gpt_neox": _SIZES,
    "gptj": _GPT | {"rotary_dim": 4},
    "granite": _GROUPED | {"logits_scaling": 0.1},
    "granitemoe": _EXPERTS | {"logits_scaling": 8.0},
    "llama tied": _GROUPED | {"tie_word_embeddings": True},
    "llama padded": _GROUPED,
    "mamba": _SPECIAL | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mpt": _SPECIAL | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "opt": _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 16},
    "recurrent_gemma": _GROUPED
    | {"lru_width": 32, "attention_window_size": 8, "logits_soft_cap": 0.5, "num_hidden_layers": 3},
}

# Compute their loss themselves.
OTHERS = {
    "bart": _SPECIAL | {
        "d_model": 32, "decoder_layers": 2, "encoder_layers": 1, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
        "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    },
}  # fmt: skip


def build(name: str, **changes: Any) -> PreTrainedModel:
    """In training mode, without dropout and router noise, which depend on the dtype; the same weights at each call."""
    config = AutoConfig.for_model(name.partition(" ")[0], **{"vocab_size": VOCABULARY} | (CONFIGS | OTHERS)[name] | changes)
    for key, value in vars(config).items():
        if ("drop" in key or "jitter" in key) and isinstance(value, float) and key not in changes:
            setattr(config, key, 0.0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        # The default multiplies in no float64.
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
        if name == "llama padded":
            model.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False)
    return model.train()


def batch(rows: int = 2, tokens: int = 9) -> dict[str, torch.Tensor]:
    """Token ids, and labels some of which are ignored."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :3] = labels[1:, 5] = -100
    return {"input_ids": ids, "labels": labels}


def exact_loss(
    logits: Tensor, labels: Any, vocab_size: Any = None, num_items_in_batch: Any = None, ignore_index: int = -100,
    shift_labels: Any = None, **_: Any,
) -> Tensor:  # fmt: skip
    """In float64, where transformers rounds the logits to float32, and by the definition: each token predicts the next."""
    if shift_labels is None:
        rows, target = logits[..., :-1, :].double(), labels[..., 1:]
    else:
        rows, target = logits.double(), shift_labels
    losses = -rows.log_softmax(-1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    valid = target != ignore_index
    count = valid.sum() if num_items_in_batch is None else num_items_in_batch
    return torch.where(valid, losses, 0.0).sum() / count


def step(model: Any, **arguments: Any) -> dict[str, Tensor]:
    """The loss and every parameter's gradient."""
    model.zero_grad()
    loss = model(**batch() | arguments).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **{name: g.clone() for name, g in found.items()}}


def exact_step(model: Any, **arguments: Any) -> dict[str, Tensor]:
    model = copy.deepcopy(model).double()
    model.loss_function = exact_loss
    return {name: value.double() for name, value in step(model, **arguments).items()}


def assert_steps_agree(actual: dict[str, Tensor], expected: dict[str, Tensor], native: dict[str, Tensor]) -> None:
    """Gradients as one vector: some, as of a key's bias, are zero but for what cancels in the others' rounding."""
    assert actual.keys() == expected.keys() == native.keys()
    assert_close(actual["loss"], expected["loss"], native["loss"], "loss")
    assert_close(*(torch.cat([g.flatten() for g in s.values()]) for s in (actual, expected, native)), "gradients")
