"""The table of the census: one tiny configuration for each model family, and what lampctl does with it.

A configuration is the family's own with small sizes, so that a whole run takes seconds. `Verdict` says what is expected
of it, strictly: a family that begins to work, or that stops to, is a failing test until the table says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import transformers as tf

from tests.small_models import VOCAB

Kind = Literal[
    "dense",
    "GQA",
    "sliding window",
    "post-norm",
    "parallel",
    "MoE",
    "hybrid state",
    "shared KV",
    "multimodal",
    "vision",
    "encoder",
]


@dataclass(frozen=True)
class Verdict:
    """What lampctl does with a model: "works", "refused" before any work (exit code 2), or "not yet": it fails."""

    word: Literal["works", "refused", "not yet"]
    message: str = ""  # a regular expression of what it says, unless it works
    reason: str = ""  # for docs/models.md


WORKS = Verdict("works")


@dataclass(frozen=True)
class Configuration:
    """One entry of the census."""

    name: str
    kind: Kind
    build: Callable[[], tf.PreTrainedConfig]
    verdict: Verdict = WORKS


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
_DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _tiny(model_type: str, without: tuple[str, ...] = (), **changes: Any) -> Callable[[], tf.PreTrainedConfig]:
    """The family's configuration with the common small sizes but those in `without`, and `changes`."""

    def build() -> tf.PreTrainedConfig:
        sizes = {name: value for name, value in _COMMON.items() if name not in without}
        return tf.AutoConfig.for_model(model_type, **{**sizes, **changes})

    return build


def _with_tower(model_type: str, text: str, tower: dict[str, Any], **changes: Any) -> Callable[[], tf.PreTrainedConfig]:
    """A multimodal configuration around a tiny text model of type `text`."""

    def build() -> tf.PreTrainedConfig:
        return tf.AutoConfig.for_model(model_type, text_config=_tiny(text)().to_dict(), vision_config=tower, **changes)

    return build


_NO_GROUPS = ("num_key_value_heads", "head_dim")

DENSE = [
    Configuration("opt", "dense", _tiny("opt", _NO_GROUPS, ffn_dim=64, word_embed_proj_dim=32)),
    Configuration("gpt2", "dense", _tiny("gpt2", tuple(_COMMON)[1:8], **_GPT2)),
    Configuration(
        "gpt_neo",
        "dense",
        _tiny(
            "gpt_neo",
            _NO_GROUPS,
            num_layers=3,
            num_heads=4,
            window_size=8,
            attention_types=[[["global", "local", "global"], 1]],
        ),
    ),
    Configuration("bloom", "dense", _tiny("bloom", tuple(_COMMON)[2:8], n_layer=3, n_head=4)),
    Configuration(
        "mpt", "dense", _tiny("mpt", tuple(_COMMON)[1:8], d_model=32, n_heads=4, n_layers=3, max_seq_len=128)
    ),
    Configuration("biogpt", "dense", _tiny("biogpt", _NO_GROUPS)),
    Configuration(
        "xglm", "dense", _tiny("xglm", tuple(_COMMON)[1:7], d_model=32, ffn_dim=64, num_layers=3, attention_heads=4)
    ),
    Configuration(
        "ctrl", "dense", _tiny("ctrl", tuple(_COMMON)[1:8], n_embd=32, dff=64, n_layer=3, n_head=4, n_positions=128)
    ),
    Configuration("openai-gpt", "dense", _tiny("openai-gpt", tuple(_COMMON)[1:8], **_GPT2)),
    Configuration("persimmon", "dense", _tiny("persimmon", _NO_GROUPS)),
    Configuration("llama", "dense", _tiny("llama", num_key_value_heads=4)),
    Configuration("nemotron", "dense", _tiny("nemotron", num_key_value_heads=4)),
    Configuration("apertus", "dense", _tiny("apertus", num_key_value_heads=4)),
    Configuration("nanochat", "dense", _tiny("nanochat", num_key_value_heads=4)),
    Configuration("gpt_bigcode", "dense", _tiny("gpt_bigcode", tuple(_COMMON)[1:8], **_GPT2)),
    Configuration("minicpm3", "dense", _tiny("minicpm3", ("head_dim",), **_MLA, num_key_value_heads=4)),
    Configuration("modernbert-decoder", "dense", _tiny("modernbert-decoder", _NO_GROUPS)),
    Configuration("xlstm", "hybrid state", _tiny("xlstm", _NO_GROUPS, num_heads=4, num_blocks=3)),
]

GROUPED = [
    Configuration(name, "GQA", _tiny(name))
    for name in (
        "llama", "qwen2", "qwen3", "gemma", "granite", "helium", "smollm3", "arcee", "seed_oss", "ernie4_5", "glm",
        "hunyuan_v1_dense", "bitnet", "diffllama", "doge", "exaone4", "hyperclovax", "jais2", "cwm",
        "phi3", "starcoder2", "stablelm", "youtu",
    )
]  # fmt: skip
