"""Small mixtures of experts of the families that are promised to work, random but reproducible."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf

from tests.small_models import VOCAB, tokenizer

NUM_EXPERTS, TOP_K = 8, 2
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "num_experts_per_tok": TOP_K,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_SHARED = {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


def _configs() -> dict[str, tf.PreTrainedConfig]:
    grouped = {"num_key_value_heads": 2}
    return {
        "mixtral": tf.MixtralConfig(**_COMMON, **grouped, intermediate_size=48, num_local_experts=NUM_EXPERTS),
        "qwen2-moe": tf.Qwen2MoeConfig(
            **_COMMON,
            **grouped,
            intermediate_size=48,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=48,
            num_experts=NUM_EXPERTS,
        ),
        "qwen3-moe": tf.Qwen3MoeConfig(
            **_COMMON, **grouped, intermediate_size=48, moe_intermediate_size=24, head_dim=8, num_experts=NUM_EXPERTS
        ),
        "olmoe": tf.OlmoeConfig(**_COMMON, intermediate_size=24, num_experts=NUM_EXPERTS),
        "deepseek-v2": tf.DeepseekV2Config(**_COMMON, **_LATENT, **_SHARED, topk_method="greedy"),
        "deepseek-v3": tf.DeepseekV3Config(**_COMMON, **_LATENT, **_SHARED, n_group=2, topk_group=1),
        "gpt-oss": tf.GptOssConfig(
            **_COMMON, **grouped, intermediate_size=24, head_dim=8, num_local_experts=NUM_EXPERTS, sliding_window=8
        ),
        "glm4-moe": tf.Glm4MoeConfig(**_COMMON, **grouped, **_SHARED, head_dim=8, n_group=1, topk_group=1),
    }


FAMILIES = tuple(_configs())


def build(family: str, seed: int = 0) -> tf.PreTrainedModel:
    """A model of the family with random weights, biases and corrections of the router."""
    config = _configs()[family]
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        corrections = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for tensor in (*model.parameters(), *corrections):
            tensor.add_(0.05 * torch.randn(tensor.shape))
    return model.eval()


def save(folder: Path, family: str = "mixtral", dtype: torch.dtype = torch.float32) -> Path:
    """A model folder like one from the hub."""
    build(family).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path) -> tf.PreTrainedModel:
    """What transformers makes of a folder."""
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
