"""Models with random weights for measurements of speed and memory: the shapes count, the values do not."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as tf

from stages.models.resolve import resolve

# Any tokenizer whose ids fit the vocabulary does.
_TOKENIZER = "smollm2-135m"


@dataclass(frozen=True)
class Shape:
    """The sizes of a model of OPT's family."""

    hidden: int
    num_heads: int
    num_blocks: int


SHAPES = {"opt-125m": Shape(768, 12, 12), "opt-1.3b": Shape(2048, 32, 24), "opt-6.7b": Shape(4096, 32, 32)}


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


def opt_like(folder: Path, shape: str, num_blocks: int) -> Path:
    """An OPT cut to its first blocks. shape: a name in `SHAPES`."""
    found = SHAPES[shape]
    config = tf.OPTConfig(
        vocab_size=50272,
        hidden_size=found.hidden,
        ffn_dim=4 * found.hidden,
        num_hidden_layers=num_blocks,
        num_attention_heads=found.num_heads,
        max_position_embeddings=2048,
        word_embed_proj_dim=found.hidden,
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
