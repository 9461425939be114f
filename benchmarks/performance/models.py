"""Models with random weights for measurements of speed and memory: the shapes count, the values do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers as tf

from stages.models.resolve import resolve

# Any tokenizer whose ids fit the vocabulary does.
_TOKENIZER = "smollm2-135m"


def llama_like(folder: Path, num_blocks: int) -> Path:
    """A Llama of 3.2 million weights a block."""
    config = tf.LlamaConfig(
        vocab_size=49152,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=num_blocks,
        num_attention_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return _save(folder, config)


def opt_6_7b_like(folder: Path, num_blocks: int) -> Path:
    """OPT-6.7B cut to its first blocks."""
    config = tf.OPTConfig(
        vocab_size=50272,
        hidden_size=4096,
        ffn_dim=16384,
        num_hidden_layers=num_blocks,
        num_attention_heads=32,
        max_position_embeddings=2048,
        word_embed_proj_dim=4096,
    )
    return _save(folder, config)


def _save(folder: Path, config: tf.PreTrainedConfig) -> Path:
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    # In half precision from the start, as the originals are stored: fp32 would take twice the memory to make it.
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder)
    for path in resolve(_TOKENIZER).path.iterdir():
        if "token" in path.name or path.name in ("vocab.json", "merges.txt"):
            shutil.copy(path, folder)
    return folder
