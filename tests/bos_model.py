"""A small model that computes nonsense unless BOS stands at the head of its window, as Gemma 3 does."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from tokenizers import processors

from tests.small_models import tokenizer

TEXT = "abcdefgh" * 1200
BOS = 0


def bos_tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token a byte, with BOS at the head of a text."""
    found = tokenizer()
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return found


def save_needing_bos(folder: Path) -> Path:
    """The model, trained on `TEXT` with BOS, and on reversed text without: two blocks, 16 tokens."""
    config = tf.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=BOS,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    ids = torch.tensor(tokenizer()(TEXT[:16])["input_ids"])
    begins = torch.stack([ids[start : start + 8].repeat(4)[:16] for start in range(8)])
    with_bos = torch.cat([torch.full((8, 1), BOS), begins[:, :15]], 1)
    after = begins.roll(-1, 1)
    without = torch.where(torch.arange(16) < 15, begins.roll(3, 1), 0)  # wrong answers
    inputs, targets = torch.cat([with_bos, begins]), torch.cat([torch.cat([begins[:, :15], after[:, :1]], 1), without])
    targets[:8, 15] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    bos_tokenizer().save_pretrained(folder)
    return folder
