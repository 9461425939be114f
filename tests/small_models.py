"""Small models of every family that is promised to work, random but reproducible, with a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf

VOCAB = 300
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_BASE = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def _configs() -> dict[str, tf.PreTrainedConfig]:
    opt = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        **_BASE,
        "pad_token_id": 1,
    }
    neox = _LLAMA | _BASE
    return {
        "opt": tf.OPTConfig(**opt),
        # OPT-350M alone: layer norms after the blocks, embeddings of another width.
        "opt-350m": tf.OPTConfig(**{**opt, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
        "llama": tf.LlamaConfig(**_LLAMA, **_BASE),
        "llama-gqa": tf.LlamaConfig(**_LLAMA, **_BASE, num_key_value_heads=2, tie_word_embeddings=True),
        "qwen3": tf.Qwen3Config(**_LLAMA, **_BASE, num_key_value_heads=2, head_dim=8),
        "gemma3": tf.Gemma3TextConfig(
            **_LLAMA, **_BASE, num_key_value_heads=2, head_dim=8, sliding_window=8, sliding_window_pattern=2
        ),
        "mistral": tf.MistralConfig(**_LLAMA, **_BASE, num_key_value_heads=2, sliding_window=8),
        "phi": tf.PhiConfig(**_LLAMA, **_BASE),
        "olmo": tf.OlmoConfig(**_LLAMA, **_BASE),
        "gpt-neox": tf.GPTNeoXConfig(**neox, use_parallel_residual=True),
        "gpt2": tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=128, **_BASE),
        "bloom": tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, **_BASE),
        "falcon": tf.FalconConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=False, **_BASE
        ),
    }


FAMILIES = tuple(_configs())


def build(family: str, seed: int = 0, num_blocks: int | None = None) -> tf.PreTrainedModel:
    """A model of the family with random weights and biases (a zero bias would hide that it is lost)."""
    config = _configs()[family]
    if num_blocks is not None:
        config.num_hidden_layers = num_blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_blocks]
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token a byte, after four special ones; no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3} | {c: i + 4 for i, c in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **build_options: int) -> Path:
    """A model folder like one from the hub."""
    model = build(family, **build_options).to(dtype)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
